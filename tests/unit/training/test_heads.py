# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.tiny_targets import all_logits
from vllm_medusa.checkpoint.format import HeadsSpec
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training.accuracy import HeldOut, score_heads
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.losses import medusa_loss

SPEC = HeadsSpec(hidden_size=8, vocab_size=16, num_heads=3, num_layers=2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_untrained_heads_predict_what_the_target_predicts(shared, bias):
    spec = HeadsSpec(8, 16, 3, num_layers=2, fc_bias=bias, shared_lm_head=shared)
    lm_head, hidden = torch.randn(16, 8), torch.randn(2, 5, 8)
    logits = all_logits(TrainableHeads(spec, lm_head), hidden)
    assert logits.shape == (3, 2, 5, 16)
    for head_logits in logits:
        torch.testing.assert_close(head_logits, hidden @ lm_head.T)


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_are_those_of_the_checkpoint(shared):
    spec = HeadsSpec(8, 16, 3, shared_lm_head=shared)
    state = TrainableHeads(spec, torch.randn(16, 8)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == spec.shapes()


def test_zero_weights_can_learn():
    heads = TrainableHeads(SPEC, torch.randn(16, 8))
    medusa_loss(heads, torch.randn(2, 9, 8), torch.randint(16, (2, 9))).backward()
    first_layers = [block.layers[0].weight.grad for block in heads.blocks]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in first_layers)


def test_a_shared_lm_head_stays_as_it_is():
    heads = TrainableHeads(HeadsSpec(8, 16, 3, shared_lm_head=True), torch.randn(16, 8))
    trained = {name for name, parameter in heads.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in heads.state_dict() if name.startswith("blocks.")}


def test_a_block_is_the_papers_formula():
    heads = TrainableHeads(HeadsSpec(8, 16, 1), torch.randn(16, 8))
    layer = heads.blocks[0].layers[0]
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(5, 8)
    inner = x @ layer.weight.T + layer.bias
    expected = x + inner * torch.sigmoid(inner)
    torch.testing.assert_close(heads.blocks[0](x), expected)


def test_accuracy_counts_each_rank_of_each_head():
    heads = TrainableHeads(HeadsSpec(4, 4, num_heads=2), torch.eye(4))
    # Every position ranks the tokens 3, 2, 1, 0.
    hidden = torch.arange(4.0).expand(2, 7, 4)
    labels = torch.tensor([[0, 0, 3, 3, 2, 0, IGNORED], [IGNORED] * 7])
    scores = score_heads(heads, hidden, labels, ranks=2)
    # Head 1's labels are 3, 3, 2, 0; head 2's are 3, 2, 0; the second block has no labels.
    assert scores.hits.tolist() == [[[2, 1], [1, 1]], [[0, 0], [0, 0]]]
    assert scores.positions.tolist() == [[4, 3], [0, 0]]
    log_probability = torch.arange(4.0).log_softmax(dim=0)
    expected = -torch.tensor([2 * log_probability[3] + log_probability[2] + log_probability[0]])
    torch.testing.assert_close(scores.losses[0, :1], expected)
    held_out = HeldOut.of(scores.hits.numpy(), scores.losses.numpy(), scores.positions.numpy(), scores.drafted.numpy())
    assert held_out.accuracies == [[2 / 4, 1 / 4], [1 / 3, 1 / 3]]
    assert held_out.top1 == [2 / 4, 1 / 3]
    assert held_out.losses[0] == pytest.approx(float(expected) / 4)
    assert held_out.lm_loss is None


def test_a_vocabulary_smaller_than_the_ranks_leaves_the_others_empty():
    heads = TrainableHeads(HeadsSpec(4, 4, num_heads=1), torch.eye(4))
    scores = score_heads(heads, torch.randn(1, 7, 4), torch.randint(4, (1, 7)), ranks=6)
    assert scores.hits.shape == (1, 1, 6)
    assert int(scores.hits.sum()) == int(scores.positions.sum()) == 5
