# SPDX-License-Identifier: Apache-2.0
"""Writes what is derived from the models: crds/*.yaml, their copies in the chart, and docs/policy.md.

    python -m valve_api.generate            write the files
    python -m valve_api.generate --check    exit 1 and name the files that are out of date

Run by developers after a change of a model; CI runs the check. Needs a checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from valve_api import names
from valve_api.model import ApiModel
from valve_api.node import ColocationNode
from valve_api.policy import ColocationPolicy
from valve_api.reference import policy_reference
from valve_api.schema import Schema, root_schema

HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Generated from the models in crds/valve_api by `python -m valve_api.generate`; do not edit.
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `kubectl get`. wide: only with -o wide."""

    name: str
    path: str
    type: str = "string"
    wide: bool = False
    description: str = ""


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind and what the API server must know of it beyond its schema."""

    model: type[ApiModel]
    kind: str
    plural: str
    short: str
    columns: tuple[Column, ...]


RESOURCES = (
    Resource(
        ColocationPolicy,
        names.KIND_POLICY,
        names.PLURAL_POLICY,
        names.SHORT_POLICY,
        (
            Column("Ready", '.status.conditions[?(@.type=="Ready")].status'),
            Column("Nodes", ".status.nodes", "integer"),
            Column("Current", ".status.readyNodes", "integer", description="Nodes that follow the policy."),
            Column("GPUs", ".status.gpus", "integer"),
            Column("P99 us", ".status.worstP99Us", "integer", description="Worst p99 preemption latency."),
            Column("Preemptions", ".status.preemptions", "integer"),
            Column("Reclaims", ".status.reclaims", "integer"),
            Column("Priority", ".spec.priority", "integer", wide=True),
            Column("Route", ".spec.compute.route", wide=True),
            Column("Slab", ".spec.memory.slabSize", wide=True),
            Column("Reason", '.status.conditions[?(@.type=="Ready")].message', wide=True),
            Column("Age", ".metadata.creationTimestamp", "date"),
        ),
    ),
    Resource(
        ColocationNode,
        names.KIND_NODE,
        names.PLURAL_NODE,
        names.SHORT_NODE,
        (
            Column("Ready", '.status.conditions[?(@.type=="Ready")].status'),
            Column("Policy", ".spec.policy.name"),
            Column("GPUs", ".status.gpuCount", "integer"),
            Column("Online", ".status.onlineTenants", "integer"),
            Column("Offline", ".status.offlineTenants", "integer"),
            Column("P99 us", ".status.worstP99Us", "integer", description="Worst p99 preemption latency."),
            Column("Degraded", '.status.conditions[?(@.type=="Degraded")].status', wide=True),
            Column("Agent", ".status.agentVersion", wide=True),
            Column("Age", ".metadata.creationTimestamp", "date"),
        ),
    ),
)


def crd(resource: Resource) -> Schema:
    """The CustomResourceDefinition of a kind."""
    columns: list[dict[str, Any]] = []
    for column in resource.columns:
        entry: dict[str, Any] = {"name": column.name, "type": column.type, "jsonPath": column.path}
        if column.description:
            entry["description"] = column.description
        if column.wide:
            entry["priority"] = 1
        columns.append(entry)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Cluster",
            "names": {
                "kind": resource.kind,
                "listKind": f"{resource.kind}List",
                "plural": resource.plural,
                "singular": resource.kind.lower(),
                "shortNames": [resource.short],
                "categories": [names.CATEGORY],
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": root_schema(resource.model)},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """SafeDumper without anchors: a reader of a CRD should not have to follow them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def crd_yaml(resource: Resource) -> str:
    """The committed form of a CRD."""
    body = yaml.dump(crd(resource), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
    return f"{HEADER}{body}"


def outputs() -> dict[str, str]:
    """Every derived file, by its path in the repository."""
    files = {
        f"{folder}/{names.GROUP}_{resource.plural}.yaml": crd_yaml(resource)
        for resource in RESOURCES
        for folder in ("crds", "charts/valve/files/crds")  # Helm reads no file outside its chart
    }
    files["docs/policy.md"] = policy_reference()
    return files


def stale(root: Path) -> list[str]:
    """Derived files below `root` that differ from the models or are missing."""
    found = []
    for path, text in outputs().items():
        file = root / path
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            found.append(path)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 files are stale, 2 no checkout."""
    parser = argparse.ArgumentParser(prog="python -m valve_api.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parents[2],
        help="the repository (default: ours)",
    )
    options = parser.parse_args(arguments)
    if not (options.root / "pyproject.toml").is_file():
        print(f"{options.root} is no checkout of valve; name one with --root", file=sys.stderr)
        return 2
    changed = stale(options.root)
    if options.check:
        for path in changed:
            print(f"{path} is out of date; run python -m valve_api.generate", file=sys.stderr)
        return 1 if changed else 0
    for path, text in outputs().items():
        (options.root / path).parent.mkdir(parents=True, exist_ok=True)
        (options.root / path).write_text(text, encoding="utf-8")
    print("\n".join(f"wrote {path}" for path in changed) or "everything is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
