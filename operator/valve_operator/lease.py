# SPDX-License-Identifier: Apache-2.0
"""Who leads: one replica at a time, by a coordination.k8s.io Lease.

`judge` is pure: from the Lease as read, when this replica first saw it so, and the time, to what to do. Times
are this process's monotonic clock; the times in the Lease are for people, because clocks of two machines
differ. A leader counts as one only for `renew_deadline_s` after its last renewal was *sent*, which is shorter
than what others wait before they take over. So two replicas never both write, unless a request takes longer
than the difference to arrive; the writes are idempotent then. (The official client's LeaderElection compares
wall clocks and does not say until when the lead lasts.)

`Leader` runs in the event loop; executor.py asks `leads()` before every write.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from valve_operator.api import Api, Kind
from valve_operator.errors import ApiError, ConflictError, GoneError

log = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Timing:
    """renew_deadline_s < duration_s, or two may lead; retry_s < renew_deadline_s, or a lead lapses "
    "by itself."""

    duration_s: float = 15.0
    renew_deadline_s: float = 10.0
    retry_s: float = 4.0


class Step(Enum):
    """What to do with the Lease."""

    CREATE = "create"
    TAKE = "take"
    RENEW = "renew"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Seen:
    """A Lease's resourceVersion, and when it was first seen on this process's clock."""

    version: str
    at_s: float


def judge(lease: Json | None, seen: Seen | None, identity: str, now_s: float) -> Step:
    """What to do. Another's Lease may be taken when it has not changed for its own duration, or was "
    "given up."""
    if lease is None:
        return Step.CREATE
    spec = lease.get("spec") or {}
    holder = spec.get("holderIdentity") or ""
    if holder == identity:
        return Step.RENEW
    if not holder:
        return Step.TAKE
    duration_s = float(spec.get("leaseDurationSeconds") or 0)
    still = seen is not None and seen.version == lease["metadata"]["resourceVersion"]
    return Step.TAKE if seen and still and now_s - seen.at_s > duration_s else Step.WAIT


class Leader:
    """Keeps trying to lead. `changed` is called whenever leading begins or ends."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        clock: Callable[[], float],
        timing: Timing,
        changed: Callable[[bool], None],
    ) -> None:
        self._api = api
        self._kind = Kind("Lease", "coordination.k8s.io/v1", "leases", namespace)
        self._name = name
        self.identity = identity
        self._clock = clock
        self._timing = timing
        self._changed = changed
        self._seen: Seen | None = None
        self._until_s = 0.0
        self._told = False
        self._mine: Json | None = None

    def leads(self) -> bool:
        """True while no other replica may write."""
        return self._clock() < self._until_s

    async def run(self) -> None:
        """Until cancelled; then the Lease is given up, so that another replica need not wait it out."""
        try:
            while True:
                await self._try()
                self._tell()
                # Jitter, so that replicas that start together do not collide for ever.
                wait_s = self._timing.retry_s * (1 + 0.1 * random.random())
                if self._told:
                    wait_s = min(wait_s, max(0.1, self._until_s - self._clock()))
                await asyncio.sleep(wait_s)
        finally:
            await self._give_up()

    async def _try(self) -> None:
        sent_s = self._clock()
        try:
            async with asyncio.timeout(self._timing.retry_s):
                written = await self._step(sent_s)
        except ConflictError:  # somebody else wrote: whatever it was, look before writing again
            self._mine = None
            self._until_s = 0.0
        except (ApiError, TimeoutError) as error:
            log.warning("lease %s: %s; trying again", self._name, error or "no answer in time")
            self._mine = None
        else:
            if written is not None:
                self._mine = written
                self._until_s = sent_s + self._timing.renew_deadline_s

    async def _step(self, now_s: float) -> Json | None:
        """The Lease as this replica has written it; None where another holds it."""
        lease = self._mine or await self._read()  # a leader knows its Lease: one request instead of two
        step = judge(lease, self._seen, self.identity, now_s)
        return None if step is Step.WAIT else await self._write(lease, step)

    async def _read(self) -> Json | None:
        try:
            lease = await self._api.get(self._kind, self._name)
        except GoneError:
            return None
        version = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen.version != version:
            self._seen = Seen(version, self._clock())
        return lease

    async def _write(self, lease: Json | None, step: Step) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old = (lease or {}).get("spec") or {}
        mine = step is Step.RENEW
        spec = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": int(self._timing.duration_s),
            "renewTime": now,
            "acquireTime": old.get("acquireTime", now) if mine else now,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (0 if mine or not lease else 1),
        }
        if lease is None:
            meta: Json = {"name": self._name, "namespace": self._kind.namespace}
            body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
            return await self._api.create(self._kind.path(), body)
        return await self._api.replace(self._kind.path(self._name), {**lease, "spec": spec})

    async def _give_up(self) -> None:
        self._until_s = 0.0
        self._tell()
        if self._mine is None:
            return
        spec = {**self._mine["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            await self._api.replace(self._kind.path(self._name), {**self._mine, "spec": spec})
        except ApiError as error:
            log.info("lease %s is not given up, the next leader waits it out: %s", self._name, error)

    def _tell(self) -> None:
        if self.leads() != self._told:
            self._told = not self._told
            log.info("%s %s", self.identity, "leads now" if self._told else "does not lead any more")
            self._changed(self._told)
