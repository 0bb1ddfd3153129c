# SPDX-License-Identifier: Apache-2.0
"""What races is planned by what is asked for and by the memory that is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpu_bench import settings
from gpu_bench.engines import Decoded, Tree, captured_sizes
from gpu_bench.lineup import SPARE_BYTES, Entered, Lineup, Part, Setting
from gpu_bench.roofline import Rates
from gpu_bench.timed import Timed

ALL = frozenset(Part)


@pytest.fixture
def lineup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lineup:
    monkeypatch.setattr(settings, "DIRECTORY", tmp_path)
    return settings.made_up(settings.full(rounds=3), ALL)


def setting_of(lineup: Lineup, free_bytes: int = 0) -> Setting:
    full = settings.full(rounds=3)
    return Setting(full.race, lineup, full.options, Rates(1e12, {"bfloat16": 1e15}), free_bytes, True, 0.0)


def test_the_race_is_of_plain_decoding_a_chain_a_static_and_a_dynamic_tree(lineup: Lineup) -> None:
    racing = [entrant.name for entrant in lineup.entrants if Part.RACE in entrant.parts]
    assert racing == ["plain", "chain of 4", "static", "dynamic"]
    goals = [entrant.name for entrant in lineup.entrants if entrant.has_step_goal]
    assert goals == ["static", "static, truncated LM heads"]


def test_engines_that_no_part_asks_for_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DIRECTORY", tmp_path)
    entrants = settings.made_up(settings.full(rounds=3), frozenset({Part.RACE})).entrants
    assert [entrant.name for entrant in entrants] == ["plain", "chain of 4", "static", "dynamic"]
    entrants = settings.made_up(settings.full(rounds=3), frozenset({Part.PROPOSAL})).entrants
    shown = ["plain", "static", "dynamic", "static, truncated LM heads", "static, own LM heads"]
    assert [entrant.name for entrant in entrants] == shown


def test_every_engine_with_heads_verifies_all_the_rows_by_which_its_step_is_known(lineup: Lineup) -> None:
    budgets = {entrant.tree["medusa_budget"] for entrant in lineup.entrants if entrant.heads is not None}
    assert budgets == {"off"}


def test_as_many_engines_run_side_by_side_as_there_is_memory_for(lineup: Lineup) -> None:
    each = lineup.target.weight_bytes + setting_of(lineup).cache_bytes + SPARE_BYTES
    assert [setting_of(lineup, free_bytes=free).at_a_time for free in (0, each, 3 * each, 4 * each - 1)] == [2, 2, 3, 3]
    assert setting_of(lineup, free_bytes=78 << 30).at_a_time == 3


def test_the_cache_holds_every_request_to_the_end_of_the_measurement(lineup: Lineup) -> None:
    setting = setting_of(lineup)
    tokens = 128 * (192 + setting.sizes.most_tokens(depth=4) + 64)
    assert setting.cache_bytes >= tokens * 32 * lineup.target.attention.slot_bytes
    assert setting.sizes.most_tokens(depth=4) > 5 * 4 * setting.sizes.steps


def test_steps_are_captured_up_to_the_plugins_bound_and_proposals_for_all_numbers_of_requests() -> None:
    assert captured_sizes((1, 8, 32, 128), rows=64) == [1, 8, 32, 64, 128, 512, 2048]


def timed(lineup: Lineup, name: str) -> Timed:
    """Rounds of 10 steps of two requests; plain ones take 1, 1 and 2 seconds, the tree's 3, 2 and 4."""
    entrant = next(each for each in lineup.entrants if each.name == name)
    entered = Entered(entrant, None, Tree(rows=64, depth=3))  # type: ignore[arg-type]
    plain = [Decoded(seconds, 10, 20) for seconds in (1.0, 1.0, 2.0)]
    own = [Decoded(seconds, 10, 60) for seconds in (3.0, 2.0, 4.0)]
    return Timed(setting_of(lineup), 2, entered, plain, own)


def test_ratios_are_medians_over_rounds_taken_in_turns(lineup: Lineup) -> None:
    found = timed(lineup, "static")
    assert (found.ratio, found.tokens_per_step, found.speedup) == (2.0, 3.0, 1.5)


def test_made_up_weights_give_no_speedup_but_the_tokens_per_step_from_which_a_tree_gains(lineup: Lineup) -> None:
    assert timed(lineup, "static").race_line().note == "gains from 2.00 tokens/step on (3.00 by made-up weights)"
    given = replace(lineup, is_made_up=False)
    assert timed(given, "static").race_line().note == "1.50 times plain's tokens/s, 3.00 tokens/step"


def test_a_step_is_compared_with_a_plain_one_as_floors_are(lineup: Lineup) -> None:
    step, ratio = timed(lineup, "static").step_lines()
    plain = timed(lineup, "static").plain_line("static")
    assert (step.unit, step.value, plain.value) == ("ms", 300.0, 100.0)
    assert (ratio.value, ratio.met) == (2.0, False)
    assert ratio.floor == pytest.approx(step.floor / plain.floor)


def test_prompts_are_cut_evenly_out_of_a_text(tiny_target: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    sizes, text = settings.tiny(rounds=1).race, tmp_path / "text"
    text.write_text("def f(x):\n    return x\n" * 9)
    tokens = AutoTokenizer.from_pretrained(tiny_target)(text.read_text())["input_ids"]
    prompts = settings.prompts_of(text, tiny_target, sizes)
    stride = (len(tokens) - sizes.prompt) // 3
    assert prompts == [tokens[first : first + sizes.prompt] for first in (0, stride, 2 * stride)]
    text.write_text("x")
    with pytest.raises(ValueError, match=r"--text: .* has 2 tokens; give at least 11"):
        settings.prompts_of(text, tiny_target, sizes)
