# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.unit.evaluated import HEADS, HIDDEN, VOCAB, write_target
from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.data.packing import IGNORED, Sample
from vllm_medusa.evaluation import reading
from vllm_medusa.evaluation.reading import ReadText, read_texts, states_of_target
from vllm_medusa.evaluation.served import ServedHeads
from vllm_medusa.evaluation.temperatures import losses_by_temperature
from vllm_medusa.training.heads import TrainableHeads

RANKS, PROMPT = 4, 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(write_target(tmp_path_factory.mktemp("models") / "target")).eval()


def random_heads(target: LlamaForCausalLM, kind: str) -> ServedHeads:
    token_map = torch.arange(0, VOCAB, 2) if kind == "draft vocabulary" else None
    sizes = {"draft_vocab_size": None if token_map is None else len(token_map)}
    spec = HeadsSpec(HIDDEN, VOCAB, HEADS, path_rank=4 if kind == "sequential" else None, **sizes)
    heads = TrainableHeads(spec, target.lm_head.weight, token_map, target.get_input_embeddings().weight)
    torch.manual_seed(3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ServedHeads(heads.requires_grad_(False), lambda logits: logits, torch.ones(HEADS))


def texts_that_heads_know(target: LlamaForCausalLM, served: ServedHeads) -> list[Sample]:
    """Return texts of several lengths; at each one's end every head is right, at ranks that differ."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in (9, 14, 20, 27, 6):
        text = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        hidden = hidden_of(target, text)
        at = length - 2 - HEADS
        for head in range(HEADS):
            path = torch.tensor([text[at + 1 : at + 2 + head]])
            best = served.top(head, hidden[at : at + 1], RANKS, path)[0]
            text[at + 2 + head] = int(best[0, (head + length) % RANKS])
        samples.append(Sample(text, [IGNORED] * PROMPT + text[PROMPT:]))
    return samples


@torch.no_grad()
def hidden_of(target: LlamaForCausalLM, text: list[int]) -> torch.Tensor:
    return target.model(input_ids=torch.tensor([text])).last_hidden_state[0]


@torch.no_grad()
def read(target: LlamaForCausalLM, served: ServedHeads, samples: list[Sample], batch_size: int = 2) -> list[ReadText]:
    """Read texts; the result is sorted by length, as batches are."""
    return read_texts(partial(states_of_target, target), served, samples, RANKS, batch_size, show_progress=False)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("kind", ["plain", "draft vocabulary", "sequential"])
def test_ranks_and_losses_are_those_of_each_head_on_the_true_path(
    target: LlamaForCausalLM, kind: str, batch_size: int
) -> None:
    served = random_heads(target, kind)
    samples = texts_that_heads_know(target, served)
    seen = set()
    for sample, found in zip(sorted(samples, key=len), read(target, served, samples, batch_size), strict=True):
        hidden = hidden_of(target, sample.input_ids)
        for position in range(len(found.ranks)):
            for head in range(HEADS):
                at, rank = position + 2 + head, int(found.ranks[position, head])
                if at >= len(sample) or sample.labels[at] == IGNORED:
                    assert rank == IGNORED
                    continue
                path = torch.tensor([sample.input_ids[position + 1 : position + 2 + head]])
                best = served.top(head, hidden[position : position + 1], RANKS, path)[0][0].tolist()
                assert rank == (best.index(sample.labels[at]) if sample.labels[at] in best else RANKS)
                row = served.heads.rows_of(torch.tensor([sample.labels[at]]))
                if row == IGNORED:
                    assert found.losses[position, head].isinf().all()
                    continue
                logits = served.logits(head, hidden[position : position + 1], path)
                expected = losses_by_temperature(logits, row)[0]
                torch.testing.assert_close(found.losses[position, head], expected, rtol=1e-3, atol=1e-3)
                seen.add(rank)
    assert seen == set(range(RANKS + 1))


def test_kept_positions_are_those_after_which_every_head_has_a_label(target: LlamaForCausalLM) -> None:
    served = random_heads(target, "plain")
    samples = texts_that_heads_know(target, served)
    for sample, found in zip(sorted(samples, key=len), read(target, served, samples), strict=True):
        kept = found.kept.nonzero()[:, 0].tolist()
        assert kept == list(range(PROMPT - 2, len(sample) - 1 - HEADS))
        torch.testing.assert_close(found.at.hidden, hidden_of(target, sample.input_ids)[kept], rtol=1e-4, atol=1e-4)
        assert found.at.roots.tolist() == [sample.input_ids[at + 1] for at in kept]
        assert found.at.following.tolist() == [sample.input_ids[at + 2 : at + 2 + HEADS] for at in kept]


def test_no_more_positions_are_kept_than_the_limit(target: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    served = random_heads(target, "plain")
    samples = texts_that_heads_know(target, served)
    monkeypatch.setattr(reading, "CANDIDATES", 7)
    assert sum(int(text.kept.sum()) for text in read(target, served, samples)) == 7
