# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

from tests.unit.tiny_targets import build, counting
from vllm_medusa.training.accuracy import HeldOut
from vllm_medusa.training.config import Medusa2Recipe
from vllm_medusa.training.losses import medusa_loss
from vllm_medusa.training.medusa1 import labelled
from vllm_medusa.training.medusa2 import LossWeights, Medusa2, Medusa2Trainer
from vllm_medusa.training.schedule import second_stage, sine_rise
from vllm_medusa.training.trainer import training_arguments

RECIPE = Medusa2Recipe(
    num_heads=2, batch_size=8, learning_rate=1e-2, warmup_steps=2, lora_rank=4, lora_dropout=0.0, chunk_size=64
)
JOINT = LossWeights(target=1.0, heads=0.2)
TOKENS = counting(4, 0)


def recipe(**changes: object) -> Medusa2Recipe:
    return Medusa2Recipe(**(RECIPE.model_dump() | changes))


def trainer(tmp_path, changed: Medusa2Recipe, family: str = "llama", steps: int = 40) -> Medusa2Trainer:
    arguments = training_arguments(changed, tmp_path, max_steps=steps, logging_steps=1, eval_on_start=True)
    data, held_out = labelled(counting(64, 0), 0), labelled(counting(8, 1), 0)
    return Medusa2Trainer(Medusa2(build(family), changed), changed, arguments, data, held_out, show_progress=False)


def lm_losses(trained: Medusa2Trainer, after: HeldOut) -> tuple[float, float]:
    before = next(entry["eval_lm_loss"] for entry in trained.state.log_history if "eval_lm_loss" in entry)
    assert after.lm_loss is not None
    return before, after.lm_loss


@pytest.mark.parametrize(
    ("family", "target_training"),
    [("llama", "lora"), ("gemma2", "lora"), ("phi", "lora"), ("qwen3", "full"), ("granite", "full")],
)
def test_heads_and_target_learn_together(tmp_path, family, target_training):
    joint = trainer(tmp_path, recipe(target_training=target_training), family)
    after = joint.fit()
    before, lm_loss = lm_losses(joint, after)
    assert lm_loss < before - 0.02
    assert min(after.top1) > 0.5


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_the_joint_loss_is_the_papers(family):
    model = Medusa2(build(family), RECIPE).train()
    outputs = model(TOKENS, TOKENS, JOINT)
    logits = model.target(input_ids=TOKENS).logits
    own = functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(outputs["target_loss"], own)
    torch.testing.assert_close(outputs["loss"], own + 0.2 * outputs["heads_loss"])
    judged = model.eval()(TOKENS, TOKENS, JOINT)
    torch.testing.assert_close(judged["loss"], outputs["loss"])
    assert judged["lm_losses"].sum() / judged["lm_positions"].sum() == pytest.approx(own.item(), rel=1e-5)


def test_gradients_of_the_heads_loss_reach_the_target_and_shrink_with_lambda():
    gradients = []
    for weight in (0.5, 1.0):
        model = Medusa2(build("llama"), recipe(target_training="full")).train()
        torch.nn.init.normal_(model.heads.blocks[0].layers[0].weight, generator=torch.Generator().manual_seed(0))
        outputs = model(TOKENS, TOKENS, LossWeights(target=1.0, heads=weight))
        (outputs["loss"] - outputs["target_loss"]).backward()
        gradients.append(model.target.model.layers[0].mlp.up_proj.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(2 * gradients[0], gradients[1])


def test_the_first_stage_is_medusa_1():
    model = Medusa2(build("llama"), recipe(target_training="full")).train()
    outputs = model(TOKENS, TOKENS, LossWeights(target=0.0, heads=0.2))
    hidden = model.target.model(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(outputs["loss"], 0.2 * medusa_loss(model.heads, hidden, TOKENS))
    outputs["loss"].backward()
    assert all(parameter.grad is None for parameter in model.target.parameters())
    assert not model.target.training


def test_the_target_stands_still_in_the_first_stage_and_moves_in_the_second(tmp_path):
    joint = trainer(tmp_path, recipe(heads_only_steps=3), steps=5)
    adapters = {name: p.detach().clone() for name, p in joint.model.named_parameters() if "lora_B" in name}
    moved = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            moved.append(any(not torch.equal(joint.model.get_parameter(name), old) for name, old in adapters.items()))

    joint.add_callback(Watch())
    joint.fit()
    assert moved == [False, False, False, True, True]


def test_lambda_rises_as_a_sine_in_the_second_stage(tmp_path):
    joint = trainer(tmp_path, recipe(heads_only_steps=2), steps=12)
    joint.state.max_steps = 12
    weights = []
    for joint.state.global_step in range(12):
        weights.append(joint.loss_weights())
    assert weights[:2] == [LossWeights(0.0, 0.2)] * 2
    assert {weight.target for weight in weights[2:]} == {1.0}
    assert [weight.heads for weight in weights[2:]] == pytest.approx(
        [0.2 * math.sin(math.pi / 2 * step / 10) for step in range(10)]
    )


def test_lambda_may_be_constant(tmp_path):
    joint = trainer(tmp_path, recipe(heads_weight_schedule="constant"), steps=12)
    assert joint.loss_weights() == LossWeights(1.0, 0.2)


def test_schedules_begin_at_nothing_and_end_in_full():
    assert sine_rise(0, 10) == 0
    assert sine_rise(10, 10) == sine_rise(11, 10) == 1
    assert [second_stage(step, 5, 2, 100) for step in (0, 4, 5, 6, 7)] == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-3)


def test_the_heads_learn_four_times_as_fast_as_the_target(tmp_path):
    joint = trainer(tmp_path, RECIPE)
    heads, target = joint.create_optimizer().param_groups
    assert heads["lr"] == 4 * target["lr"] == 1e-2
    assert {id(p) for p in heads["params"]} == {id(p) for p in joint.model.heads.parameters()}
    adapters = {id(p) for name, p in joint.model.target.named_parameters() if "lora_" in name}
    assert {id(p) for p in target["params"]} == adapters


def test_a_first_stage_without_a_second_is_refused(tmp_path):
    with pytest.raises(ValueError, match="heads_only_steps must be less than 5, the steps of this run, got 5"):
        trainer(tmp_path, recipe(heads_only_steps=5), steps=5).fit()


def test_distillation_measures_the_divergence_from_the_target_without_adapters():
    target = build("llama")
    parameters = sum(parameter.numel() for parameter in target.parameters())
    original = target(input_ids=TOKENS).logits.log_softmax(-1)[:, :-1]
    model = Medusa2(target, recipe(distill=True)).train()
    assert sum(p.numel() for name, p in model.target.named_parameters() if "lora_" not in name) == parameters
    assert model(TOKENS, TOKENS, JOINT)["target_loss"].item() == pytest.approx(0, abs=1e-6)
    for name, parameter in model.target.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trained = model.target(input_ids=TOKENS).logits.log_softmax(-1)[:, :-1]
    expected = (original.exp() * (original - trained)).sum(-1).mean()
    assert expected > 1e-3
    torch.testing.assert_close(model(TOKENS, TOKENS, JOINT)["target_loss"], expected)
    assert model.target.training


def test_distillation_keeps_the_target_where_it_was(tmp_path):
    changes = []
    for distill in (False, True):
        joint = trainer(tmp_path, recipe(distill=distill))
        original = joint.model.target(input_ids=TOKENS).logits.detach()
        after = joint.fit()
        assert min(after.top1) > 0.5
        changes.append((joint.model.eval().target(input_ids=TOKENS).logits - original).abs().mean().item())
    assert changes[1] < changes[0] / 2


def test_adapters_go_where_they_are_told():
    model = Medusa2(build("llama"), recipe(lora_targets=("q_proj",)))
    assert {name.split(".")[-4] for name, p in model.target.named_parameters() if p.requires_grad} == {"q_proj"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("nowhere",), r"lora_targets \['nowhere'\]"), (("lm_head",), "lora_targets must not name the LM head")],
)
def test_adapters_that_cannot_be_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        Medusa2(build("llama"), recipe(lora_targets=targets))


@pytest.mark.parametrize("changes", [{}, {"distill": True}, {"target_training": "full"}])
def test_recomputed_layers_give_the_same_gradients(changes):
    gradients = []
    for recompute in (False, True):
        target = build("llama")
        if recompute:
            target.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model = Medusa2(target, recipe(**changes)).train()
        torch.nn.init.normal_(model.heads.blocks[0].layers[0].weight)
        model(TOKENS, TOKENS, JOINT)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])
