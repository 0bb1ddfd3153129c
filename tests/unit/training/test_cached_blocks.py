# SPDX-License-Identifier: Apache-2.0
"""Training from kept hidden states, against training that computes them at every pass."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.training.test_run import data, medusa1, run, settings, target
from vllm_medusa.checkpoint.format import read_state
from vllm_medusa.training import cached_blocks as module
from vllm_medusa.training.config import TrainConfig

__all__ = ["data", "settings", "target"]  # Fixtures.

FILES = ["hidden.bin", "top_log_probs.bin", "top_tokens.bin"]


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    state: dict[str, torch.Tensor]
    accuracies: list[list[float]]


def trained(config: TrainConfig) -> Trained:
    result = run(config)
    (last,) = config.output.glob(f"checkpoints/checkpoint-{result.steps}/trainer_state.json")
    log = json.loads(last.read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return Trained(losses, read_state(result.heads), result.after.accuracies)


@pytest.fixture
def passes(monkeypatch):
    """The batches that the target has been given."""
    seen = []
    original = module.final_hidden_states
    for place in ("cached_blocks", "medusa1"):
        monkeypatch.setattr(
            f"vllm_medusa.training.{place}.final_hidden_states",
            lambda model, tokens: [seen.append(tokens), original(model, tokens)][1],
        )
    return seen


@pytest.mark.parametrize("heads_loss", ["cross_entropy", "kl"])
@pytest.mark.parametrize("more", [{}, {"draft_vocab": 9}, {"mixed_precision": "bf16"}])
def test_kept_states_give_the_same_losses_and_heads(settings, tmp_path, heads_loss, more):
    changes = {"dtype": "bfloat16", "heads_loss": heads_loss, "logging_steps": 1, "steps": 12, **more}
    plain = trained(medusa1(settings, **changes, output=tmp_path / "plain"))
    cached = trained(medusa1(settings, **changes, output=tmp_path / "cached", cache_hidden=True))
    assert len(plain.losses) == 12
    assert cached.losses == pytest.approx(plain.losses, rel=1e-3)
    assert plain.losses[-1] < 0.9 * plain.losses[0]
    torch.testing.assert_close(cached.state, plain.state, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(torch.tensor(cached.accuracies), torch.tensor(plain.accuracies), rtol=0, atol=0.02)
    kept = sorted(path.name for path in (tmp_path / "cached" / "hidden_states").glob("*.bin"))
    assert kept == (FILES if heads_loss == "kl" else FILES[:1])


def test_states_of_a_target_in_32_bits_are_rounded(settings, tmp_path):
    changes = {"dtype": "float32", "logging_steps": 1}
    plain = trained(medusa1(settings, **changes, output=tmp_path / "plain"))
    cached = trained(medusa1(settings, **changes, output=tmp_path / "cached", cache_hidden=True))
    assert cached.losses != plain.losses
    assert cached.losses == pytest.approx(plain.losses, rel=1e-2)


def test_the_target_computes_each_block_once(settings, tmp_path, passes):
    changes = {"cache_hidden": True, "cache_directory": tmp_path / "cache", "steps": None, "epochs": 3, "eval_steps": 2}
    run(medusa1(settings, **changes))
    blocks = sum(len(tokens) for tokens in passes)
    assert blocks == (tmp_path / "cache" / "hidden.bin").stat().st_size // (24 * 32 * 2)
    run(medusa1(settings, **changes, output=tmp_path / "again", learning_rate=1e-3))
    assert sum(len(tokens) for tokens in passes) == blocks


def test_a_killed_writer_goes_on_where_it_stopped(settings, tmp_path, passes, monkeypatch):
    whole = trained(medusa1(settings, cache_hidden=True, heads_loss="kl", output=tmp_path / "whole"))
    blocks = sum(len(tokens) for tokens in passes)
    passes.clear()
    append, appended = module.HiddenCache.append, []

    def killed(cache, outputs):
        if len(appended) == 2:
            raise KeyboardInterrupt
        appended.append(len(outputs["hidden"]))
        append(cache, outputs)

    monkeypatch.setattr(module.HiddenCache, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        run(medusa1(settings, cache_hidden=True, heads_loss="kl"))
    monkeypatch.setattr(module.HiddenCache, "append", append)
    passes.clear()
    again = trained(medusa1(settings, cache_hidden=True, heads_loss="kl"))
    assert sum(len(tokens) for tokens in passes) == blocks - sum(appended)
    for name in FILES:
        contents = [(root / "hidden_states" / name).read_bytes() for root in (settings["output"], tmp_path / "whole")]
        assert contents[0] == contents[1], name
    assert again.losses == whole.losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "another target, or of the same in another dtype"),
        ({"mixed_precision": "bf16"}, "another target, or of the same in another dtype or precision"),
        ({"block_length": 32}, "blocks of another length"),
        ({"seed": 1}, "other data, or of the same packed or split"),
    ],
)
def test_a_stale_cache_is_refused_in_one_line(settings, tmp_path, changes, message):
    cached = {"cache_hidden": True, "cache_directory": tmp_path / "cache"}
    run(medusa1(settings, **cached))
    with pytest.raises(
        ValueError, match=f"{tmp_path / 'cache'} holds hidden states of {message}.*; give another"
    ) as said:
        run(medusa1(settings, **cached, **changes, resume="never"))
    assert "\n" not in str(said.value)


def test_another_target_of_the_same_sizes_is_noticed(settings, target, tmp_path):
    cached = {"cache_hidden": True, "cache_directory": tmp_path / "cache"}
    run(medusa1(settings, **cached))
    moved = tmp_path / "moved"
    model = AutoModelForCausalLM.from_pretrained(target)
    for directory, change in ((moved, 1.0), (tmp_path / "other", 1.01)):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(change)
        model.save_pretrained(directory)
        for file in target.glob("tokenizer*"):
            (directory / file.name).write_bytes(file.read_bytes())
    run(medusa1(settings, **cached, target=str(moved), output=tmp_path / "a"))
    with pytest.raises(ValueError, match="holds hidden states of another target"):
        run(medusa1(settings, **cached, target=str(tmp_path / "other"), output=tmp_path / "b"))


def test_the_size_is_told_before_it_is_written(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module.HiddenCache, "begin", lambda cache: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        module_run(medusa1(settings, cache_hidden=True))
    assert f"Hidden states are kept in {settings['output'] / 'hidden_states'}: 0.00 GiB for" in capsys.readouterr().err


def module_run(config: TrainConfig) -> None:
    from vllm_medusa.training.run import run_training

    run_training(config, [], show_progress=True)
