# SPDX-License-Identifier: Apache-2.0
"""A second engine of the online pod, in a burst: takes device memory, holds it a moment, gives it back.

    taker.py SLABS

A model of 135 million parameters leaves a GiB of key-value cache empty; this stands for the load that does
not. Prints how many slabs it held. Single-threaded. Runs in the online container, by `kubectl exec`.
"""

from __future__ import annotations

import sys
import time

from valve_runtime import _lib

WAIT_S = 10.0
HOLD_S = 0.5


def main() -> int:
    slabs = int(sys.argv[1])
    valve = _lib.load()
    if not valve.attach(10_000):
        print(f"the agent does not let this process in: {valve.last_error()}", file=sys.stderr)
        return 1
    valve.busy()
    arena = valve.arena_open(0, 5_000)
    held: set[int] = set()
    valve.want(min(slabs, arena.slabs), True)
    deadline = time.monotonic() + WAIT_S
    while len(held) < slabs and time.monotonic() < deadline:
        while (event := valve.poll()) is not None:
            kind, slab = event
            if kind == _lib.GRANTED:
                held.add(slab)
        time.sleep(0.001)
    time.sleep(HOLD_S)
    print(len(held), flush=True)
    valve.want(0, False)
    for slab in held:
        valve.give_back(slab)
    valve.idle(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
