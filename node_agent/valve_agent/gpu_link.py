# SPDX-License-Identifier: Apache-2.0
"""What an offline process's libvalve sends about its GPU: the channel table and the driver files.

Why it exists: the gate needs them and main only passes them on, so that main never is the last to close a
driver file, which can take long. What the gate cannot control is refused here: the process is told why, and
its connection ends, which leaves it paused (P6).

Threading model: the server thread. Caller: agent.py.
"""

from __future__ import annotations

import os

from valve_agent import wire
from valve_agent.gate_link import GateRefused
from valve_agent.holds import Gate
from valve_agent.identity import IdentityError
from valve_agent.registry import Process
from valve_agent.wire import RejectCode, Role

TABLE = -1
"""The number under which the gate gets {table, bell}."""
FRAMES = (wire.GpuTable, wire.GpuFile, wire.GpuFileGone)


def on_frame(gate: Gate, process: Process, frame: wire.Frame, fds: list[int]) -> None:
    """Pass it on and close our copies. Raises IdentityError, BadField, GateDied."""
    try:
        assert process.link is not None
        if process.tenant.role != Role.OFFLINE:
            raise wire.BadField(f"{frame.TYPE.name} from an online process: Valve never pauses those")
        if isinstance(frame, wire.GpuTable):
            gate.supply(process.link.connection, TABLE, fds)
        elif isinstance(frame, wire.GpuFile) and frame.kind == wire.GpuFileKind.CTL:
            gate.supply(process.link.connection, int(frame.number), fds)
            process.gpu_files.add(int(frame.number))
        elif isinstance(frame, wire.GpuFileGone) and frame.kind == wire.GpuFileKind.CTL:
            gate.withdraw(process.link.connection, int(frame.number))
            process.gpu_files.discard(int(frame.number))
    except GateRefused as error:
        raise IdentityError(
            RejectCode.EPROTO, f"process {process.pid} cannot be controlled on the GPU: {error}"
        ) from error
    finally:
        for fd in fds:
            os.close(fd)


def check_version(role: Role, device: wire.Device, version: int) -> None:
    """An offline runtime that cannot send its channels cannot be paused. Raises IdentityError."""
    if role == Role.OFFLINE and device == wire.Device.NVIDIA and version < 2:
        raise IdentityError(
            RejectCode.EVERSION,
            "this libvalve speaks protocol version 1, which knows no GPU, so the process could not be "
            "paused: install the agent's version of Valve in the pod",
        )
