# SPDX-License-Identifier: Apache-2.0
"""The fake driver's own tests: every test has a machine of its own."""

from __future__ import annotations

import pytest

import fakenv


@pytest.fixture
def machine(new_machine: fakenv.NewMachine) -> fakenv.Machine:
    return new_machine()
