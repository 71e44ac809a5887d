# SPDX-License-Identifier: Apache-2.0
"""The small images of the test cluster, made in a second.

valve.test/pause:1    holds a pod's namespaces
valve.test/busybox:1  a static busybox, for test pods
valve.test/host:1     nothing but the links of a merged /usr: a pod that mounts the host's /usr runs
                      the host's Python and the engines' environment without importing gigabytes
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from e2e.cluster.errors import BuildError
from e2e.cluster.images import archive
from e2e.cluster.programs import system_program

PAUSE, BUSYBOX, HOST = "valve.test/pause:1", "valve.test/busybox:1", "valve.test/host:1"
FOLDERS = ("etc", "proc", "sys", "dev", "tmp", "run", "var", "root", "opt")
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def pause(layer: archive.Layer) -> archive.Config:
    source = Path(__file__).with_name("pause.c")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "pause"
        command = ["cc", "-O2", "-static", "-s", "-Wall", "-Werror", "-o", str(program), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"the pause program does not compile (is libc6-dev installed?):\n{done.stderr}")
        layer.file("pause", program)
    return archive.Config(entrypoint=("/pause",), user="65535:65535")


def busybox(layer: archive.Layer) -> archive.Config:
    program = system_program("busybox")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    _skeleton(layer)
    layer.directory("bin")
    layer.file("bin/busybox", program)
    for applet in sorted(set(applets) - {"busybox"}):
        layer.link(f"bin/{applet}", "busybox")
    return archive.Config(command=("sh",), environment={"PATH": PATH})


def host(layer: archive.Layer) -> archive.Config:
    _skeleton(layer)
    layer.directory("usr")
    for name in ("bin", "sbin", "lib", "lib64"):
        layer.link(name, f"usr/{name}")
    return archive.Config(command=("sh",), environment={"PATH": PATH})


def _skeleton(layer: archive.Layer) -> None:
    for folder in FOLDERS:
        layer.directory(folder, 0o1777 if folder == "tmp" else 0o755)
    layer.file("etc/passwd", PASSWD, 0o644)
    layer.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n", 0o644)


ALL: dict[str, Callable[[archive.Layer], archive.Config]] = {PAUSE: pause, BUSYBOX: busybox, HOST: host}


def write(name: str, folder: Path) -> Path:
    """Write one of the images above to a tar in `folder`. Raises BuildError, MissingError."""
    stem = name.replace("/", "-").replace(":", "-")
    layer = archive.Layer(folder / f"{stem}.layer")
    config = ALL[name](layer)
    layer.close()
    path = archive.write(folder / f"{stem}.tar", name, [layer.path], config)
    layer.path.unlink()
    return path
