# SPDX-License-Identifier: Apache-2.0
"""The parts that every Kubernetes object has: metadata and conditions.

Used by policy.py and node.py. Their fields are Kubernetes' own, so they have no reasons.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import AwareDatetime, Field, StringConstraints

from valve_api.model import ApiModel, setting


class ObjectMeta(ApiModel):
    """metadata of a cluster-scoped object. The API server owns its schema; only the name matters here."""

    name: Annotated[str, StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    generation: int = 0
    uid: str = ""
    resource_version: str = ""
    generate_name: str = ""
    creation_timestamp: Any = None
    deletion_timestamp: Any = None
    deletion_grace_period_seconds: int | None = None
    finalizers: list[str] = Field(default_factory=list)
    owner_references: list[dict[str, Any]] = Field(default_factory=list)
    managed_fields: list[dict[str, Any]] = Field(default_factory=list)
    self_link: str = ""


class Truth(StrEnum):
    """Status of a condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(ApiModel):
    """One observation in Kubernetes' form; the whole list is always written at once."""

    type: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        description="CamelCase name."
    )
    status: Truth = Field(description="True, False or Unknown.")
    reason: Annotated[str, StringConstraints(max_length=128)] = setting(
        "", what="CamelCase word for machines."
    )
    message: Annotated[str, StringConstraints(max_length=4096)] = setting(
        "", what="A sentence for people: what to do, where something is to be done."
    )
    observed_generation: int = setting(0, what="metadata.generation that the condition speaks of.", ge=0)
    last_transition_time: AwareDatetime = Field(description="When status last changed.")
