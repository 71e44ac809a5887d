# SPDX-License-Identifier: Apache-2.0
"""Asks the driver, in a process of its own: prints facts as one JSON object and judges nothing.

    python -m valve_cli.doctor_probe rm VERSION    resource manager: which GPUs, which controls and routes
    python -m valve_cli.doctor_probe cuda          libcuda: version, devices, what its memory can do

Why a process of its own: a call into a driver may hang behind somebody else's, and a broken libcuda may
crash; `valve doctor` puts a deadline on it. All calls are harmless: the objects are its own, nothing runs on
the GPU, no context is made, and the control that stops channels is called with an empty list.

The routes are asked by the agent's own probe. Threading model: one thread; the probe forks a child for a
moment. Caller: doctor_nvidia.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import json
import os
import re
import struct
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia import probe, rm

GET_GID_INFO = 0x2080014A
_GID_BINARY = 2

CUDA_ATTRIBUTES = {
    "virtual_memory": 102,
    "handles_as_descriptors": 103,
    "compute_major": 75,
    "compute_minor": 76,
}

_CUDA_ERRORS = {
    100: "no device (CUDA_VISIBLE_DEVICES empty, or no device file)",
    802: "the fabric is not up (start nvidia-fabricmanager)",
    803: "libcuda and the kernel modules do not fit together",
    999: "unknown error (look at dmesg)",
}


def rm_facts(version: str) -> dict[str, object]:
    """`client`: RM status of making one. `gpus`: per GPU the status of an empty DISABLE_CHANNELS (`own`).
    `routes`: the verdicts of the agent's probe."""
    facts: dict[str, object] = {"error": None, "client": None, "gpus": [], "routes": []}
    branch = rm.branch_of(version)
    try:
        with rm.RmClient() as client:
            facts["client"] = rm.OK
            facts["routes"] = [dataclasses.asdict(verdict) for verdict in probe.probe(version)]
            if branch is not None:
                facts["gpus"] = [_gpu(client, branch, number) for number in _minors()]
    except rm.RmError as error:
        facts.update(client=error.status, error=str(error))
    except DeviceError as error:
        facts["error"] = str(error)
    return facts


def _minors() -> list[int]:
    """Numbers of /dev/nvidia<N>. Asked one by one: a listing of /dev is not everywhere the truth."""
    return [number for number in range(64) if os.path.exists(f"/dev/nvidia{number}")]


def _gpu(client: rm.RmClient, branch: rm.Branch, number: int) -> dict[str, object]:
    facts: dict[str, object] = {"number": number, "name": "", "uuid": "", "error": None}
    try:
        fd = os.open(f"/dev/nvidia{number}", os.O_RDWR | os.O_CLOEXEC)  # wakes a GPU that nobody uses
    except OSError as error:
        return {**facts, "error": f"/dev/nvidia{number} cannot be opened: {error.strerror}"}
    try:
        fcntl.ioctl(fd, rm.iowr(rm.ESC_REGISTER_FD, 4), struct.pack("i", client.fd))
        device = client.alloc(client.handle, rm.DEVICE, struct.pack("I", number) + bytes(52))
        subdevice = client.alloc(device, rm.SUBDEVICE, bytes(4))
        facts["name"] = _text(
            client.control(subdevice, rm.GPU_GET_NAME_STRING, bytes(branch.name_string))[4:]
        )
        facts["uuid"] = _uuid(client, subdevice)
        facts["own"] = _try(client, subdevice)
    except (DeviceError, OSError) as error:
        facts["error"] = str(error)
    finally:
        os.close(fd)
    return facts


def _try(client: rm.RmClient, subdevice: int) -> int:
    """RM status of DISABLE_CHANNELS for no channel at all."""
    block = rm.Control(client.handle, subdevice, rm.FIFO_DISABLE_CHANNELS, rm.DisableChannels(disable=0))
    return block.issue(client.fd)


def _uuid(client: rm.RmClient, subdevice: int) -> str:
    """'' where the driver does not say."""
    try:
        answer = client.control(subdevice, GET_GID_INFO, struct.pack("III", 0, _GID_BINARY, 0) + bytes(256))
    except rm.RmError:
        return ""
    return f"GPU-{uuid.UUID(bytes=answer[12:28])}"


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("ascii", "replace")


def cuda_facts() -> dict[str, object]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"error": f"libcuda.so.1 cannot be loaded: {error}"}
    version, count = ctypes.c_int(), ctypes.c_int()
    facts: dict[str, object] = {"error": None, "path": _mapped("libcuda"), "devices": []}
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDriverGetVersion", (ctypes.byref(version),)),
        ("cuDeviceGetCount", (ctypes.byref(count),)),
    ):
        code = getattr(cuda, name)(*arguments)
        if code:
            return {**facts, "error": f"{name} answers {code}: {_CUDA_ERRORS.get(code, 'see cuda.h')}"}
    facts["version"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    facts["devices"] = [_cuda_device(cuda, index) for index in range(count.value)]
    return facts


def _cuda_device(cuda: ctypes.CDLL, index: int) -> dict[str, int]:
    facts = {}
    for name, attribute in CUDA_ATTRIBUTES.items():
        value = ctypes.c_int(-1)
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, index)
        facts[name] = value.value
    total = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), index)
    facts["memory_bytes"] = total.value
    return facts


def _mapped(library: str) -> str:
    """The file behind a loaded library, '' if it cannot be told."""
    found = re.search(rf"\s(/\S*{library}\S*)", Path("/proc/self/maps").read_text())
    return found.group(1) if found else ""


def main(argv: list[str]) -> int:
    ask: dict[str, Callable[[], dict[str, object]]] = {
        "rm": lambda: rm_facts(argv[1]),
        "cuda": cuda_facts,
    }
    print(json.dumps(ask[argv[0]]()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
