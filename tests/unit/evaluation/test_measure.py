# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.toy.tokenizer import EOS_ID
from tests.unit.evaluated import HEADS, VOCAB, write_random_heads, write_target
from tests.unit.published import write_original
from tests.unit.tree.test_lookup import longest_match
from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.distillation.continuation import continue_prompts
from vllm_medusa.evaluation.measure import JUDGED_NODES, Evaluation, evaluate_heads, load_heads
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.tree.lookup import mixed

RANKS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_target(directory / "target")
    write_random_heads(directory / "heads")
    return directory


@pytest.fixture(scope="module")
def target(models: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(models / "target").eval()


@pytest.fixture(scope="module")
def heads(models: Path, target: LlamaForCausalLM) -> TrainableHeads:
    return load_heads(models / "heads", models / "target", target)


def random_samples(count: int = 5) -> list[Sample]:
    """Texts of several lengths; the first tokens are a prompt without labels."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, VOCAB, (6 + 5 * n,), generator=generator).tolist() for n in range(count)]
    return [Sample(text, [IGNORED] * 3 + text[3:]) for text in texts]


def brute_force(
    target: LlamaForCausalLM, heads: TrainableHeads, samples: list[Sample], evaluation: Evaluation
) -> tuple[list[list[float]], list[int]]:
    """Head k at position t is right at rank r if the token of that rank is the label at t + 1 + k.

    The tokens are the head's, at its temperature, with what followed the path in the text, at its weight.
    """
    hits = [[0] * RANKS for _ in range(HEADS)]
    positions = [0] * HEADS
    with torch.no_grad():
        for sample in samples:
            hidden = target.model(input_ids=torch.tensor([sample.input_ids])).last_hidden_state[0]
            for k in range(1, HEADS + 1):
                for t in range(len(sample) - 1 - k):
                    if (label := sample.labels[t + 1 + k]) != IGNORED:
                        positions[k - 1] += 1
                        logits = heads.logits(k - 1, hidden[t]) / evaluation.temperatures[k - 1]
                        text = sample.input_ids
                        matched, followed = longest_match(text[: t + 2], text[t + 2 : t + 1 + k])
                        weight = torch.tensor(evaluation.lookup_weights[k - 1][matched - 1] if matched else 0.0)
                        head, tokens = logits.log_softmax(dim=-1).topk(RANKS)
                        best = mixed(head, tokens, torch.tensor(followed), weight, RANKS)[1].tolist()
                        for rank in range(RANKS):
                            hits[k - 1][rank] += best[rank] == label
    return [[hit / n for hit in row] for row, n in zip(hits, positions, strict=True)], positions


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_accuracies_are_shares_of_the_positions_that_have_a_label(
    target: LlamaForCausalLM, heads: TrainableHeads, batch_size: int
) -> None:
    samples = random_samples()
    for sample in samples:
        with torch.no_grad():
            hidden = target.model(input_ids=torch.tensor([sample.input_ids])).last_hidden_state[0]
        for rank in range(RANKS):  # So that each of head 1's ranks is right at least once.
            sample.labels[-rank - 1] = heads.logits(0, hidden[-rank - 3]).topk(RANKS).indices[rank].item()
    found = evaluate_heads(target, heads, samples, RANKS, batch_size, show_progress=False)
    accuracies, positions = brute_force(target, heads, samples, found)
    assert found.positions == positions
    torch.testing.assert_close(torch.tensor(found.accuracies), torch.tensor(accuracies))
    assert all(accuracy > 0 for accuracy in found.accuracies[0])


def drawn_by_the_first_head(target: LlamaForCausalLM, heads: TrainableHeads) -> list[Sample]:
    """Return texts whose labels the first head has drawn at a temperature of 1.5."""
    samples, generator = random_samples(12), torch.Generator().manual_seed(0)
    for sample in samples:
        with torch.no_grad():
            hidden = target.model(input_ids=torch.tensor([sample.input_ids])).last_hidden_state[0]
            drawn = (heads.logits(0, hidden[1:-2]) / 1.5).softmax(dim=-1).multinomial(1, generator=generator)
        sample.labels[3:] = drawn[:, 0].tolist()
    return samples


def test_the_temperature_at_which_the_target_speaks_is_found(target: LlamaForCausalLM, heads: TrainableHeads) -> None:
    found = evaluate_heads(target, heads, drawn_by_the_first_head(target, heads), RANKS, show_progress=False)
    assert found.temperatures[0] == pytest.approx(1.5, rel=0.15)
    before, after = (drafts.depths[0].calibration_error for drafts in (found.before, found.after))
    assert after < before


def test_probabilities_are_read_as_the_served_heads_scale_their_logits(
    target: LlamaForCausalLM, heads: TrainableHeads
) -> None:
    samples = drawn_by_the_first_head(target, heads)
    plain, scaled = (
        evaluate_heads(target, heads, samples, RANKS, show_progress=False, logit_scale=scale) for scale in (1.0, 0.5)
    )
    assert scaled.accuracies == plain.accuracies
    assert scaled.temperatures[0] == pytest.approx(plain.temperatures[0] / 2, rel=0.02)


def test_paths_and_scores_are_of_the_positions_where_steps_begin(
    target: LlamaForCausalLM, heads: TrainableHeads
) -> None:
    samples = drawn_by_the_first_head(target, heads)
    found = evaluate_heads(target, heads, samples, RANKS, show_progress=False)
    everywhere = sum(len(sample) - 3 - HEADS + 1 for sample in samples)
    assert 0 < found.steps < everywhere
    assert sum(of_depth.nodes for of_depth in found.after.depths) == JUDGED_NODES * found.steps
    right_at_first = sum(share for path, share in found.paths.accuracies.items() if len(path) == 1)
    assert right_at_first * found.steps == pytest.approx(round(right_at_first * found.steps))
    assert 0 < right_at_first < sum(found.accuracies[0])  # Steps pass over what heads know.


def test_texts_without_enough_tokens_of_the_target_in_a_row_are_refused(
    target: LlamaForCausalLM, heads: TrainableHeads
) -> None:
    text = list(range(5, 25))
    labels = [token if place % 2 else IGNORED for place, token in enumerate(text)]
    with pytest.raises(ValueError, match="no 3 tokens in a row were written by the target in 1 texts"):
        evaluate_heads(target, heads, [Sample(text, labels)], show_progress=False)


def test_texts_too_short_for_a_head_are_refused_by_its_number(target: LlamaForCausalLM, heads: TrainableHeads) -> None:
    text = [5, 6, 7, 8]
    with pytest.raises(ValueError, match="head 3 has nothing to predict in 1 texts: it predicts 4 tokens ahead"):
        evaluate_heads(target, heads, [Sample(text, text)], show_progress=False)


def test_heads_are_measured_in_the_targets_dtype_as_they_are_served(tmp_path: Path) -> None:
    write_target(tmp_path / "target", torch.bfloat16)
    write_random_heads(tmp_path / "heads")
    target = LlamaForCausalLM.from_pretrained(tmp_path / "target", dtype="auto")
    heads = load_heads(tmp_path / "heads", tmp_path / "target", target)
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}


def test_heads_that_are_not_the_targets_are_refused(models: Path, target: LlamaForCausalLM, tmp_path: Path) -> None:
    write_random_heads(tmp_path / "heads", vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match=r"the heads have vocab_size 301, the target .* has 300"):
        load_heads(tmp_path / "heads", models / "target", target)
    write_original(tmp_path / "original")
    with pytest.raises(ValueError, match=r"original/config\.json: the heads' config lacks .* with vllm-medusa convert"):
        load_heads(tmp_path / "original", models / "target", target)


def test_continuations_are_the_targets_own_whatever_batch_they_are_written_in(target: LlamaForCausalLM) -> None:
    prompts = [[0, 40], [0, 50, 60, 70, 80], [0], [0, 90, 91]]
    samples = continue_prompts(target, prompts, 12, batch_size=3, show_progress=False)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([prompt])
        alone = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert sample.input_ids == alone[0].tolist()
        assert sample.labels == [IGNORED] * len(prompt) + sample.input_ids[len(prompt) :]


def test_a_continuation_ends_with_its_end_of_sequence_token(
    target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[0, 40], [0, 50, 60]]
    plain = continue_prompts(target, prompts, 12, show_progress=False)[0].input_ids
    end = plain.index(plain[5], len(prompts[0]))
    monkeypatch.setattr(target.generation_config, "eos_token_id", [EOS_ID, plain[5]])
    assert continue_prompts(target, prompts, 12, show_progress=False)[0].input_ids == plain[: end + 1]
    longer = continue_prompts(target, prompts, 12, show_progress=False, min_new_tokens=12)
    assert [len(sample) for sample in longer] == [len(prompt) + 12 for prompt in prompts]
