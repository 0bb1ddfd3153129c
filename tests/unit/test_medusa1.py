import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_medusa.training.medusa1 import Medusa1Config, final_hidden_states, labels_of, train_medusa1
from vllm_medusa.training.schedule import cosine_with_warmup, linear_with_warmup


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return LlamaForCausalLM(config).eval()


def counting(blocks: int, seed: int) -> torch.Tensor:
    """Texts that count up from anywhere, modulo 16."""
    starts = torch.randint(16, (blocks, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(24)) % 16


def test_hidden_states_are_what_goes_into_the_lm_head(target):
    tokens = counting(2, 0)
    hidden = final_hidden_states(target, tokens)
    torch.testing.assert_close(target.lm_head(hidden), target(input_ids=tokens).logits)
    assert not hidden.requires_grad


def test_heads_learn_to_look_ahead_and_the_target_stays(target):
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    config = Medusa1Config(num_heads=3, steps=60, batch_size=8, learning_rate=1e-2, ranks=4)
    result = train_medusa1(target, counting(64, 0), counting(8, 1), config, show_progress=False)
    assert min(result.top1) > 0.95
    assert result.accuracies.shape == (3, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_a_run_is_repeatable(target):
    config = Medusa1Config(num_heads=2, steps=3, batch_size=4, warmup_steps=1)
    states = [
        train_medusa1(target, counting(16, 0), counting(4, 1), config, show_progress=False).heads.state_dict()
        for _ in range(2)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_prompts_are_no_labels():
    assert labels_of(torch.tensor([[5, 6, 7]]), 2).tolist() == [[-100, -100, 7]]
    assert labels_of(torch.tensor([[5, 6, 7]]), 0).tolist() == [[5, 6, 7]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("warmup_steps", 201),
        ("weight_decay", -0.1),
        ("decay", 0.0),
        ("decay", 1.1),
        ("prompt_length", -1),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        Medusa1Config(**{name: value})


def test_the_learning_rate_rises_and_falls():
    cosine = [cosine_with_warmup(step, 10, 100) for step in range(100)]
    assert cosine[0] == pytest.approx(0.1)
    assert max(cosine) == cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[-1] < 0.001
    linear = [linear_with_warmup(step, 10, 100) for step in range(100)]
    assert linear[0] == pytest.approx(0.1)
    assert linear[10:41] == [1.0] * 31
    assert linear[70] == pytest.approx(0.5)
    assert linear[-1] < 0.02
