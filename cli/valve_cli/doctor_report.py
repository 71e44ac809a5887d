# SPDX-License-Identifier: Apache-2.0
"""What `valve doctor` found, as values: one check a line, the routes, the verdict; as text or as JSON.

Threading model: pure values and functions. Callers: doctor.py and the modules that make checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

SCHEMA = "valve.io/doctor/v1"

Level = Literal["ok", "note", "warning", "missing"]
_SIGN = {"ok": "ok", "note": "--", "warning": "!", "missing": "MISSING"}


class Check(NamedTuple):
    """`missing`: the device cannot be used. `warning`: it works, but weaker or slower. `note`: a fact."""

    section: str
    """`machine`, `cpu` or `nvidia`."""
    name: str
    level: Level
    found: str
    todo: str = ""
    """What the operator does about it. Never empty for `warning` and `missing`."""


class Gpu(NamedTuple):
    number: int
    name: str
    uuid: str
    memory_bytes: int | None
    """None where nobody could tell."""


class Route(NamedTuple):
    name: str
    usable: bool
    why: str


class Nvidia(NamedTuple):
    """The GPU side of a machine. `driver` None: there is none."""

    present: bool
    """Hardware or a driver of NVIDIA's was seen."""
    driver: str | None
    branch: str | None
    flavour: str | None
    """`open` or `proprietary` kernel modules."""
    gpus: Sequence[Gpu]
    routes: Sequence[Route]
    """In the agent's order. What each is: docs/gpu.md."""
    checks: Sequence[Check]

    @property
    def route(self) -> str | None:
        """The one the agent takes unless the policy names another: the first usable."""
        return next((route.name for route in self.routes if route.usable), None)


class Report(NamedTuple):
    device: str
    """`cpu` or `nvidia`: the one asked for, or chosen."""
    why: str
    checks: Sequence[Check]
    nvidia: Nvidia

    def relevant(self) -> list[Check]:
        """Checks that bear on the chosen device."""
        return [check for check in self.checks if check.section in ("machine", self.device)]

    @property
    def usable(self) -> bool:
        if any(check.level == "missing" for check in self.relevant()):
            return False
        return self.device == "cpu" or self.nvidia.route is not None

    def as_json(self) -> dict[str, object]:
        nvidia = self.nvidia
        return {
            "schema": SCHEMA,
            "device": self.device,
            "why": self.why,
            "usable": self.usable,
            "driver": {"version": nvidia.driver, "branch": nvidia.branch, "flavour": nvidia.flavour},
            "gpus": [gpu._asdict() for gpu in nvidia.gpus],
            "route": nvidia.route,
            "routes": [route._asdict() for route in nvidia.routes],
            "checks": [check._asdict() for check in self.checks],
        }

    def as_text(self) -> str:
        lines = []
        for section in ("machine", "cpu", "nvidia"):
            lines += [section, *_lines(check for check in self.checks if check.section == section), ""]
        nvidia = self.nvidia
        if nvidia.routes:
            lines.append("routes (how offline compute is stopped; the first usable one is taken)")
            lines += [
                f"  {'yes' if route.usable else 'no':8}{route.name:18}{route.why}" for route in nvidia.routes
            ]
            lines.append("")
        lines.append(f"device: {self.device} ({self.why})")
        if self.device == "nvidia" and nvidia.route:
            lines.append(f"route:  {nvidia.route}")
        problems = [check for check in self.relevant() if check.level == "missing"]
        if self.usable:
            lines.append(f"ready:  valve agent --device {self.device}")
        else:
            lines.append(f"not ready: {', '.join(check.name for check in problems) or 'no usable route'}")
        return "\n".join(lines)


def _lines(checks: Iterable[Check]) -> list[str]:
    lines = []
    for check in checks:
        lines.append(f"  {_SIGN[check.level]:8}{check.name:18}{check.found}")
        if check.todo:
            lines.append(f"  {'':8}{'':18}-> {check.todo}")
    return lines
