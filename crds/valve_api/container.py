# SPDX-License-Identifier: Apache-2.0
"""A container as Kubernetes names it: who owns what, the same for the agent, the plugin and the kubelet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ContainerName:
    namespace: str
    pod: str
    container: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}/{self.container}"


Listing = Mapping[tuple[str, ContainerName], frozenset[str]]
"""(resource, container) -> its ids: what the kubelet's pod-resources list says"""
