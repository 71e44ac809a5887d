# SPDX-License-Identifier: Apache-2.0
"""`valve doctor`: which device and which route this machine gives, what is missing, what to do about it.

It needs no agent, changes nothing, and makes no CUDA context. Threading model: none. Called by
valve_cli.main.

Exit status: 0 the device can be used; 1 it cannot, and the lines marked MISSING say why; 2 wrong usage.
Warnings do not change it.
"""

from __future__ import annotations

import argparse
import json

from valve_cli import doctor_machine, doctor_nvidia
from valve_cli.doctor_report import Check, Nvidia, Report


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="valve doctor",
        description="Which device and route this machine gives, what is missing, what to do about it.",
        epilog="exit status: 0 usable, 1 not usable (see MISSING), 2 wrong usage",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "nvidia"],
        default="auto",
        help="the device that you want to use (default: nvidia where there is a GPU or a driver, else cpu)",
    )
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    arguments = parser.parse_args(argv)
    found = report(arguments.device)
    print(json.dumps(found.as_json(), indent=2) if arguments.output == "json" else found.as_text())
    return 0 if found.usable else 1


def report(wanted: str) -> Report:
    """`wanted`: cpu, nvidia or auto."""
    nvidia = doctor_nvidia.look()
    device, why = choose(wanted, nvidia)
    checks = [*doctor_machine.machine_checks(), *doctor_machine.cpu_checks(), *nvidia.checks]
    bearing = ("machine", device)
    return Report(device, why, [c if c.section in bearing else _only_a_note(c) for c in checks], nvidia)


def _only_a_note(check: Check) -> Check:
    """What another device would need is no problem of this one."""
    return check._replace(level="note") if check.level == "missing" else check


def choose(wanted: str, nvidia: Nvidia) -> tuple[str, str]:
    """The device and the reason for it."""
    if wanted != "auto":
        return wanted, "asked for"
    if nvidia.present:
        return "nvidia", "an NVIDIA GPU or driver is here; --device cpu asks about the other"
    return "cpu", "no NVIDIA GPU and no driver on this machine"
