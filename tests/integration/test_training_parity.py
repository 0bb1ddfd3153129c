# SPDX-License-Identifier: Apache-2.0
"""The heads' inputs and predictions in vLLM are those of training, position by position."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from tests.integration.engines import engine, greedy, model_runner
from tests.unit.tiny_targets import all_logits
from vllm_medusa.checkpoint.format import read_spec, write_heads
from vllm_medusa.evaluation.measure import load_heads
from vllm_medusa.model.heads import MedusaHeads
from vllm_medusa.training.accuracy import HeldOut, score_heads
from vllm_medusa.training.config import Medusa1Config, TrainConfig
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.training.hidden import final_hidden_states
from vllm_medusa.training.load import load_target
from vllm_medusa.training.medusa1 import train_medusa1
from vllm_medusa.training.results import TrainResult
from vllm_medusa.training.run import run_training

NEW_TOKENS = 64
LENGTH = 48
VOCABULARY = 96


@dataclass(frozen=True)
class Seen:
    """The inputs and predictions of vLLM's heads in one decode.

    Attributes:
        tokens: ``[length]``: prompt and continuation.
        positions: ``[steps]``: the positions of the states.
        hidden: ``[steps, hidden_size]``: the heads' inputs.
        choices: ``[steps, heads]``: the heads' most probable tokens.

    """

    tokens: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor
    choices: torch.Tensor


def decode_watched(target: Path, heads: Path, prompts: list[list[int]]) -> list[Seen]:
    """Decode prompts one after another with a branching tree that all heads draft, and record the heads."""
    tree = [2, 2, *[1] * (read_spec(heads).num_heads - 2)]
    with engine(target, heads=heads, tree=tree, max_model_len=192) as llm, watched_heads(llm) as calls:
        seen = []
        for index, prompt in enumerate(prompts):
            calls.clear()
            emitted: list[int] = []
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(NEW_TOKENS))
            output = None
            while output is None or not output.finished:
                for output in llm.llm_engine.step():
                    emitted.append(len(output.outputs[0].token_ids))
            tokens = torch.tensor(prompt + list(output.outputs[0].token_ids))
            hidden = torch.cat([hidden for hidden, _ in calls])
            choices = torch.cat([choices for _, choices in calls])
            # The state at position p gave the token at p + 1, the last one emitted.
            positions = len(prompt) + torch.tensor(emitted) - 2
            # The last step's tokens were cut to the number asked for, so its position is not known.
            assert len(positions) == len(hidden)
            seen.append(Seen(tokens, positions[:-1], hidden[:-1], choices[:-1]))
    return seen


@contextmanager
def watched_heads(llm) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect the heads' inputs and each head's most probable token."""
    heads = model_runner(llm).drafter.model
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], blocks: torch.Tensor) -> None:
        calls.append((inputs[0].clone(), drafted(heads, heads.compute_logits(blocks)).T))

    handle = heads.register_forward_hook(watch)
    try:
        yield calls
    finally:
        handle.remove()


def drafted(heads: MedusaHeads | TrainableHeads, logits: torch.Tensor) -> torch.Tensor:
    """Return the heads' most probable tokens."""
    rows = logits.argmax(-1)
    return rows if heads.token_map is None else heads.token_map[rows]


def assert_parity(target_directory: Path, heads_directory: Path, prompts: list[list[int]]) -> None:
    settings = {"target": str(target_directory), "data": ["unused"], "output": "unused", "dtype": "float32"}
    target = load_target(TrainConfig(**settings)).eval()
    heads = load_heads(heads_directory, target_directory, target)
    agreeing = positions = 0
    hits = torch.zeros(2, heads.spec.num_heads)
    for seen in decode_watched(target_directory, heads_directory, prompts):
        with torch.no_grad():
            hidden = final_hidden_states(target, seen.tokens[None])[0]
            choices = drafted(heads, all_logits(heads, hidden)).T
        here = seen.positions
        torch.testing.assert_close(seen.hidden, hidden[here], rtol=1e-3, atol=1e-3)
        agreeing += int((seen.choices == choices[here]).sum())
        positions += seen.choices.numel()
        judged = here[here < len(seen.tokens) - heads.spec.num_heads - 1]
        for head in range(heads.spec.num_heads):
            right = seen.tokens[judged + head + 2]
            hits[0, head] += (seen.choices[: len(judged), head] == right).sum()
            hits[1, head] += (choices[judged, head] == right).sum()
    assert positions > 300
    assert agreeing / positions > 0.995
    assert hits[1].min() > 0
    torch.testing.assert_close(hits[0], hits[1], rtol=0.01, atol=2)


def test_trained_heads_are_as_right_in_vllm_as_in_training(tiny_target, tiny_heads, held_out_prompts):
    assert_parity(tiny_target, tiny_heads, held_out_prompts[:6])


@pytest.mark.parametrize("family", ["Qwen3Config", "Gemma2Config", "OPTConfig"])
def test_families_agree_on_what_enters_the_lm_head(tmp_path, family):
    """Heads are trained on a random target's own texts. The families have tied weights, capped logits and LayerNorm."""
    target = random_target(family)
    target.save_pretrained(tmp_path / "target")
    prompts = torch.randint(VOCABULARY, (64, 8), generator=torch.Generator().manual_seed(1))
    own = target.generate(prompts, do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH, pad_token_id=0)
    config = Medusa1Config(num_heads=3, steps=40, batch_size=16, learning_rate=3e-3, prompt_length=8)
    result = train_medusa1(target, own[16:], own[:16], config, show_progress=False)
    write_heads(tmp_path / "heads", result.heads.spec, result.heads.state_dict())
    with torch.no_grad():
        again = score_heads(result.heads, final_hidden_states(target, own[:16]), own[:16], 1)
    figures = HeldOut.of(again.hits.numpy(), again.losses.numpy(), again.positions.numpy(), again.drafted.numpy())
    assert min(figures.top1) > 0.05
    assert_parity(tmp_path / "target", tmp_path / "heads", prompts[:6].tolist())


@pytest.mark.parametrize("shared", [True, False])
def test_heads_of_a_draft_vocabulary_are_served_as_they_were_trained(tmp_path, tiny_target, held_out_prompts, shared):
    """They learn the target's distribution from kept states."""
    options = {"draft_vocab": 200, "shared_lm_head": shared, "heads_loss": "kl", "cache_hidden": True}
    heads = trained(tiny_target, held_out_prompts, tmp_path, **options, steps=20, learning_rate=3e-3).heads
    assert read_spec(heads).draft_vocab_size == 200
    assert_parity(tiny_target, heads, held_out_prompts[:6])


def test_what_medusa_2_writes_is_served_as_it_was_trained(tmp_path, tiny_target, held_out_prompts):
    options = {"method": "medusa2", "steps": 6, "heads_weight_schedule": "constant"}
    result = trained(tiny_target, held_out_prompts, tmp_path, **options)
    assert result.target is not None
    assert_parity(result.target, result.heads, held_out_prompts[:6])


def trained(target: Path, prompts: list[list[int]], directory: Path, **options: object) -> TrainResult:
    """Train two heads on prompts that parity is not judged on."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [{"text": tokenizer.decode(prompt)} for prompt in prompts[6:70]]
    (directory / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    files = {"target": str(target), "data": [directory / "texts.jsonl"], "output": directory / "out"}
    settings = {"warmup_steps": 1, "block_length": 64, "num_heads": 2}
    result = run_training(TrainConfig(**files, **settings, **options), [], show_progress=False)
    assert result is not None
    return result


def random_target(family: str):
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.08,
    }
    options = {
        "Qwen3Config": {"head_dim": 32, "tie_word_embeddings": True},
        "Gemma2Config": {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0},
        "OPTConfig": {"ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": 0.08, "tie_word_embeddings": True},
    }[family]
    config: PretrainedConfig = getattr(transformers, family)(**(sizes | options))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()
