# SPDX-License-Identifier: Apache-2.0
"""The ledger as one JSON object, `valve.io/allocations/v1`: what is on disk and what the agent reads.

Why it exists: one form for both; docs/architecture.md is its contract with the agent. A reader ignores fields
that it does not know; a file of another schema is refused, not guessed at.

Threading model: pure. Callers: state.py, store.py, install.py.

    DocumentError    not a document of this schema
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from valve_api.container import ContainerName
from valve_deviceplugin.allocator.ledger import Entry, Ledger
from valve_deviceplugin.allocator.placement import Gpu

SCHEMA = "valve.io/allocations/v1"


class DocumentError(ValueError):
    """The message says what is wrong with the document."""


def write(ledger: Ledger, gpus: Sequence[Gpu]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "revision": ledger.revision,
        "gpus": [{"id": gpu.id, "short": gpu.short, "memory_gib": gpu.units} for gpu in gpus],
        "allocations": [_entry(entry) for entry in ledger],
    }


def read(document: object) -> tuple[Ledger, list[Gpu]]:
    """The ledger and the GPUs as they were known (nothing lent). Raises DocumentError."""
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, Mapping) else type(document).__name__
        raise DocumentError(f"schema is {found!r}, not {SCHEMA}")
    try:
        gpus = [
            Gpu(str(gpu["id"]), str(gpu["short"]), int(gpu["memory_gib"]), 0, False)
            for gpu in document["gpus"]
        ]
        entries = [_read_entry(entry) for entry in document["allocations"]]
        return Ledger(entries, int(document["revision"])), gpus
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DocumentError(f"{SCHEMA}, but not whole: {error!r}") from error


def _entry(entry: Entry) -> dict[str, Any]:
    owner = entry.owner
    return {
        "id": entry.id,
        "resource": entry.resource,
        "gpus": list(entry.gpus),
        "memory_gib": entry.units,
        "owner": owner and {"namespace": owner.namespace, "pod": owner.pod, "container": owner.container},
        "device_ids": sorted(entry.tokens),
        "shortage_gib": entry.shortage,
        "library": entry.library,
        "allocated_at": entry.at_s,
    }


def _read_entry(entry: Mapping[str, Any]) -> Entry:
    owner = entry["owner"]
    gpus = tuple(str(gpu) for gpu in entry["gpus"])
    tokens = frozenset(str(token) for token in entry["device_ids"])
    if not tokens:
        raise ValueError("an entry without device_ids")
    return Entry(
        id=int(entry["id"]),
        resource=str(entry["resource"]),
        gpus=gpus,
        units=int(entry["memory_gib"]),
        tokens=tokens,
        owner=None if owner is None else ContainerName(owner["namespace"], owner["pod"], owner["container"]),
        shortage=int(entry["shortage_gib"]),
        library=str(entry["library"]),
        at_s=float(entry["allocated_at"]),
    )
