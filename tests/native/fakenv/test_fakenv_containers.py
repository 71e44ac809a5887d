# SPDX-License-Identifier: Apache-2.0
"""The fake driver seen from other namespaces: a process has the device files of its own file system, and
processes have the names of its own PID namespace. Whole containers: e2e/scenarios/kubernetes.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pynvml
import pytest

import fakenv

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")
OWN_PIDS = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
OWN_DEV = (
    "unshare", "--mount", "sh", "-c",
    "mount -t tmpfs none /dev && mknod /dev/nvidiactl c 195 255 && mknod /dev/nvidia0 c 1 3 && "
    'exec "$0" "$@"',
)  # fmt: skip
SECOND_GPU = (
    "unshare", "--mount", "sh", "-c",
    "mount -t tmpfs none /dev && mknod /dev/nvidiactl c 195 255 && mknod /dev/nvidia1 c 195 1 && "
    'mknod /dev/nvidia-uvm c 511 0 && exec "$0" "$@"',
)  # fmt: skip
LOOK = """
import os, rm
names = ("nvidiactl", "nvidia0", "nvidia-uvm")
result = [[rm.try_open(f"/dev/{name}"), os.path.exists(f"/dev/{name}")] for name in names]
"""
PROCESSES = f"""
import sys; sys.path.append({str(Path(pynvml.__file__).parent)!r})
import pynvml; pynvml.nvmlInit()
gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
result = sorted(entry.pid for entry in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu))
"""


def test_a_device_file_is_where_the_callers_file_system_has_it(new_machine: fakenv.NewMachine) -> None:
    machine = new_machine(need_nodes=True)
    missing = [errno.ENOENT, False]
    assert machine.actor().run(LOOK) == [missing, missing, missing]
    seen = machine.actor(*OWN_DEV).run(LOOK)
    assert seen == [[0, True], [errno.ENOENT, True], missing], "a file of that name is not yet the GPU's"


def test_libcuda_counts_the_gpus_of_its_container(new_machine: fakenv.NewMachine) -> None:
    machine = new_machine(gpus=2, need_nodes=True)
    actor = machine.actor(*SECOND_GPU)
    actor.run("import ctypes, driver_api; cu = driver_api.Cuda()")
    actor.run("count = ctypes.c_int(); cu('cuDeviceGetCount', ctypes.byref(count)); cu.alloc(32 << 20)")
    actor.run("uuid = (ctypes.c_uint8 * 16)(); cu('cuDeviceGetUuid_v2', uuid, ctypes.c_int(0))")
    assert actor.run("result = [count.value, bytes(uuid).hex()]") == [1, b"fakenv-gpu-uuid\1".hex()]
    first, second = machine.status()["used_bytes"]
    assert first == 0
    assert second >= 32 << 20


def test_processes_have_the_names_of_the_callers_namespace(machine: fakenv.Machine) -> None:
    outer, inner = machine.actor(), machine.actor(*OWN_PIDS)
    for actor in (outer, inner):
        actor.run("import rm; c = rm.Client(); t = c.tree()")
    assert inner.run("import os; result = os.getpid()") == 1
    assert inner.run(PROCESSES) == [1]
    (below,) = {client["pid"] for client in machine.status()["clients"]} - {outer.pid}
    assert outer.run(PROCESSES) == sorted([outer.pid, below])


def test_a_link_in_proc_is_read_in_the_callers_proc(machine: fakenv.Machine) -> None:
    inner = machine.actor(*OWN_PIDS)
    inner.run("import os, rm; c = rm.Client()")
    assert inner.run("result = os.readlink(f'/proc/1/fd/{c.fd}')") == "/dev/nvidiactl"
    assert inner.run("result = os.readlink(f'/proc/self/fd/{c.fd}')") == "/dev/nvidiactl"
