# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.tiny_targets import build, counting
from vllm_medusa.training.config import Medusa1Config, Recipe
from vllm_medusa.training.losses import medusa_loss
from vllm_medusa.training.medusa1 import Medusa1, labelled, train_medusa1, untrained_heads
from vllm_medusa.training.schedule import cosine_with_warmup


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "cohere"])
def test_heads_learn_to_look_ahead_and_the_target_stays(family):
    target = build(family)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    config = Medusa1Config(num_heads=3, steps=80, batch_size=8, learning_rate=1e-2, ranks=4)
    result = train_medusa1(target, counting(64, 0), counting(8, 1), config, show_progress=False)
    assert min(result.held_out.top1) > 0.9
    assert result.accuracies.shape == (3, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_a_run_is_repeatable_and_depends_on_the_seed():
    states = []
    for seed in (0, 0, 1):
        config = Medusa1Config(num_heads=2, steps=3, batch_size=4, warmup_steps=1, seed=seed)
        result = train_medusa1(build("llama"), counting(16, 0), counting(4, 1), config, show_progress=False)
        states.append(result.heads.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Medusa1Config(num_heads=1, steps=2, batch_size=4, warmup_steps=1)
    train_medusa1(build("llama"), counting(8, 0), counting(4, 1), config, show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_loss_in_training_is_equation_1_and_out_of_it_too():
    model = Medusa1(build("llama"), Recipe(num_heads=2)).train()
    tokens = counting(4, 0)
    torch.nn.init.normal_(model.heads.blocks[0].layers[0].weight)
    hidden = model.target.model(input_ids=tokens).last_hidden_state
    expected = medusa_loss(model.heads, hidden, tokens)
    torch.testing.assert_close(model(tokens, tokens)["loss"], expected)
    torch.testing.assert_close(model.eval()(tokens, tokens)["loss"], expected)


def test_a_frozen_target_drops_nothing_out_while_heads_are_trained():
    model = Medusa1(build("opt"), Recipe(num_heads=1)).train()
    assert not any(module.training for module in model.target.modules())
    assert model.heads.training


def test_heads_of_a_target_in_16_bits_are_trained_in_32():
    model = Medusa1(build("llama").to(torch.bfloat16), Recipe(num_heads=1)).train()
    tokens = counting(2, 0)
    model(tokens, tokens)["loss"].backward()
    gradients = [parameter.grad for parameter in model.heads.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_heads_do_not_share_an_lm_head_with_a_bias():
    with pytest.raises(ValueError, match="shared_lm_head must be false for PhiForCausalLM"):
        untrained_heads(build("phi"), Recipe(shared_lm_head=True))


def test_prompts_are_no_labels():
    assert labelled(torch.tensor([[5, 6, 7]]), 2)[0]["labels"].tolist() == [-100, -100, 7]
    assert labelled(torch.tensor([[5, 6, 7]]), 0)[0]["labels"].tolist() == [5, 6, 7]


def test_the_learning_rate_rises_and_falls():
    cosine = [cosine_with_warmup(step, 10, 100) for step in range(100)]
    assert cosine[0] == pytest.approx(0.1)
    assert max(cosine) == cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[-1] < 0.001
