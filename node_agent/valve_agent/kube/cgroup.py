# SPDX-License-Identifier: Apache-2.0
"""From a process to its pod, and from a pod to its processes, by control groups.

Why it exists: the kubelet puts every container into a cgroup whose path carries the pod's UID and the
container's id. The kernel says in which cgroup a process is; the process cannot say otherwise.

The paths differ by cgroup version (v1: one line per hierarchy; v2: the line `0::`), by the kubelet's driver
(`systemd`: slices and scopes; `cgroupfs`: plain folders), by runtime (containerd, CRI-O, cri-dockerd) and by
what stands around them (kind and nested kubelets, `--cgroup-root`, an agent in a cgroup namespace of its
own, which sees `/../../`). All have in common: one component that ends in `pod<UID>`, the next one the
container. The outermost such pair counts, so a container that may make cgroups inside its own cannot
pretend to be another.

Threading model: stateless reads. Callers: kube/identity.py (server thread), kube/containers.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UID = r"[0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_POD = re.compile(
    rf"(?:.*-)?pod(?P<uid>{_UID})(?:\.slice)?(?::(?P<runtime>[a-z0-9-]+):(?P<id>[0-9a-f]{{64}}))?"
)
"""`podUID`, `kubepods-burstable-podU_I_D.slice`, and `…slice:cri-containerd:ID`, which containerd makes where
the kubelet's driver is systemd and its own is not. 32 digits without dashes: a static pod."""
_CONTAINER = re.compile(r"(?:[a-z0-9]+-)*(?P<id>[0-9a-f]{64})(?:\.scope)?")
"""`ID`, `cri-containerd-ID.scope`, `crio-ID.scope`, `docker-ID.scope`."""
_DEPTH_MAX = 7
"""Folders between the root of the hierarchy and a pod's: three with systemd, two more in kind."""
_HIERARCHIES = ("", "unified", "pids", "memory", "cpu", "cpu,cpuacct", "systemd")
"""Where a pod's folders stand under /sys/fs/cgroup: at the top for v2, else in any controller's."""


@dataclass(frozen=True, slots=True)
class PodCgroup:
    """What a cgroup's path says. `uid` with dashes unless the pod is static; `container` is the runtime's id,
    64 hex digits."""

    uid: str
    container: str


class NotInPod(Exception):
    """The process is in no container of a pod, or its hierarchies contradict each other."""


def of_process(pid: int, proc: Path = Path("/proc")) -> PodCgroup:
    """Raises NotInPod, also for a process that is gone."""
    try:
        text = (proc / str(pid) / "cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotInPod(f"process {pid} is gone") from error
    return of_lines(text, pid)


def of_lines(text: str, pid: int = 0) -> PodCgroup:
    """The pod in the contents of /proc/PID/cgroup. Hierarchies that are not used for pods say nothing; two
    that name different containers are a process that was moved, and it is refused. Raises NotInPod."""
    found = {pod for line in text.splitlines() if (pod := of_path(line.split(":", 2)[-1])) is not None}
    if len(found) == 1:
        return found.pop()
    if found:
        named = ", ".join(sorted(f"pod {pod.uid} container {pod.container[:12]}" for pod in found))
        raise NotInPod(f"process {pid} is in cgroups of different containers: {named}")
    raise NotInPod(f"process {pid} is in no cgroup of a pod")


def of_path(path: str) -> PodCgroup | None:
    """The outermost pod and container of one cgroup path; None if there is none."""
    components = path.split("/")
    for index, component in enumerate(components):
        pod = _POD.fullmatch(component)
        if pod is None:
            continue
        uid = pod["uid"].replace("_", "-")
        if pod["id"]:
            return PodCgroup(uid, pod["id"])
        container = _CONTAINER.fullmatch(components[index + 1]) if index + 1 < len(components) else None
        return PodCgroup(uid, container["id"]) if container else None
    return None


def containers(root: Path = Path("/sys/fs/cgroup")) -> dict[PodCgroup, Path]:
    """Every pod container of this node: its cgroup -> its folder. Needs the host's hierarchy at `root`;
    reads a few hundred folders."""
    found: dict[PodCgroup, Path] = {}
    for name in _HIERARCHIES:  # leftovers of another runtime in one must not hide the pods of the next
        if (root / name / "cgroup.procs").exists():
            for pod, folder in _walk(root / name, 0):
                found.setdefault(pod, folder)
    return found


def _walk(folder: Path, depth: int) -> Iterator[tuple[PodCgroup, Path]]:
    for name in _folders(folder):
        pod = _POD.fullmatch(name)
        if pod is not None and pod["id"]:
            yield PodCgroup(pod["uid"].replace("_", "-"), pod["id"]), folder / name
        elif pod is not None:
            uid = pod["uid"].replace("_", "-")
            for child in _folders(folder / name):
                container = _CONTAINER.fullmatch(child)
                if container:
                    yield PodCgroup(uid, container["id"]), folder / name / child
        elif depth < _DEPTH_MAX:
            yield from _walk(folder / name, depth + 1)


def _folders(folder: Path) -> list[str]:
    """Folders in a folder; none when it went away between two looks."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def members(cgroups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> dict[PodCgroup, set[int]]:
    """Every container of this node -> its processes. By the cgroup folders where the host's are visible (a
    few hundred reads), else by asking every process (an agent in a container sees all of those)."""
    folders = containers(cgroups)
    if folders:
        return {place: processes(folder) for place, folder in folders.items()}
    found: dict[PodCgroup, set[int]] = {}
    for name in os.listdir(proc):
        if name.isdecimal():
            try:
                place = of_process(int(name), proc)
            except NotInPod:
                continue
            found.setdefault(place, set()).add(int(name))
    return found


def processes(folder: Path) -> set[int]:
    """Process ids in a cgroup and those below it; empty when it is gone. A process of another pid namespace
    reads as 0 and is left out: the agent needs the host's."""
    try:
        found = set(map(int, (folder / "cgroup.procs").read_text().split()))
    except OSError:  # gone, or (v2) a threaded group, whose processes its parent lists
        found = set()
    for name in _folders(folder):
        found |= processes(folder / name)
    found.discard(0)
    return found
