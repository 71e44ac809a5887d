# SPDX-License-Identifier: Apache-2.0
"""``valve bench victims``: its pools are consistent, and on them the choice beats the baselines."""

from __future__ import annotations

import json
from random import Random

import pytest

from valve_cli.bench import victims
from valve_cli.bench.paged_pool import BLOCK_TOKENS, Layout, PagedEngine


@pytest.mark.parametrize("prefix_share", [0.0, 0.5, 1.0])
def test_every_block_of_the_simulated_engine_is_free_or_owned(prefix_share: float) -> None:
    engine = PagedEngine(
        0, Layout("small", 4, 3), columns=60, slots=6, prefix_share=prefix_share, random=Random(3)
    )
    shared = 0
    for _ in range(60):
        engine.run(20)
        running = [request for request in engine._slots if request]
        users = [0] * len(engine._users)
        for request in running:
            assert len(set(request.blocks)) == len(request.blocks)
            assert (
                (len(request.blocks) - 1) * BLOCK_TOKENS
                < request.tokens
                <= len(request.blocks) * BLOCK_TOKENS
            )
            for block in request.blocks:
                users[block] += 1
        assert users == engine._users
        assert sorted(engine._free) == [block for block in range(1, len(users)) if not users[block]]
        shared += sum(1 for count in users if count > 1)
    assert bool(shared) == bool(prefix_share)


def test_a_column_has_the_same_owners_in_every_layer() -> None:
    engine = PagedEngine(7, Layout("small", 4, 3), columns=20, slots=4, prefix_share=0.5, random=Random(3))
    engine.run(300)
    views = engine.slabs()
    assert [view.slab for view in views] == list(range(60))
    for view in views:
        assert view.owners == views[view.slab % 20].owners
        assert view.pinned == (view.slab % 20 == 0), "the engine's null block"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_harms_the_fewest_requests(seed: int) -> None:
    report = victims.run(seed=seed, snapshots=2, needs=(16, 128))
    by_case: dict[tuple[str, int], dict[str, float]] = {}
    for row in report["rows"]:
        by_case.setdefault((row["layout"], row["need"]), {})[row["policy"]] = row["harmed_per_slab"]
    assert len(by_case) == 2 * len(victims.LAYOUTS)
    for case, harmed in by_case.items():
        assert set(harmed) == {"greedy", "fifo", "lru", "random"}
        assert harmed["greedy"] <= min(harmed.values()), case
        assert harmed["greedy"] < harmed["random"], case


def test_json_says_the_same_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    def costs(*more: str) -> list[dict[str, object]]:
        assert victims.main(["--json", "--snapshots", "1", "--need", "32", *more]) == 0
        report = json.loads(capsys.readouterr().out)
        return [{name: value for name, value in row.items() if "_us_" not in name} for row in report["rows"]]

    assert costs("--seed", "5") == costs("--seed", "5")
    assert costs("--seed", "5") != costs("--seed", "6")


def test_the_table_has_a_row_for_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert victims.main(["--snapshots", "1", "--need", "32"]) == 0
    table = capsys.readouterr().out
    assert [table.count(name) for name in ("greedy", "fifo", "lru", "random")] == [len(victims.LAYOUTS)] * 4


def test_a_need_of_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        victims.main(["--need", "0"])
    assert "give at least 1" in capsys.readouterr().err
