# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.unit.tiny_targets import VOCABULARY, all_logits, build, counting
from vllm_medusa.data.packing import IGNORED
from vllm_medusa.training import teacher as module
from vllm_medusa.training.config import Medusa2Recipe, Recipe
from vllm_medusa.training.hidden import final_hidden_states
from vllm_medusa.training.medusa1 import Medusa1
from vllm_medusa.training.medusa2 import LossWeights, Medusa2
from vllm_medusa.training.target_logits import TargetLogits
from vllm_medusa.training.teacher import Teacher

TOKENS = counting(3, 0)
RECIPE = Recipe(num_heads=3, chunk_size=16)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("kept", [4, VOCABULARY])
def test_the_most_probable_tokens_are_the_targets_own(monkeypatch, family, kept):
    monkeypatch.setattr(module, "TOP_TOKENS", kept)
    target = build(family)
    top = Teacher(TargetLogits(target), chunk_size=5)(final_hidden_states(target, TOKENS))
    with torch.no_grad():
        expected = target(input_ids=TOKENS).logits.float().log_softmax(-1).topk(kept)
    torch.testing.assert_close(top.log_probs.float(), expected.values, rtol=2e-3, atol=2e-3)
    agreeing = (top.tokens == expected.indices).float().mean()
    assert agreeing > 0.95  # Near-ties may change places.


def test_the_loss_is_the_divergence_of_the_distribution_of_each_heads_own_token():
    model = Medusa1(build("llama"), RECIPE, learns="kl").train()
    torch.nn.init.normal_(model.heads.blocks[1].layers[0].weight, std=0.3)
    labels = TOKENS.clone()
    labels[0, :9] = IGNORED
    with torch.no_grad():
        hidden = final_hidden_states(model.target, TOKENS)
        target = model.target(input_ids=TOKENS).logits.log_softmax(-1)
        heads = all_logits(model.heads, hidden).log_softmax(-1)
        expected = 0.0
        for k in (1, 2, 3):
            p, q = target[:, k:-1], heads[k - 1, :, : -k - 1]
            each = (p.exp() * (p - q)).sum(-1)
            expected += 0.8**k * float(each[labels[:, k + 1 :] != IGNORED].mean())
    assert model(TOKENS, labels)["loss"].item() == pytest.approx(expected, rel=2e-2)


def test_heads_learn_what_the_target_says_and_not_the_text():
    """The text is noise; the target's distribution is a function of the state that gave it."""
    target = build("llama")
    torch.nn.init.normal_(target.lm_head.weight, std=1.0)
    model = Medusa1(target, Recipe(num_heads=1), learns="kl").train()
    noise = torch.randint(VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.heads.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(30):
        loss = model(noise, noise)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_medusa_2_learns_the_distribution_of_the_target_as_it_is():
    model = Medusa2(build("llama"), Medusa2Recipe(num_heads=2, target_training="full"), learns="kl").train()
    outputs = model(TOKENS, TOKENS, LossWeights(target=1.0, heads=1.0))
    outputs["loss"].backward()
    assert 0 < outputs["heads_loss"].item() < outputs["target_loss"].item()
    gradient = model.heads.blocks[1].layers[0].weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
