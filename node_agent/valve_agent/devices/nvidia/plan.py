# SPDX-License-Identifier: Apache-2.0
"""Prepared control calls for one process: what to issue to stop it, to stop all of it, to let it run.

Why it exists: the hot path must not build anything. A plan is made from one reading of the channel table and
holds until the table's `changes` moves. Every channel of every compute TSG is listed: a group stays on the
GPU while one of its channels is enabled.

Threading model: the gate's thread. Callers: routes.py. Standard library only.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.table import Channel, GpuTable

Step = tuple[int, rm.Control]
"""Descriptor to issue it on, prepared call."""


class Commit(enum.Enum):
    """What follows DISABLE_CHANNELS, if on this hardware it only masks (the qualification tells)."""

    NONE = "none"
    PREEMPT = "preempt"
    RESTART = "restart"
    """Needs CAP_SYS_NICE."""


class NotYet(str):
    """Why a route does not work at this moment; a moment later it may."""


class Plan:
    """`problem` says why some channel cannot be controlled; then the steps do not suffice."""

    __slots__ = (
        "changes",
        "channels",
        "clients",
        "copies",
        "groups",
        "problem",
        "run",
        "stop_compute",
        "stop_rest",
    )

    def __init__(self, changes: int) -> None:
        self.changes = changes
        self.channels = 0
        self.copies = 0
        self.groups = 0
        self.clients = 0
        self.problem: str | None = None
        self.stop_compute: list[Step] = []
        self.stop_rest: list[Step] = []
        """copy engines and everything else that is no compute"""
        self.run: list[Step] = []


def build(table: GpuTable, files: Mapping[int, int], own_fd: int | None, commit: Commit) -> Plan:
    """`files`: number -> descriptor that the process passed. `own_fd`: issue on this file instead (patched
    driver)."""
    changes, found = table.read()
    plan = Plan(changes)
    plan.channels = len(found)
    plan.problem = _problem(table, found, files if own_fd is None else None)
    by_place: dict[tuple[int, int, int], list[Channel]] = {}
    for channel in found:
        if channel.subdevice:
            by_place.setdefault((channel.file, channel.client, channel.subdevice), []).append(channel)
    plan.clients = len({client for _, client, _ in by_place})
    for (file, client, subdevice), channels in by_place.items():
        fd = own_fd if own_fd is not None else files.get(file)
        if fd is None:
            continue  # `problem` says so
        compute = [channel for channel in channels if channel.computes]
        rest = [channel for channel in channels if not channel.computes]
        plan.copies += len(rest)
        plan.groups += len({channel.group for channel in compute if channel.group})
        plan.stop_compute += _stop(fd, client, subdevice, compute, commit)
        plan.stop_rest += _stop(fd, client, subdevice, rest, commit)
        handles = [channel.channel for channel in channels]
        plan.run += [(fd, block) for block in rm.disable_blocks(client, subdevice, handles, False)]
    return plan


def _stop(fd: int, client: int, subdevice: int, channels: list[Channel], commit: Commit) -> list[Step]:
    """Disable first, then commit: the other order would let the group come back in between."""
    blocks = rm.disable_blocks(client, subdevice, [channel.channel for channel in channels], True)
    if commit is Commit.PREEMPT:
        groups = dict.fromkeys(channel.group for channel in channels if channel.group)
        blocks += [rm.preempt_block(client, group) for group in groups]
    elif commit is Commit.RESTART:
        firsts: dict[int, int] = {}
        for channel in channels:
            firsts.setdefault(channel.group or channel.channel, channel.channel)
        blocks += [rm.restart_block(client, channel) for channel in firsts.values()]
    return [(fd, block) for block in blocks]


def _problem(table: GpuTable, found: list[Channel], files: Mapping[int, int] | None) -> str | None:
    if table.overflow:
        return (
            f"{table.overflow} of its RM objects found no room in libvalve's table, so its channels are not "
            "all known: use fewer streams and contexts in one process"
        )
    for channel in found:
        if not channel.subdevice:
            return (
                f"channel 0x{channel.channel:x} has no subdevice that libvalve saw: was it preloaded first?"
            )
        if files is not None and channel.file not in files:
            return NotYet(f"the control file of client 0x{channel.client:x} has not arrived")
    return None
