# SPDX-License-Identifier: Apache-2.0
"""Which device an engine computes on, and whether it is the one that this process's agent serves.

Why it exists: memory of the arena is what the agent's device has: a host file on `cpu`, device memory on
`nvidia`. An engine that computes elsewhere would get memory that it cannot use, and an agent could neither
pause it nor account for it.

Threading: the thread that allocates the KV cache. torch is imported when needed, never before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from valve_runtime.elastic import ArenaRefused, EngineUnsupported

ENGINE_DEVICES = {"cpu": "cpu", "nvidia": "cuda"}
"""What torch calls the device of an agent."""


def mismatch(agent: str, engine: str) -> str:
    """Why an engine on torch device type `engine` cannot live with an agent of device `agent`; "" if it can.

    `agent` is "" while no agent has answered: nothing can be said then, and whoever opens the arena will.
    """
    if agent == "" or ENGINE_DEVICES.get(agent) == engine:
        return ""
    wanted = {"cuda": "nvidia", "cpu": "cpu"}.get(engine)
    if wanted is None:
        return (
            f"the engine computes on {engine}, which Valve does not manage: "
            "run it on cpu or cuda, or without Valve"
        )
    return (
        f"the engine computes on {engine}, but the agent of this machine serves the {agent} device: "
        f"start the agent with `valve agent --device {wanted}`, or run the engine on "
        f"{ENGINE_DEVICES.get(agent, agent)}"
    )


def await_agent(valve: Any, engine: str, timeout_ms: int) -> None:
    """Wait for the agent of this process (`valve`: _lib.Valve), and see that it serves the engine's device.
    Raises ArenaRefused if it does not answer, EngineUnsupported."""
    if not valve.attach(timeout_ms):
        raise ArenaRefused("the agent does not answer; is `valve agent` running?")
    why_not = mismatch(valve.device(), engine)
    if why_not:
        raise EngineUnsupported(why_not)


@contextmanager
def current(device: Any) -> Iterator[None]:
    """Make `device` (a torch.device) the one whose context libvalve finds in this thread.

    The arena of a GPU lies in the thread's current CUDA context. A thread that has only said which device
    it means has none yet: torch's guard does not bind one, the first call that needs it does.
    """
    if device.type != "cuda":
        yield
        return
    import torch

    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        yield
