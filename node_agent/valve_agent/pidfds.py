# SPDX-License-Identifier: Apache-2.0
"""Whether the process of a pidfd has ended.

Why it exists: three places ask, and `select` takes no descriptor above 1023, which a node with a hundred
engines reaches. Both of the agent's processes import it: standard library only.
"""

from __future__ import annotations

import select


def has_ended(pidfd: int) -> bool:
    """Also before its parent has reaped it."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
