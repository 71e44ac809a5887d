# SPDX-License-Identifier: Apache-2.0
"""Admission as kopf serves it: pods (mutated or refused) and policies (refused where the CRD's rules cannot
say it).

    /mutate-pods          admission.decide, answered as a JSON patch
    /validate-policies    valve_api.load, whose sentences name the field

The certificate is the chart's, mounted as files; kopf reads them again when they change. Every replica
serves.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import kopf

from valve_api.errors import PolicyError
from valve_api.load import policy_from
from valve_api.names import GROUP, PLURAL_POLICY, VERSION
from valve_operator.admission import Admitted, Defaults, decide

log = logging.getLogger(__name__)

Json = dict[str, Any]
REFUSED: Final = 422
"""Unprocessable: what the API server itself answers to an object that breaks a rule."""


@dataclass(slots=True)
class Answered:
    """How often admission said what."""

    changed: int = 0
    refused: int = 0
    policies_refused: int = 0


@dataclass(slots=True)
class Webhook:
    """The handlers and the server they are served by."""

    port: int
    certificate: Path
    key: Path
    defaults: Defaults
    address: str | None = None
    """None: every interface"""
    answered: Answered = field(default_factory=Answered)

    @property
    def server(self) -> kopf.WebhookServer:
        return kopf.WebhookServer(
            addr=self.address, port=self.port, certfile=str(self.certificate), pkeyfile=str(self.key)
        )

    def register(self, handlers: kopf.OperatorRegistry) -> None:
        """Adds the handlers; their ids are the paths."""

        @kopf.on.mutate("", "v1", "pods", id="mutate-pods", operations=["CREATE"], registry=handlers)
        async def mutate(body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
            self.mutate(copy.deepcopy(dict(body)), patch)

        @kopf.on.validate(
            GROUP,
            VERSION,
            PLURAL_POLICY,
            id="validate-policies",
            operations=["CREATE", "UPDATE"],
            registry=handlers,
        )
        async def validate(body: kopf.Body, **_: Any) -> None:
            self.validate(copy.deepcopy(dict(body)))

    def mutate(self, pod: Json, patch: kopf.Patch) -> None:
        """Raises kopf.AdmissionError with the sentences."""
        answer = decide(pod, self.defaults)
        if not isinstance(answer, Admitted):
            self.answered.refused += 1
            raise kopf.AdmissionError(f"Valve refuses this pod: {answer}", code=REFUSED)
        if answer.pod is pod:
            return
        self.answered.changed += 1
        changed = answer.pod

        def replace(body: Any) -> None:
            body.clear()
            body.update(changed)

        patch.fns.append(replace)

    def validate(self, policy: Json) -> None:
        """Raises kopf.AdmissionError with every problem."""
        name = str(policy.get("metadata", {}).get("name"))
        try:
            policy_from({**policy, "metadata": {"name": name}, "status": None}, f"policy {name}")
        except PolicyError as error:
            self.answered.policies_refused += 1
            raise kopf.AdmissionError(str(error), code=REFUSED) from error
