# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tests.unit.tiny_targets import FAMILIES, build, counting
from vllm_medusa.training.hidden import final_hidden_states, lm_head_of
from vllm_medusa.training.target_logits import TargetLogits


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_give_the_targets_logits(family):
    target = build(family)
    tokens = counting(2, 0)
    hidden = final_hidden_states(target, tokens)
    assert hidden.shape == (2, 24, lm_head_of(target).in_features)
    torch.testing.assert_close(TargetLogits(target)(hidden), target(input_ids=tokens).logits)


def test_hidden_states_are_those_of_the_final_norm():
    target, tokens = build("llama"), counting(2, 0)
    expected = target.model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(final_hidden_states(target, tokens), expected, rtol=0, atol=0)


def test_no_logits_of_the_whole_batch_arise_and_the_target_stays_as_it_was():
    target, tokens = build("llama"), counting(2, 0)
    shapes = []
    handle = target.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    final_hidden_states(target, tokens)
    handle.remove()
    assert shapes == [(2, 1, 16)]
    assert target(input_ids=tokens).logits.shape == (2, 24, 16)


def test_gradients_reach_the_target():
    target = build("llama")
    final_hidden_states(target, counting(1, 0)).sum().backward()
    assert target.model.embed_tokens.weight.grad.abs().max() > 0


def test_a_model_without_an_lm_head_is_refused():
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="BertModel has no LM head"):
        lm_head_of(BertModel(BertConfig(**sizes, num_hidden_layers=1)))


def test_an_lm_head_that_is_no_matrix_is_refused():
    target = build("llama")
    target.lm_head = nn.Sequential(target.lm_head)
    with pytest.raises(ValueError, match="LM head of LlamaForCausalLM, Sequential"):
        lm_head_of(target)


def test_a_target_that_passes_by_its_lm_head_is_refused(monkeypatch):
    target = build("llama")
    monkeypatch.setattr(target, "forward", lambda **_: None)
    with pytest.raises(ValueError, match="heads cannot be trained on it"):
        final_hidden_states(target, counting(1, 0))


def test_logits_that_are_changed_in_an_unknown_way_are_refused(monkeypatch):
    target = build("llama")
    forward = target.forward

    def squared(**arguments):
        outputs = forward(**arguments)
        outputs.logits = outputs.logits**2
        return outputs

    monkeypatch.setattr(target, "forward", squared)
    with pytest.raises(ValueError, match="only method 'medusa1'"):
        TargetLogits(target)
