# SPDX-License-Identifier: Apache-2.0
"""A pidfd says whether its process has ended, whatever its number."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys

import pytest

from valve_agent.pidfds import has_ended


@pytest.mark.parametrize(("what", "least"), [("any", 0), ("beyond what select can take", 1500)])
def test_it_has_ended_before_it_is_reaped(what: str, least: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    first = os.pidfd_open(child.pid)
    pidfd = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, least)
    try:
        assert not has_ended(pidfd), what
        assert child.stdin is not None
        child.stdin.close()
        os.waitid(os.P_PIDFD, first, os.WEXITED | os.WNOWAIT)
        assert has_ended(pidfd)
        child.wait()
        assert has_ended(pidfd)
    finally:
        os.close(first)
        os.close(pidfd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
