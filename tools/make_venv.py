# SPDX-License-Identifier: Apache-2.0
"""Make this checkout's virtual environment out of a cached one.

Third-party packages are installed once per (constraints, Python) into the user's cache folder.  The
checkout's own environment holds only the editable install of `valve` and a `.pth` line that points at
the cached packages, so that a second clone is ready in seconds.  Called by the Makefile; standard
library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

RECIPE = "1"  # bump when the steps below change what lands in the cache


def cached_packages(cache: Path, constraints: Path) -> Path:
    """Return the site-packages folder of the cached environment, building it if need be."""
    key = hashlib.sha256(constraints.read_bytes() + sys.version.encode() + RECIPE.encode()).hexdigest()[:16]
    home = cache / f"python-{key}"
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if (home / "ready").exists():
        return site
    print(f"installing {constraints} into {home}", flush=True)
    venv.create(home, with_pip=True, clear=True)
    subprocess.run(
        [
            home / "bin" / "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "-r",
            constraints,
        ],
        check=True,
    )
    (home / "ready").touch()
    return site


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--constraints", type=Path, required=True)
    parser.add_argument("venv", type=Path)
    args = parser.parse_args()
    site = cached_packages(args.cache, args.constraints)
    venv.create(args.venv, with_pip=False, clear=True)
    own_site = args.venv / "lib" / site.parent.name / "site-packages"
    (own_site / "valve-third-party.pth").write_text(f"{site}\n")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(
        [args.venv / "bin" / "python", *pip, "--no-build-isolation", "--editable", "."],
        check=True,
        env=os.environ | {"PIP_NO_WARN_SCRIPT_LOCATION": "1"},
    )
    (args.venv / "ready").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
