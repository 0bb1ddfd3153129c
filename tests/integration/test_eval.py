# SPDX-License-Identifier: Apache-2.0
"""Measured accuracies and converted checkpoints are right in the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.integration.engines import SpecCounters, engine, generate, greedy, model_runner, spec_counters, texts
from vllm_medusa.checkpoint.conversion import Layout, convert
from vllm_medusa.distillation.continuation import continue_prompts
from vllm_medusa.evaluation.calibration import Calibration, write_calibration
from vllm_medusa.evaluation.measure import JUDGED_NODES, Evaluation, evaluate_heads, load_heads

TOKENS, NODES, GROWN_NODES = 96, 16, 8

TOLERANCE = 0.08
"""What is expected is a mean over all positions, while steps begin where the last one stopped."""


@pytest.fixture(scope="module")
def evaluation(tiny_target: Path, tiny_heads: Path, held_out_prompts: list[list[int]]) -> Evaluation:
    """What the tiny heads say on every fourth prompt."""
    target = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    samples = continue_prompts(target, held_out_prompts[0::4], TOKENS, batch_size=16, show_progress=False)
    heads = load_heads(tiny_heads, tiny_target, target)
    return evaluate_heads(target, heads, samples, show_progress=False)


@pytest.fixture(scope="module")
def calibration(evaluation: Evaluation) -> Calibration:
    found = Calibration.of(
        evaluation.accuracies, evaluation.paths, evaluation.temperatures, evaluation.lookup_weights, nodes=64
    )
    assert found.paths is not None
    return found


@pytest.fixture(scope="module")
def other_prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return held_out_prompts[1::4][:64]


@pytest.fixture(scope="module")
def calibrated_heads(tiny_heads: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny heads with a tree in their checkpoint."""
    directory = tmp_path_factory.mktemp("models") / "heads"
    shutil.copytree(tiny_heads, directory)
    write_calibration(directory, calibration, NODES)
    return directory


@pytest.fixture(scope="module")
def served(
    tiny_target: Path, calibrated_heads: Path, other_prompts: list[list[int]]
) -> tuple[list[list[int]], SpecCounters]:
    """The output and the counters of an engine whose tree comes from the checkpoint."""
    with engine(tiny_target, heads=calibrated_heads) as llm:
        return texts(generate(llm, other_prompts, greedy(TOKENS))), spec_counters(llm)


def test_the_written_tree_is_served_and_accepts_what_is_expected_of_it(
    served: tuple[list[list[int]], SpecCounters], calibration: Calibration
) -> None:
    _, counters = served
    expected = calibration.expected_lengths[NODES - 1]
    print(f"\n{NODES} nodes: {counters.acceptance_length:.3f} tokens per step, expected {expected:.3f}")
    assert counters.drafted / counters.drafts == pytest.approx(NODES, rel=0.05)  # Cut where a request ends.
    assert counters.acceptance_length == pytest.approx(expected, rel=TOLERANCE)


def test_a_sparse_tree_grows_from_the_written_accuracies_to_any_size(
    tiny_target: Path, calibrated_heads: Path, other_prompts: list[list[int]], calibration: Calibration
) -> None:
    options = {"num_speculative_tokens": GROWN_NODES}
    with engine(tiny_target, heads=calibrated_heads, tree="sparse", speculative_config=options) as llm:
        generate(llm, other_prompts, greedy(TOKENS))
        counters = spec_counters(llm)
    expected = calibration.expected_lengths[GROWN_NODES - 1]
    print(f"\n{GROWN_NODES} nodes: {counters.acceptance_length:.3f} tokens per step, expected {expected:.3f}")
    assert counters.drafted / counters.drafts == pytest.approx(GROWN_NODES, rel=0.05)
    assert counters.acceptance_length == pytest.approx(expected, rel=TOLERANCE)


def test_dynamic_trees_accept_what_their_scores_say_once_temperatures_are_written(
    tiny_target: Path, calibrated_heads: Path, other_prompts: list[list[int]], evaluation: Evaluation
) -> None:
    options = {"num_speculative_tokens": JUDGED_NODES, "medusa_min_probability": 0.0}
    said: list[torch.Tensor] = []
    with engine(tiny_target, heads=calibrated_heads, tree="dynamic", speculative_config=options) as llm:
        proposer = model_runner(llm).drafter
        propose = proposer.propose

        def listened(*args: Any, **kwargs: Any) -> Any:
            drafts = propose(*args, **kwargs)
            said.append(1 + drafts.log_probs.exp().sum(dim=1))
            return drafts

        proposer.propose = listened
        generate(llm, other_prompts, greedy(TOKENS))
        counters = spec_counters(llm)
    by_scores = torch.cat(said).mean().item()
    after = evaluation.after
    print(f"\n{counters.acceptance_length:.3f} tokens per step, by the scores {by_scores:.3f}, in eval", after)
    assert counters.acceptance_length == pytest.approx(by_scores, rel=TOLERANCE)
    assert after.predicted_length == pytest.approx(by_scores, rel=TOLERANCE)
    assert abs(after.predicted_length / after.acceptance_length - 1) < abs(
        evaluation.before.predicted_length / evaluation.before.acceptance_length - 1
    )


def test_a_whole_model_taken_apart_emits_the_same_text_in_the_same_steps(
    tiny_target: Path,
    calibrated_heads: Path,
    other_prompts: list[list[int]],
    served: tuple[list[list[int]], SpecCounters],
    tmp_path: Path,
) -> None:
    """Through both layouts: served heads become original ones and are put into a model as in a Medusa-2 checkpoint."""
    convert(calibrated_heads, tmp_path / "original", Layout.ORIGINAL, tiny_target)
    heads = torch.load(tmp_path / "original" / "medusa_lm_head.pt", weights_only=True)
    shutil.copytree(tiny_target, tmp_path / "whole")
    model = load_file(tiny_target / "model.safetensors")
    save_file(model | {f"medusa_head.{name}": heads[name] for name in heads}, tmp_path / "whole" / "model.safetensors")
    config = json.loads((tiny_target / "config.json").read_text())
    config |= json.loads((tmp_path / "original" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))

    done = convert(tmp_path / "whole", tmp_path / "apart", Layout.SERVED)
    assert done.target is not None
    with engine(done.target, heads=done.heads) as llm:
        outputs = texts(generate(llm, other_prompts, greedy(TOKENS)))
        assert (outputs, spec_counters(llm)) == served
    with engine(tiny_target) as llm:
        assert texts(generate(llm, other_prompts, greedy(TOKENS))) == outputs
