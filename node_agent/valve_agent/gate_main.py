# SPDX-License-Identifier: Apache-2.0
"""Entry of the gate process: makes the process lean and quick, then runs the loop.

Why it exists: apart from gate.py, which tests run inside their own process. Started by
gate_link.GateHandle with its descriptors and settings as arguments; it reads no environment.

Threading model: the process has one thread.
"""

from __future__ import annotations

import gc
import signal
import socket
from typing import Any

from valve_agent.devices.base import ComputeControl, DeviceMissing
from valve_agent.devices.cpu.compute import SHORT_SLICE_NS, CpuCompute
from valve_agent.devices.cpu.kernel import lock_memory, run_first, set_slice, set_timer_slack
from valve_agent.gate import Gate, GateSettings
from valve_agent.gate_stats import StatsWriter


def _compute(device: str) -> ComputeControl[Any]:
    """`cpu`, or `nvidia:` and what the routes' parse() understands. Raises DeviceError."""
    kind, _, rest = device.partition(":")
    if kind == "cpu":
        return CpuCompute()
    if kind == "nvidia":
        from valve_agent.devices.nvidia.compute import parse

        return parse(rest)
    raise DeviceMissing(f"there is no device {device!r}; this version of the agent knows `cpu` and `nvidia`")


def main(arguments: list[str]) -> None:
    """Entry of the gate process: device, six descriptors (the last may be -1), the settings; see
    gate_link.GateHandle."""
    device, *rest = arguments
    control_fd, holds_fd, events_fd, doorbell_fd, stats_fd, common_fd = (int(word) for word in rest[:6])
    numbers = [float(rest[6]), *(int(word) for word in rest[7:])]
    settings = GateSettings._make(numbers)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group: main ends, and then we do
    compute = _compute(device)
    set_timer_slack(1)
    # A woken gate runs at once, not after the turn of what computes here, nor after the threads it stops.
    if not run_first():
        set_slice(0, SHORT_SLICE_NS)
    events = socket.socket(fileno=events_fd)
    events.setblocking(False)
    gate = Gate(
        compute,
        settings,
        socket.socket(fileno=control_fd),
        socket.socket(fileno=holds_fd),
        events,
        doorbell_fd,
        StatsWriter(stats_fd),
        common_fd,
    )
    gc.collect()
    gc.disable()
    gc.freeze()
    lock_memory()
    gate.run()
