# SPDX-License-Identifier: Apache-2.0
"""The shipped examples load, and a policy becomes exact integers for each device."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_api import EffectiveSettings, PolicyError, load_policy, policy_from, settings_for
from valve_api.names import ARENA_SLABS_MAX, DEVICE_SLABS_MAX, DEVICE_SLABS_MIN
from valve_api.policy import PolicySpec

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
MI, GI = 1 << 20, 1 << 30
MS, S = 10**6, 10**9


def policy_with(**spec: Any) -> Any:
    """The whole GPU is the pool, unless the case says otherwise."""
    spec["memory"] = {"pool": "100%", **spec.get("memory", {})}
    return policy_from(
        {
            "apiVersion": "valve.io/v1alpha1",
            "kind": "ColocationPolicy",
            "metadata": {"name": "test"},
            "spec": spec,
        }
    )


def test_every_example_policy_loads() -> None:
    found = [EXAMPLES / "demo.yaml", *sorted(EXAMPLES.glob("policy*.yaml"))]
    assert len(found) >= 3
    for path in found:
        policy = load_policy(path)
        settings_for(policy, None if policy.spec.cpu_device else 80 * GI)


def test_demo_is_a_small_cpu_device_that_reclaims_often() -> None:
    settings = settings_for(load_policy(EXAMPLES / "demo.yaml"))
    assert settings.device_bytes == 1280 * MI
    assert settings.slab_bytes == 2 * MI
    assert settings.slabs == 640
    assert settings.reservation.min_slabs <= 2
    assert settings.reservation.quiet_ns <= 2 * S
    assert settings.offline_default_bytes == settings.device_bytes


def test_policy_example_writes_out_the_defaults() -> None:
    """It says so in its first lines."""
    shipped = load_policy(EXAMPLES / "policy.yaml").spec
    assert shipped.model_copy(update={"node_selector": {}}) == PolicySpec()


DEVICES = [
    # description, device bytes, slabs, reservation (min, max, decrease), default limit in slabs
    ("80 GiB in whole slabs", 80 * GI, 2560, (52, 1280, 26), 1280),
    ("a device that is no multiple of the slab loses the rest", 80 * GI + 5 * MI, 2560, (52, 1280, 26), 1280),
    ("141 GiB: more slabs than one tenant can map", 141 * GI, 4512, (91, 2256, 46), 2256),
    ("the smallest device: at least one slab each", 256 * MI, 8, (1, 4, 1), 4),
]


@pytest.mark.parametrize(
    ("case", "device", "slabs", "reservation", "default"), DEVICES, ids=[c[0] for c in DEVICES]
)
def test_defaults_on_a_device(
    case: str, device: int, slabs: int, reservation: tuple[int, int, int], default: int
) -> None:
    settings = settings_for(policy_with(), device)
    assert settings.slabs == slabs, case
    assert settings.device_bytes == slabs * 32 * MI <= device
    assert settings.arena_slabs == min(slabs, ARENA_SLABS_MAX)
    kept = settings.reservation
    assert (kept.min_slabs, kept.max_slabs, kept.decrease_slabs) == reservation
    assert settings.offline_default_bytes == default * 32 * MI


def test_every_default_arrives() -> None:
    settings = settings_for(policy_with(), 80 * GI)
    assert dataclasses.asdict(settings) | {"reservation": None} == {
        "policy": "test",
        "device_bytes": 80 * GI,
        "slab_bytes": 32 * MI,
        "slabs": 2560,
        "arena_slabs": 2560,
        "lease_ns": 500 * MS,
        "recovery_grace_ns": 2 * S,
        "pause_timeout_ns": 1 * S,
        "cooldown_factor": 2.0,
        "cooldown_min_ns": 5 * MS,
        "cooldown_max_ns": 500 * MS,
        "reservation": None,
        "online_floor_slabs": 0,
        "offline_default_bytes": 40 * GI,
        "offline_max_processes": 16,
        "unknown_processes": "Report",
        "route": "auto",
        "max_reclaims_per_minute": 60,
    }


CHANGES: list[tuple[str, dict[str, Any], str, object]] = [
    ("lease, cut to milliseconds", {"compute": {"lease": "20500us"}}, "lease_ns", 20 * MS),
    ("recovery grace", {"compute": {"recoveryGrace": "1m"}}, "recovery_grace_ns", 60 * S),
    ("route", {"compute": {"route": "launch-gate"}}, "route", "launch-gate"),
    ("cooldown factor", {"compute": {"cooldown": {"factor": 3}}}, "cooldown_factor", 3.0),
    ("cooldown min", {"compute": {"cooldown": {"min": "0s"}}}, "cooldown_min_ns", 0),
    ("cooldown max", {"compute": {"cooldown": {"max": "1m"}}}, "cooldown_max_ns", 60 * S),
    ("slab", {"memory": {"slabSize": "1Gi"}}, "slabs", 80),
    ("floor, rounded up", {"memory": {"onlineFloor": "33Mi"}}, "online_floor_slabs", 2),
    ("floor in percent", {"memory": {"onlineFloor": "50%"}}, "online_floor_slabs", 1280),
    ("default, rounded down", {"offline": {"defaultMemory": "33Mi"}}, "offline_default_bytes", 32 * MI),
    ("default above device", {"offline": {"defaultMemory": "1Ti"}}, "offline_default_bytes", 80 * GI),
    ("processes", {"offline": {"maxProcesses": 2}}, "offline_max_processes", 2),
    ("unknown", {"guardrails": {"unknownProcesses": "Refuse"}}, "unknown_processes", "Refuse"),
    ("reclaims", {"guardrails": {"maxReclaimsPerMinute": 7}}, "max_reclaims_per_minute", 7),
    ("pause", {"guardrails": {"pauseTimeout": "10ms"}}, "pause_timeout_ns", 10 * MS),
    ("min, rounded up", {"memory": {"reservation": {"min": "33Mi"}}}, "reservation.min_slabs", 2),
    ("min of nothing", {"memory": {"reservation": {"min": 0}}}, "reservation.min_slabs", 1),
    ("pool, a share", {"memory": {"pool": "60%"}}, "slabs", 1536),
    ("pool, bytes", {"memory": {"pool": "10Gi"}}, "slabs", 320),
    ("max", {"memory": {"reservation": {"max": "100%"}}}, "reservation.max_slabs", 2560),
    ("factor", {"memory": {"reservation": {"factor": 1.5}}}, "reservation.factor", 1.5),
    ("decrease, rounded up", {"memory": {"reservation": {"decrease": 1}}}, "reservation.decrease_slabs", 1),
    ("quiet period", {"memory": {"reservation": {"quietPeriod": "1m30s"}}}, "reservation.quiet_ns", 90 * S),
]


@pytest.mark.parametrize(("case", "spec", "field", "value"), CHANGES, ids=[c[0] for c in CHANGES])
def test_a_field_of_the_policy_reaches_the_settings(
    case: str, spec: dict[str, Any], field: str, value: object
) -> None:
    found: Any = settings_for(policy_with(**spec), 80 * GI)
    before: Any = settings_for(policy_with(), 80 * GI)
    for step in field.split("."):
        found, before = getattr(found, step), getattr(before, step)
    assert found == value, case
    assert found != before, "the case shows nothing"


UNFIT: list[tuple[str, dict[str, Any], int | None, str]] = [
    ("no device at all", {}, None, "spec.cpuDevice: missing: the cpu device needs spec.cpuDevice.memory"),
    ("a device of 7 slabs", {}, 7 * 32 * MI, "into 7 slabs; 8 to 65536 are allowed"),
    ("a device of too many slabs", {"memory": {"slabSize": "2Mi"}}, 256 * GI, "into 131072 slabs"),
    ("a pool beyond the GPU", {"memory": {"pool": "81Gi"}}, 80 * GI, "spec.memory.pool: 81Gi: larger than"),
    ("min above max here", {"memory": {"reservation": {"min": "50Gi"}}}, 80 * GI, "larger than max (50%)"),
    ("a reservation beyond the device", {"memory": {"reservation": {"max": "1Ti"}}}, 80 * GI, "has 80Gi"),
    ("a floor of the whole device", {"memory": {"onlineFloor": "80Gi"}}, 80 * GI, "leaves offline no slab"),
    ("a default below a slab", {"offline": {"defaultMemory": "1%"}}, 256 * MI, "smaller than one slab"),
]


@pytest.mark.parametrize(("case", "spec", "device", "says"), UNFIT, ids=[c[0] for c in UNFIT])
def test_a_device_that_the_policy_does_not_fit(
    case: str, spec: dict[str, Any], device: int | None, says: str
) -> None:
    with pytest.raises(PolicyError) as refusal:
        settings_for(policy_with(**spec), device)
    assert says in str(refusal.value), case
    assert str(refusal.value).startswith("policy test is refused")


def test_a_file_whose_own_device_does_not_fit_is_named() -> None:
    spec = {"cpuDevice": {"memory": "256Mi"}, "offline": {"defaultMemory": "1Mi"}}
    document = {"apiVersion": "valve.io/v1alpha1", "kind": "ColocationPolicy", "metadata": {"name": "x"}}
    with pytest.raises(PolicyError, match=r"^here\.yaml is refused"):
        policy_from({**document, "spec": spec}, "here.yaml")


@given(
    device=st.integers(DEVICE_SLABS_MIN * 2 * MI, 300 * GI),
    slab=st.integers(1, 512),
    low=st.integers(0, 100),
    high=st.integers(0, 100),
    step=st.integers(1, 100),
    floor=st.integers(0, 100),
)
def test_settings_are_consistent_on_every_device(
    device: int, slab: int, low: int, high: int, step: int, floor: int
) -> None:
    memory = {
        "slabSize": slab * 2 * MI,
        "reservation": {"min": f"{min(low, high)}%", "max": f"{max(low, high)}%", "decrease": f"{step}%"},
        "onlineFloor": f"{floor}%",
    }
    try:
        settings = settings_for(policy_with(memory=memory), device)
    except PolicyError:
        slabs = device // (slab * 2 * MI)
        assert not DEVICE_SLABS_MIN <= slabs <= DEVICE_SLABS_MAX or slabs * floor > 100 * (slabs - 1)
        return
    assert settings.slabs * settings.slab_bytes == settings.device_bytes <= device
    assert DEVICE_SLABS_MIN <= settings.slabs <= DEVICE_SLABS_MAX
    kept = settings.reservation
    assert 1 <= kept.min_slabs <= kept.max_slabs <= settings.slabs
    assert kept.decrease_slabs >= 1
    assert kept.min_slabs * 100 >= min(low, high) * settings.slabs, "never less than was asked for"
    assert 0 <= settings.online_floor_slabs < settings.slabs
    assert settings.slab_bytes <= settings.offline_default_bytes <= settings.device_bytes
    assert settings.offline_default_bytes % settings.slab_bytes == 0


def test_settings_hold_nothing_but_plain_values() -> None:
    """No int subclass: arithmetic and formatting on the agent's paths must be the plain ones."""
    settings = settings_for(load_policy(EXAMPLES / "demo.yaml"))
    values = {**dataclasses.asdict(settings), **dataclasses.asdict(settings.reservation)}
    del values["reservation"]
    assert {type(value) for value in values.values()} <= {int, float, str}


def test_settings_are_immutable() -> None:
    settings = settings_for(load_policy(EXAMPLES / "demo.yaml"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.slabs = 1  # type: ignore[misc]
    assert isinstance(hash(settings), int)
    assert isinstance(settings, EffectiveSettings)


def test_settings_and_names_need_no_pydantic() -> None:
    """The gate process imports them and must stay small."""
    program = (
        "import sys, valve_api, valve_api.settings, valve_api.names, valve_api.quantity\n"
        "from valve_api import EffectiveSettings, Workload, PolicyError\n"
        "sys.exit(' '.join(m for m in ('pydantic', 'pydantic_core', 'yaml') if m in sys.modules) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"imported: {done.stderr}"
