# SPDX-License-Identifier: Apache-2.0
"""Where `prometheus` and `promtool` are: on PATH, or unpacked from Debian's package into the user's cache.

Why it exists: the dashboards and alert rules are tested against a real Prometheus. Installing the package
would start a server on this machine; its two programs are all that is needed. Standard library only.

Threading model: none. Callers: the monitoring tests; `python tools/get_prometheus.py` prints the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "prometheus"
PROGRAMS = ("prometheus", "promtool")


class NoPrometheus(Exception):
    """The message says what to install."""


def folder(cache: Path) -> Path:
    """A folder that holds both programs. Raises NoPrometheus."""
    found = shutil.which("prometheus"), shutil.which("promtool")
    if found[0] and found[1]:
        return Path(found[0]).parent
    home = cache / "prometheus"
    if not all((home / name).exists() for name in PROGRAMS):
        _unpack(home)
    return home


def _unpack(home: Path) -> None:
    if shutil.which("apt-get") is None:
        raise NoPrometheus("needs prometheus and promtool: install Prometheus 2.42 or newer")
    with tempfile.TemporaryDirectory() as work:
        steps = (["apt-get", "download", "-q", PACKAGE], ["sh", "-c", "dpkg-deb -x prometheus_*.deb out"])
        for step in steps:
            done = subprocess.run(step, cwd=work, capture_output=True, text=True)
            if done.returncode:
                raise NoPrometheus(
                    f"needs prometheus and promtool, and `{' '.join(step)}` failed: {done.stderr.strip()}; "
                    "run apt-get update, or apt-get install prometheus"
                )
        home.mkdir(parents=True, exist_ok=True)
        for name in PROGRAMS:
            new = home / f"{name}.new-{os.getpid()}"
            shutil.copy2(Path(work) / "out" / "usr" / "bin" / name, new)
            new.rename(home / name)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "valve"


if __name__ == "__main__":
    try:
        print(folder(default_cache()))
    except NoPrometheus as error:
        sys.exit(f"{error}")
