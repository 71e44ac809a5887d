# SPDX-License-Identifier: Apache-2.0
"""How patient the plugin is: the defaults are the product's, each is a flag of main."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. `help` of each field is the flag's."""

    stand: float = field(default=10.0, metadata={"help": "how long more must be lendable before it is lent"})
    grace: float = field(default=30.0, metadata={"help": "how long the agent may be silent"})
    gone_after: float = field(
        default=3.0, metadata={"help": "how long the kubelet must not list a container that it has listed"}
    )
    release_after: float = field(
        default=30.0, metadata={"help": "how long it must not list one that it never has"}
    )
    settle: float = field(
        default=60.0, metadata={"help": "after a kubelet's start, nothing counts as gone for so long"}
    )
    listen: float = field(
        default=20.0, metadata={"help": "register again if the kubelet has not listened for so long"}
    )
