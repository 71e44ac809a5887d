# SPDX-License-Identifier: Apache-2.0
"""A kubelet's surroundings in a folder: pod-resources over gRPC, log links, cgroup folders, /proc files."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from valve_kubelet import calls
from valve_kubelet import podresources_pb2 as pr


class FakeKubelet:
    """Serves pod-resources List for what `pods` says now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls = 0
        self.pods: list[tuple[str, str, str, dict[str, list[str]]]] = []
        """(namespace, pod, container, resource name -> device ids)"""
        self.before_answer: Callable[[], None] = lambda: None
        self._server: grpc.Server | None = None

    def answer(
        self, _request: pr.ListPodResourcesRequest, _context: grpc.ServicerContext
    ) -> pr.ListPodResourcesResponse:
        self.calls += 1
        self.before_answer()
        response = pr.ListPodResourcesResponse()
        for namespace, pod, container, resources in self.pods:
            entry = response.pod_resources.add(namespace=namespace, name=pod)
            entry.containers.add(name="sidecar-without-devices")
            item = entry.containers.add(name=container)
            for resource, ids in resources.items():
                for one in ids:  # as a kubelet with topology does: an entry per device
                    item.devices.add(resource_name=resource, device_ids=[one])
        return response

    def start(self) -> None:
        """Listen; again after `stop`, as a kubelet that restarts."""
        self.path.unlink(missing_ok=True)
        service, method = calls.LIST_PODS.path.strip("/").split("/")
        handlers = {method: calls.unary(calls.LIST_PODS, self.answer)}
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Node:
    """Folders that look like a node's: `logs`, `cgroups`, `proc`."""

    def __init__(self, root: Path) -> None:
        self.logs, self.cgroups, self.proc = root / "log", root / "cgroup", root / "proc"
        (self.logs / "containers").mkdir(parents=True)
        self.cgroups.mkdir()
        (self.cgroups / "cgroup.procs").write_text("")
        self.proc.mkdir()

    def link(self, namespace: str, pod: str, container: str, uid: str, container_id: str) -> None:
        """What the kubelet does after it has started a container."""
        target = f"/var/log/pods/{namespace}_{pod}_{uid}/{container}/0.log"
        link = self.logs / "containers" / f"{pod}_{namespace}_{container}-{container_id}.log"
        link.symlink_to(target)

    def folder(self, uid: str, container_id: str) -> Path:
        return self.cgroups / "kubepods" / "burstable" / f"pod{uid}" / container_id

    def run(self, uid: str, container_id: str, *pids: int) -> None:
        """Processes in the container's cgroup."""
        folder = self.folder(uid, container_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        for pid in pids:
            (self.proc / str(pid)).mkdir(exist_ok=True)
            (self.proc / str(pid) / "cgroup").write_text(f"0::/kubepods/burstable/pod{uid}/{container_id}\n")
