# SPDX-License-Identifier: Apache-2.0
"""What benches take on their command lines. Pure. Callers: preempt.py, victims.py."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A count of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give at least 1")
    return number
