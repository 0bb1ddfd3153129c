# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.accuracy import HeldOut, score_heads
from vllm_medusa.training.draft_vocabulary import DraftVocabulary, count_tokens
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.losses import LabelCounts, count_labels, medusa_loss

TEXT = [torch.tensor([[5, 5, 5], [IGNORED, 2, 2]]), torch.tensor([[7, IGNORED, 0]])]
TOKEN_MAP = torch.tensor([3, 2])


def heads(**changes: object) -> TrainableHeads:
    return TrainableHeads(HeadsSpec(4, 4, num_heads=2, draft_vocab_size=2, **changes), torch.eye(4), TOKEN_MAP)


def test_the_most_frequent_labels_are_chosen_and_of_equal_ones_the_lower_ids():
    vocabulary = DraftVocabulary.most_frequent(5, count_tokens(TEXT, 8))
    assert vocabulary.tokens.tolist() == [5, 2, 0, 7, 1]


def test_coverage_is_the_share_of_labels():
    vocabulary = DraftVocabulary.most_frequent(2, count_tokens(TEXT, 8))
    assert vocabulary.coverage(count_tokens(TEXT, 8)) == 5 / 7
    assert vocabulary.coverage(count_tokens([torch.tensor([IGNORED, 5, 6])], 8)) == 1 / 2
    assert vocabulary.coverage(count_tokens([], 8)) == 0


@pytest.mark.parametrize("size", [8, 9])
def test_a_draft_vocabulary_that_is_not_smaller_is_refused(size):
    with pytest.raises(ValueError, match=f"draft_vocab must be less than 8, .* got {size}; leave it out"):
        DraftVocabulary.most_frequent(size, count_tokens(TEXT, 8))


def test_the_lm_heads_are_rows_of_the_targets_and_each_token_has_its_row():
    assert torch.equal(heads().lm_head(1), torch.eye(4)[TOKEN_MAP])
    tokens = torch.tensor([[0, 1, 2, 3, IGNORED]])
    assert heads().rows_of(tokens).tolist() == [[IGNORED, IGNORED, 1, 0, IGNORED]]


@pytest.mark.parametrize("shared", [False, True])
def test_labels_that_cannot_be_drafted_are_left_out_of_the_loss(shared):
    model, hidden = heads(shared_lm_head=shared), torch.randn(2, 7, 4)
    labels = torch.tensor([[0, 1, 2, 3, 2, 1, 3], [2, 3, 0, 2, 2, 1, 3]])
    left_out = labels.masked_fill(labels < 2, IGNORED)
    assert LabelCounts.of(count_labels(labels, model)) == LabelCounts(target=12, heads=(7, 6))
    torch.testing.assert_close(medusa_loss(model, hidden, labels), medusa_loss(model, hidden, left_out))


def test_labels_that_cannot_be_drafted_are_misses():
    hidden = torch.arange(4.0).expand(1, 7, 4)  # Every position ranks the tokens 3, 2.
    scores = score_heads(heads(), hidden, torch.tensor([[0, 0, 3, 1, 2, 0, IGNORED]]), ranks=4)
    assert scores.hits.tolist() == [[[1, 1, 0, 0], [0, 1, 0, 0]]]
    assert scores.positions.tolist() == [[4, 3]]
    assert scores.drafted.tolist() == [[2, 1]]
    held_out = HeldOut.of(*(each.numpy() for each in (scores.hits, scores.losses, scores.positions, scores.drafted)))
    assert held_out.accuracies == [[1 / 4, 1 / 4, 0, 0], [0, 1 / 3, 0, 0]]
    first, second = -torch.tensor([3.0, 2.0]).log_softmax(0)
    assert held_out.losses == pytest.approx([float(first + second) / 2, float(second)])
