# SPDX-License-Identifier: Apache-2.0
"""A made-up run of the demo, for tests that need records of every phase.  Deterministic."""

from __future__ import annotations

import random

from valve_cli.demo.events import PoolState, Reclaim, Timeline
from valve_cli.demo.loadgen import Request
from valve_cli.demo.measure import ValveRecord
from valve_cli.demo.phases import PhaseRecord

SECOND = 1_000_000_000
SLABS = 640
PROMPTS = 40


def requests(begin: int, count: int, slow: float, seed: int = 1) -> list[Request]:
    """`count` requests over about a second each; `slow` scales their times."""
    rng = random.Random(seed)
    made = []
    at = float(begin)
    for n in range(count):
        at += rng.expovariate(1.2) * SECOND
        tokens = 8 + rng.randrange(40)
        first = at + slow * (60 + rng.random() * 500) * 1e6
        request = Request(n, 100 + rng.randrange(900), tokens, int(at), int(at), int(first))
        request.end_ns = int(first + (tokens - 1) * slow * (15 + rng.random() * 12) * 1e6)
        request.received_tokens = tokens
        made.append(request)
    return made


def output_of(prompt: int) -> list[int]:
    rng = random.Random(prompt)
    return [rng.randrange(49152) for _ in range(32 + prompt % 64)]


def offline(name: str, begin: int, seconds: int, rate: float, finished: int) -> PhaseRecord:
    record = PhaseRecord(name, (begin, begin + seconds * SECOND), offline_sequences=160)
    record.offline_samples = [(begin + n * SECOND // 4, int(n * rate / 4)) for n in range(seconds * 4 + 1)]
    for n in range(finished):
        prompt = n % PROMPTS
        rid = f"{name}-{n:05d}"
        record.offline_issued[rid] = prompt
        record.offline_finished.append(
            {"id": rid, "prompt": prompt, "t_ns": begin + n * SECOND // 10, "tokens": output_of(prompt)}
        )
    return record


def timeline(begin: int, made: list[Request]) -> Timeline:
    """Pauses around each burst of requests, reclaims in some, slabs going to and fro."""
    rng = random.Random(7)
    line = Timeline()
    until = 0
    held, reserved = 30, 4
    for request in made:
        if request.sent_ns > until:
            if until:
                line.resumes.append(until)
            line.pauses.append((request.sent_ns + 150_000, 120 + rng.expovariate(1 / 60)))
            line.busy.append(request.sent_ns)
        until = max(until, request.end_ns + 40_000_000)
        need = request.prompt_tokens // 40
        if need > 6:
            line.reclaims.append(
                Reclaim(
                    request.sent_ns + 900_000,
                    need,
                    need << 21,
                    (need - 1) << 21,
                    1 + need // 4,
                    900 + need * 60,
                )
            )
        held = min(120, held + need) if need > 6 else max(20, held - 15)
        reserved = min(64, reserved * 2) if need > 6 else max(2, reserved - 4)
        line.pool.append(
            PoolState(
                request.sent_ns + 1_000_000,
                3,
                reserved,
                {"online": held, "offline": SLABS - held - 3},
            )
        )
    line.resumes.append(until)
    return line


def whole_run() -> tuple[dict[str, PhaseRecord], ValveRecord]:
    """Records of all four phases, the outputs of the Valve phase identical to the references."""
    exclusive = offline("exclusive", 10 * SECOND, 45, 400, 60)
    alone = PhaseRecord("alone", (100 * SECOND, 100 * SECOND), requests(100 * SECOND, 120, 1.0))
    naive = offline("naive", 300 * SECOND, 110, 160, 100)
    naive.requests = requests(300 * SECOND, 120, 1.5)
    phase = offline("valve", 500 * SECOND, 110, 190, 100)
    phase.requests = requests(500 * SECOND, 120, 1.01)
    for record in (alone, naive, phase):
        record.window = (record.window[0], max(r.end_ns for r in record.requests))
    valve = ValveRecord(phase, timeline(phase.window[0], phase.requests), 31, 5000)
    return {"exclusive": exclusive, "alone": alone, "naive": naive, "valve": phase}, valve
