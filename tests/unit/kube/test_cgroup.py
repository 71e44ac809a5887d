# SPDX-License-Identifier: Apache-2.0
"""Which pod a process is in: every form of path that kubelets and runtimes make, and what must not pass."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from valve_agent.kube import cgroup
from valve_agent.kube.cgroup import NotInPod, PodCgroup

UID = "8f1c2d3e-0a1b-4c2d-9e3f-112233445566"
UID_ = UID.replace("-", "_")
ID = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
POD = PodCgroup(UID, ID)

V1 = """\
12:pids:{path}
11:memory:{path}
10:cpu,cpuacct:{path}
9:name=systemd:{path}
8:misc:/
0::/
"""

PATHS = [
    ("systemd v2, guaranteed", f"/kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope"),
    (
        "systemd v2, burstable",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/cri-containerd-{ID}.scope",
    ),
    (
        "systemd, CRI-O",
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice/crio-{ID}.scope",
    ),
    (
        "CRI-O with a cgroup of its own inside the scope",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/crio-{ID}.scope/container",
    ),
    (
        "systemd, cri-dockerd",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/docker-{ID}.scope",
    ),
    ("cgroupfs, guaranteed", f"/kubepods/pod{UID}/{ID}"),
    ("cgroupfs, burstable", f"/kubepods/burstable/pod{UID}/{ID}"),
    ("cgroupfs under --cgroup-root", f"/valve-e2e/kubepods/besteffort/pod{UID}/{ID}"),
    (
        "kubelet says systemd, containerd does not",
        f"/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{ID}",
    ),
    (
        "kind, systemd",
        "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/"
        f"kubelet-kubepods-burstable-pod{UID_}.slice/cri-containerd-{ID}.scope",
    ),
    ("kind, cgroupfs", f"/docker/{OTHER}/kubelet/kubepods/burstable/pod{UID}/{ID}"),
    ("seen from an agent with a cgroup namespace of its own", f"/../../besteffort/pod{UID}/{ID}"),
    ("a cgroup that the container made", f"/kubepods/burstable/pod{UID}/{ID}/inner/more"),
    (
        "a container that pretends to be another below its own",
        f"/kubepods/burstable/pod{UID}/{ID}/pod{UID.replace('8', '9')}/{OTHER}",
    ),
]


@pytest.mark.parametrize(("why", "path"), PATHS, ids=[why for why, _ in PATHS])
def test_a_path_of_a_pod(why: str, path: str) -> None:
    assert cgroup.of_path(path) == POD
    assert cgroup.of_lines(f"0::{path}\n") == POD, "v2"
    assert cgroup.of_lines(V1.format(path=path)) == POD, "v1"


def test_a_static_pod_has_a_hash_for_a_uid() -> None:
    found = cgroup.of_path(f"/kubepods/burstable/pod{'ab' * 16}/{ID}")
    assert found == PodCgroup("ab" * 16, ID)


@pytest.mark.parametrize(
    ("why", "text", "sentence"),
    [
        ("a service of the host", "0::/system.slice/ssh.service\n", "in no cgroup of a pod"),
        ("nothing at all", "", "in no cgroup of a pod"),
        ("the pod itself, no container", f"0::/kubepods/pod{UID}\n", "in no cgroup of a pod"),
        ("an id that is none", f"0::/kubepods/pod{UID}/{ID[:-1]}\n", "in no cgroup of a pod"),
        ("a name that only looks like it", f"0::/mypod{UID}x/{ID}\n", "in no cgroup of a pod"),
        ("a docker container", f"0::/docker/{ID}\n", "in no cgroup of a pod"),
        (
            "moved in one hierarchy only",
            f"2:pids:/kubepods/pod{UID}/{ID}\n1:memory:/kubepods/pod{UID}/{OTHER}\n",
            "different containers",
        ),
    ],
)
def test_what_is_no_pod(why: str, text: str, sentence: str) -> None:
    with pytest.raises(NotInPod, match=sentence):
        cgroup.of_lines(text, 7)


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(NotInPod, match="process 4 is gone"):
        cgroup.of_process(4, tmp_path)


@pytest.mark.parametrize("hierarchy", ["", "pids", "systemd"])
def test_the_folders_of_all_containers(tmp_path: Path, hierarchy: str) -> None:
    """v2 has one tree; v1 one per controller, of which the first that has pods is enough."""
    root = tmp_path / hierarchy
    uids = [UID.replace("8", digit) for digit in "765"]
    slice_ = f"kubepods-pod{uids[0].replace('-', '_')}.slice"
    split = f"kubepods-pod{uids[2].replace('-', '_')}.slice:cri-containerd:{ID}"
    folders = {
        PodCgroup(uids[0], ID): root / "kubepods.slice" / slice_ / f"cri-containerd-{ID}.scope",
        PodCgroup(uids[1], OTHER): root / "kubepods" / "burstable" / f"pod{uids[1]}" / OTHER,
        PodCgroup(uids[2], ID): root / "system.slice" / "containerd.service" / split,
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
    (root / "user.slice").mkdir()
    (root / "cgroup.procs").write_text("")
    assert cgroup.containers(tmp_path) == folders


def test_without_the_hosts_tree_every_process_is_asked(tmp_path: Path) -> None:
    """An agent in a container sees all processes (hostPID), but not all cgroup folders."""
    for pid, path in ((7, f"/kubepods/pod{UID}/{ID}"), (8, f"/kubepods/pod{UID}/{ID}/x"), (9, "/init.scope")):
        (tmp_path / "proc" / str(pid)).mkdir(parents=True)
        (tmp_path / "proc" / str(pid) / "cgroup").write_text(f"0::{path}\n")
    (tmp_path / "proc" / "self").mkdir()
    assert cgroup.members(tmp_path / "none", tmp_path / "proc") == {POD: {7, 8}}


def test_processes_of_a_folder_and_those_below_it(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "cgroup.procs").write_text("12\n0\n")
    (tmp_path / "inner" / "cgroup.procs").write_text("13\n")
    assert cgroup.processes(tmp_path) == {12, 13}
    assert cgroup.processes(tmp_path / "gone") == set()


HIERARCHY = Path("/sys/fs/cgroup/pids")


@pytest.mark.skipif(
    not os.access(HIERARCHY, os.W_OK) and not os.access("/sys/fs/cgroup/cgroup.procs", os.W_OK),
    reason="needs to make a cgroup: root, and /sys/fs/cgroup writable",
)
def test_a_real_process_in_a_real_cgroup() -> None:
    """The kernel's own file, for the version that this machine has."""
    top = HIERARCHY if HIERARCHY.is_dir() else Path("/sys/fs/cgroup")
    base = top / f"valve-test-{os.getpid()}"
    folder = base / "kubepods" / f"pod{UID}" / ID
    folder.mkdir(parents=True)
    process = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(NotInPod):
            cgroup.of_process(process.pid)
        (folder / "cgroup.procs").write_text(str(process.pid))
        assert cgroup.of_process(process.pid) == POD
        assert cgroup.containers()[POD] == folder
        assert cgroup.processes(folder) == {process.pid}
    finally:
        process.kill()
        process.wait()
        for path in (folder, folder.parent, folder.parent.parent, base):
            path.rmdir()
