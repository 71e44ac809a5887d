# SPDX-License-Identifier: Apache-2.0
"""Writes deviceplugin/valve_kubelet/*_pb2.py and their .pyi from deviceplugin/proto/*.proto.

    build/venv/bin/python deviceplugin/generate.py [--out DIR]

Why it exists: the generated files are checked in, so that a node image needs no compiler; a test generates
them again and compares. Threading model: none. Callers: developers, tests/unit/deviceplugin.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
PROTO = HOME / "proto"
PACKAGE = HOME / "valve_kubelet"
LICENSE = "# SPDX-License-Identifier: Apache-2.0\n"


def generate(out: Path) -> list[Path]:
    """Generate into `out`; the files written. Raises RuntimeError if protoc refuses a file."""
    from grpc_tools import protoc  # a development tool: not on a node

    sources = sorted(PROTO.glob("*.proto"))
    status = protoc.main(
        ["protoc", f"-I{PROTO}", f"--python_out={out}", f"--pyi_out={out}", *map(str, sources)]
    )
    if status:
        raise RuntimeError(f"protoc ended with {status}; its message stands above")
    written = [out / f"{source.stem}_pb2.{suffix}" for source in sources for suffix in ("py", "pyi")]
    for path in written:
        path.write_text(LICENSE + path.read_text())
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate the kubelet's API from deviceplugin/proto.")
    parser.add_argument("--out", type=Path, default=PACKAGE)
    for path in generate(parser.parse_args().out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
