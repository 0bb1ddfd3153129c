# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.evaluation.reliability import Positions, Reliability, accepted_nodes, draft_reliability
from vllm_medusa.evaluation.served import ServedHeads, ServedLevels, draft
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.levels import Asked

HIDDEN, VOCAB, HEADS = 8, 20, 3


def random_heads(token_map: torch.Tensor | None = None, path_rank: int | None = None) -> ServedHeads:
    torch.manual_seed(0)
    draft_vocab = None if token_map is None else len(token_map)
    spec = HeadsSpec(HIDDEN, VOCAB, HEADS, draft_vocab_size=draft_vocab, path_rank=path_rank)
    heads = TrainableHeads(spec, torch.randn(VOCAB, HIDDEN), token_map, torch.randn(VOCAB, HIDDEN))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return ServedHeads(heads.requires_grad_(False), lambda logits: logits, torch.ones(HEADS))


def test_a_node_is_accepted_if_its_path_is_the_text() -> None:
    drafts = Drafts(
        tokens=torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]),
        parents=torch.tensor([[0, 1, 0, 3], [0, 0, 2, 3]]),
        lengths=torch.tensor([4, 4]),
    )
    right, depths = accepted_nodes(drafts, torch.tensor([[5, 6, 0], [6, 7, 8]]))
    assert depths.tolist() == [[1, 2, 1, 2], [1, 1, 2, 3]]
    assert right.tolist() == [[True, True, False, False], [False, True, True, True]]


def test_the_calibration_error_is_the_mean_distance_of_score_and_share_in_a_bin() -> None:
    scores = torch.tensor([0.01, 0.03, 0.52, 0.52, 0.52, 0.52, 1.0])
    accepted = torch.tensor([False, False, True, True, True, False, True])
    found = Reliability.of(scores, accepted)
    assert [each.nodes for each in found.bins] == [2, 4, 1]
    assert found.score == pytest.approx(scores.mean().item())
    assert found.accepted == pytest.approx(4 / 7)
    assert found.calibration_error == pytest.approx((2 * 0.02 + 4 * (0.75 - 0.52) + 0) / 7)
    nothing = Reliability.of(scores[:0], accepted[:0])
    assert (nothing.nodes, nothing.score, nothing.accepted, nothing.calibration_error) == (0, 0, 0, 0)


@pytest.mark.parametrize("token_map", [None, torch.arange(1, VOCAB, 2)])
def test_sequential_heads_are_asked_along_each_path(token_map: torch.Tensor | None) -> None:
    served = random_heads(token_map, path_rank=4).at([0.5, 1.0, 2.0])
    hidden, roots = torch.randn(2, HIDDEN), torch.tensor([3, 4])
    levels = ServedLevels(served, hidden)
    levels.top_predictions(Asked(roots[:, None]), 2)
    levels.top_predictions(Asked(torch.tensor([[7, 9], [11, 13]]), torch.zeros(2, 2, dtype=torch.int64)), 2)
    log_probs, tokens = levels.top_predictions(Asked(torch.tensor([[1], [5]]), torch.tensor([[1], [0]])), 2)
    for request, path in enumerate(([3, 9, 1], [4, 11, 5])):
        logits = served.heads.logits(2, hidden[request : request + 1], torch.tensor([path]))[0] / 2.0
        best = logits.log_softmax(dim=-1).topk(2)
        torch.testing.assert_close(log_probs[request, 0], best.values)
        expected = best.indices if token_map is None else token_map[best.indices]
        assert torch.equal(tokens[request, 0], expected)


@pytest.mark.parametrize("kind", ["plain", "sequential"])
def test_scores_of_heads_that_say_what_the_text_is_drawn_from_are_reliable(kind: str) -> None:
    """Each token is drawn from what the head says of it, given the tokens before it if the head reads these."""
    served = random_heads(path_rank=4 if kind == "sequential" else None)
    hidden, text = torch.randn(3000, HIDDEN), torch.randint(VOCAB, (3000, 1))
    for head in range(HEADS):
        probabilities = served.logits(head, hidden, text).softmax(dim=-1)
        text = torch.cat([text, probabilities.multinomial(1)], dim=1)
    positions = Positions(hidden, text[:, 0], text[:, 1:], text[:, :1].int())
    # The first depth alone: below it plain heads are taken to be right together, which these are not.
    options: dict[str, Any] = {"num_heads": HEADS, "num_nodes": 12, "top_k": 6, "min_probability": 0.0}
    tree = BeamTree(beam=4, **options) if kind == "sequential" else DynamicTree(**options)
    found = draft_reliability(served, tree, positions)
    assert sum(of_depth.nodes for of_depth in found.depths) == 12 * 3000
    checked = found.depths if kind == "sequential" else found.depths[:1]
    for of_depth in checked:
        assert of_depth.score > 0.05
        assert of_depth.calibration_error < 0.02
    if kind == "sequential":
        assert found.predicted_length == pytest.approx(found.acceptance_length, rel=0.02)
    sure = draft_reliability(served.at([0.25] * HEADS), tree, positions)
    for of_depth, surer in zip(checked, sure.depths, strict=False):
        assert surer.calibration_error > 3 * of_depth.calibration_error


def test_drafts_of_plain_heads_carry_their_probabilities_at_their_temperatures() -> None:
    served = random_heads(torch.arange(0, VOCAB, 2)).at([2.0, 1.0, 1.0])
    hidden = torch.randn(4, HIDDEN)
    drafts = draft(served, DynamicTree(1, 3, 3, 0.0), hidden, torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1))
    best = (served.heads.logits(0, hidden) / 2.0).log_softmax(dim=-1).topk(3)
    assert torch.equal(drafts.tokens, 2 * best.indices)
    assert drafts.log_probs is not None
    torch.testing.assert_close(drafts.log_probs, best.values)
