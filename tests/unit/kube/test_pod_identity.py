# SPDX-License-Identifier: Apache-2.0
"""A process's tenant is the container it runs in; its role and limit are what the kubelet allocated."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from kubelet_stand_in import Node

from valve_agent.identity import IdentityError, Peer
from valve_agent.kube import containers as containers_module
from valve_agent.kube.allocation import Allocation
from valve_agent.kube.containers import Containers
from valve_agent.kube.identity import PodIdentity
from valve_agent.kube.ledger import LedgerError
from valve_agent.registry import Process, Registry, Scan, Tenant
from valve_agent.wire import RejectCode, Role
from valve_api.container import ContainerName, Listing
from valve_api.names import RESOURCE_OFFLINE_MEMORY as OFFLINE
from valve_api.names import RESOURCE_ONLINE_GPU
from valve_kubelet.podresources import NoListError

GIB = 1 << 30
UID = "8f1c2d3e-0a1b-4c2d-9e3f-112233445566"
UID2 = "9f1c2d3e-0a1b-4c2d-9e3f-112233445566"
ID, ID2 = "0123456789abcdef" * 4, "fedcba9876543210" * 4
JOB, SERVE = ContainerName("batch", "job-1", "main"), ContainerName("serve", "vllm-0", "engine")


class Kubelet:
    """A Lister whose answers the test sets."""

    def __init__(self) -> None:
        self.allocations = {JOB: Allocation(0, 2), SERVE: Allocation(1, 0)}
        self.error = ""

    def listing(self) -> Listing:
        if self.error:
            raise NoListError(self.error)
        found: dict[tuple[str, ContainerName], frozenset[str]] = {}
        for name, has in self.allocations.items():
            for resource, count in ((RESOURCE_ONLINE_GPU, has.online_seats), (OFFLINE, has.offline_units)):
                if count:
                    found[resource, name] = frozenset(f"id-{number}" for number in range(count))
        return found


class Setup:
    def __init__(self, root: Path) -> None:
        self.node, self.kubelet, self.registry = Node(root), Kubelet(), Registry()
        self.containers = Containers(self.kubelet, logs=self.node.logs, cgroups=self.node.cgroups)
        self.slab_bytes = 1 << 28
        self.identity = PodIdentity(
            self.registry,
            self.containers,
            lambda role, limit: 64 if role == Role.ONLINE else limit // self.slab_bytes,
            own_uid=os.getuid(),
            proc=self.node.proc,
        )
        self.registry.offline_roots = self.identity.offline_roots

    def start_job(self, pid: int = 4242, uid: str = UID, container_id: str = ID) -> None:
        self.node.link("batch", "job-1", "main", uid, container_id)
        self.node.run(uid, container_id, pid)
        self.containers.look()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def attach(setup: Setup, pid: int) -> Process:
    process = Process(pid, -1, setup.identity.tenant_of(pid), "python")
    setup.registry.processes[pid] = process
    return process


def refused(setup: Setup, pid: int) -> str:
    with pytest.raises(IdentityError) as error:
        setup.identity.tenant_of(pid)
    assert error.value.code == RejectCode.EIDENTITY, "a runtime tries again"
    return str(error.value)


def test_role_limit_name_and_labels_come_from_the_allocation(setup: Setup) -> None:
    setup.start_job()
    setup.node.link("serve", "vllm-0", "engine", UID2, ID2)
    setup.node.run(UID2, ID2, 5000)
    setup.containers.look()
    job, serve = setup.identity.tenant_of(4242), setup.identity.tenant_of(5000)
    assert (job.name, job.role, job.limit_slabs) == ("batch/job-1", Role.OFFLINE, 8)
    assert job.labels == {"namespace": "batch", "pod": "job-1", "container": "main"}
    assert (serve.name, serve.role, serve.limit_slabs) == ("serve/vllm-0", Role.ONLINE, 64)
    assert setup.identity.tenant_of(4242) is job


def test_two_containers_of_one_pod_are_two_tenants(setup: Setup) -> None:
    setup.kubelet.allocations[ContainerName("batch", "job-1", "second")] = Allocation(0, 1)
    setup.start_job()
    assert setup.identity.tenant_of(4242).name == "batch/job-1/main"


def test_new_settings_change_the_limits(setup: Setup) -> None:
    setup.start_job()
    tenant = setup.identity.tenant_of(4242)
    setup.slab_bytes = 1 << 30
    setup.identity.sync()
    assert tenant.limit_slabs == 2


def test_a_process_of_no_pod_is_refused(setup: Setup) -> None:
    (setup.node.proc / "77").mkdir()
    (setup.node.proc / "77" / "cgroup").write_text("0::/user.slice\n")
    assert "valve agent --policy" in refused(setup, 77)


def test_nobody_registers_a_tenant_here_not_even_root(setup: Setup) -> None:
    assert not setup.identity.may_register(Peer(1, 0, -1))


def test_a_container_that_the_kubelet_has_not_linked_yet_is_asked_to_come_again(setup: Setup) -> None:
    """Between the start of a process and its link lie some milliseconds."""
    setup.node.run(UID, ID, 4242)
    setup.containers.look()
    assert "not known yet" in refused(setup, 4242)
    setup.start_job()
    assert setup.identity.tenant_of(4242).name == "batch/job-1"


def test_a_pod_without_valves_resources_is_refused(setup: Setup) -> None:
    del setup.kubelet.allocations[JOB]
    setup.start_job()
    assert "annotate the pod with valve.io/workload: online or offline" in refused(setup, 4242)


def test_a_container_with_both_resources_is_refused_for_good(setup: Setup) -> None:
    setup.kubelet.allocations[JOB] = Allocation(1, 1)
    setup.start_job()
    with pytest.raises(IdentityError, match="request one of them") as error:
        setup.identity.tenant_of(4242)
    assert error.value.code == RejectCode.EROLE


def test_a_silent_kubelet_changes_nothing_for_whom_it_has_spoken_of(setup: Setup) -> None:
    setup.start_job()
    setup.kubelet.error = "no answer"
    setup.containers.look()
    assert setup.identity.tenant_of(4242).limit_slabs == 8
    setup.node.link("new", "pod", "c", UID2, ID2)
    setup.node.run(UID2, ID2, 5000)
    setup.containers.look()
    assert "the kubelet does not answer: no answer" in refused(setup, 5000)


def test_a_container_restart_is_the_same_tenant(setup: Setup) -> None:
    setup.start_job()
    before = setup.identity.tenant_of(4242)
    (setup.node.logs / "containers" / f"job-1_batch_main-{ID}.log").unlink()
    setup.start_job(4300, container_id=ID2)
    assert setup.identity.tenant_of(4300) is before


def test_a_pod_made_again_under_its_name_is_another_tenant(setup: Setup) -> None:
    setup.start_job()
    before = attach(setup, 4242).tenant
    setup.start_job(4300, uid=UID2, container_id=ID2)
    after = setup.identity.tenant_of(4300)
    assert after is not before
    assert after.name != before.name


def test_tenants_stand_while_their_container_or_their_processes_do(setup: Setup) -> None:
    setup.start_job()
    setup.identity.sync()
    (tenant,) = setup.registry.tenants.values()
    process = attach(setup, 4242)
    assert process.tenant is tenant
    (setup.node.logs / "containers" / f"job-1_batch_main-{ID}.log").unlink()
    setup.containers.look()
    setup.identity.sync()
    assert list(setup.registry.tenants.values()) == [tenant], "its process still holds memory"
    setup.registry.process_gone(process)
    setup.identity.sync()
    assert setup.registry.tenants == {}


def scanned(registry: Registry) -> set[int]:
    scan = Scan()
    scan.update(registry)
    found = set(scan.found)
    scan.close()
    return found


def test_the_scan_finds_what_never_connected(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without libvalve in an offline pod computes too, and so do its children."""
    monkeypatch.setattr(containers_module, "YOUNG_S", 0.0)
    process = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        setup.start_job(process.pid)
        setup.node.run(UID, ID, process.pid, child)
        setup.containers.look()
        assert set(setup.identity.offline_roots()) == {process.pid}, "the child is found from it"
        assert {process.pid, child} <= scanned(setup.registry)
        setup.kubelet.allocations[JOB] = Allocation(1, 0)
        setup.containers.look()
        assert scanned(setup.registry) == set(), "an online pod's processes are nobody's to stop"
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_container_that_is_still_being_made_is_left_alone(setup: Setup) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        setup.start_job(process.pid)
        assert set(setup.identity.offline_roots()) == set()
    finally:
        process.kill()
        process.wait()


def test_an_unknown_process_makes_the_next_look_come_at_once(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    seen = threading.Event()
    slow = Containers(
        setup.kubelet, logs=setup.node.logs, cgroups=setup.node.cgroups, look_s=3600, changed=seen.set
    )
    identity: PodIdentity = PodIdentity(
        setup.registry, slow, lambda role, limit: 1, own_uid=0, proc=setup.node.proc
    )
    slow.start()
    try:
        deadline = time.monotonic() + 30
        while slow.view.looks == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        setup.node.link("batch", "job-1", "main", UID, ID)
        setup.node.run(UID, ID, 4242)
        seen.clear()
        with pytest.raises(IdentityError):
            identity.tenant_of(4242)
        assert seen.wait(30), "it slept on"
        tenant: Tenant = identity.tenant_of(4242)
        assert tenant.name == "batch/job-1"
    finally:
        slow.close()


class Book:
    """A ledger that says what the test says."""

    def __init__(self, gpus: dict[ContainerName, tuple[str, ...]]) -> None:
        self.gpus = gpus
        self.error = ""

    def read(self) -> dict[ContainerName, tuple[str, ...]]:
        if self.error:
            raise LedgerError(self.error)
        return self.gpus


def test_on_a_node_of_several_gpus_a_container_is_a_tenant_where_the_ledger_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers_module, "YOUNG_S", 0.0)
    setup = Setup(tmp_path)
    book = Book({SERVE: ("GPU-a", "GPU-b")})
    setup.containers.ledger = book  # type: ignore[assignment]
    registries = [Registry(), Registry()]
    first, second = (
        PodIdentity(
            registry, setup.containers, lambda _role, _limit: 8, own_uid=os.getuid(), device=device,
            proc=setup.node.proc,
        )
        for registry, device in zip(registries, ("GPU-a", "GPU-b"), strict=True)
    )  # fmt: skip
    setup.node.link("serve", "vllm-0", "engine", UID2, ID2)
    setup.node.run(UID2, ID2, 5000)
    setup.start_job()
    assert (first.serves(4242), second.serves(4242)) == (False, False), "the ledger does not know the job yet"
    with pytest.raises(IdentityError, match="on a GPU that the agent does not know yet"):
        first.tenant_of(4242)
    book.gpus = {**book.gpus, JOB: ("GPU-b",)}
    setup.containers.look()
    assert (first.serves(4242), second.serves(4242)) == (False, True)
    with pytest.raises(IdentityError, match="is on GPU-b, not on GPU-a"):
        first.tenant_of(4242)
    assert (first.serves(5000), second.serves(5000)) == (True, True), "an online pod with two seats"
    for identity in (first, second):
        identity.sync()
    names = [{tenant.name for tenant in registry.tenants.values()} for registry in registries]
    assert names == [{"serve/vllm-0"}, {"serve/vllm-0", "batch/job-1"}]
    assert (list(first.offline_roots()), list(second.offline_roots())) == ([], [4242])
    book.error = "no socket"
    setup.containers.look()
    assert second.serves(4242), "what the ledger said before is in force"
    assert setup.containers.view.error == "no socket"


def test_to_ask_whether_a_process_is_served_changes_nothing(setup: Setup) -> None:
    setup.start_job()
    looks = setup.containers.view.looks
    assert (setup.identity.serves(4242), setup.identity.serves(1)) == (True, False)
    setup.kubelet.allocations[JOB] = Allocation(1, 2)
    setup.containers.look()
    assert not setup.identity.serves(4242), "it has both kinds, so it is no tenant"
    del setup.kubelet.allocations[JOB]
    setup.containers.look()
    assert not setup.identity.serves(4242)
    assert (dict(setup.registry.tenants), setup.containers.view.looks) == ({}, looks + 2)
    assert not setup.containers._wake.is_set(), "the kubelet is not asked again for it"
