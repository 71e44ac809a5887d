# SPDX-License-Identifier: Apache-2.0
"""The API of Valve: the models of its custom resources, the names it uses, units and settings.

The lowest layer: every other part may import it, it imports none. The names below are
loaded when first used, so that a process which needs only `EffectiveSettings` or the
constants does not pay for pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from valve_api.errors import ApiError, PolicyError, Problem, UnitError
    from valve_api.load import load_policy, parse_policy, policy_from
    from valve_api.names import Workload
    from valve_api.policy import ColocationPolicy
    from valve_api.quantity import Duration, Quantity, Share
    from valve_api.settings import EffectiveSettings, ReservationSettings, settings_for

_HOME = {
    "ApiError": "errors",
    "PolicyError": "errors",
    "Problem": "errors",
    "UnitError": "errors",
    "load_policy": "load",
    "parse_policy": "load",
    "policy_from": "load",
    "Workload": "names",
    "ColocationPolicy": "policy",
    "Duration": "quantity",
    "Quantity": "quantity",
    "Share": "quantity",
    "EffectiveSettings": "settings",
    "ReservationSettings": "settings",
    "settings_for": "settings",
}

__all__ = [
    "ApiError",
    "ColocationPolicy",
    "Duration",
    "EffectiveSettings",
    "PolicyError",
    "Problem",
    "Quantity",
    "ReservationSettings",
    "Share",
    "UnitError",
    "Workload",
    "load_policy",
    "parse_policy",
    "policy_from",
    "settings_for",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
