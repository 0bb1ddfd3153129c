# SPDX-License-Identifier: Apache-2.0
"""What a step has to do is counted as the models say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_bench.kernels import draft_tree
from gpu_bench.models import AttentionShape, Heads, Target, write_heads, write_target
from gpu_bench.roofline import Rates
from gpu_bench.settings import full
from vllm_medusa.checkpoint.format import HeadsSpec

SMALL = Target(64, 160, 3, 96, AttentionShape("small", 4, 2, 16, "float32", "float32"))


def test_a_target_has_the_parameters_of_the_llama_that_its_configuration_makes() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SMALL.config()))
    assert SMALL.parameters == sum(weight.numel() for weight in llama.parameters())
    assert SMALL.weight_bytes == 4 * SMALL.parameters


def test_the_target_at_full_size_is_7b_shaped() -> None:
    assert full(1).target.parameters == 7_241_732_096


def test_sizes_that_were_written_are_read_again(tmp_path: Path) -> None:
    target = Target.of(write_target(tmp_path / "target", SMALL), "float32")
    assert replace(target.attention, name="small") == SMALL.attention
    assert replace(target, attention=SMALL.attention) == SMALL
    heads = Heads(SMALL.hidden, 32, 2, False, "float32")
    directory = write_heads(tmp_path / "heads", heads, 3, SMALL.vocab)
    assert Heads.of(directory, SMALL) == heads
    assert Heads.number_in(directory) == 3


def test_heads_that_name_no_truncated_vocabulary_know_the_targets(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 5, "medusa_num_layers": 1}))
    assert Heads.of(tmp_path, SMALL) == Heads(SMALL.hidden, SMALL.vocab, 1, False, "float32")
    assert Heads.number_in(tmp_path) == 5


def test_a_target_that_is_no_llama_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"--target: .* model of type 'gpt2'; give a Llama"):
        Target.of(tmp_path, "float32")


def test_attention_reads_each_key_and_value_once_and_multiplies_each_pair_that_is_seen_twice() -> None:
    shape, tree, context, requests = AttentionShape("any", 8, 2, 4, "bfloat16", "float16"), draft_tree(6), 10, 3
    work = shape.work(requests, len(tree), context, own_pairs=int(tree.ancestors.sum()))
    query = torch.zeros(requests, len(tree), shape.heads, shape.head_dim, dtype=torch.bfloat16)
    cached = torch.zeros(requests, context + len(tree), 2, shape.kv_heads, shape.head_dim, dtype=torch.float16)
    assert work.bytes == cached.nbytes + 2 * query.nbytes
    seen = requests * (len(tree) * context + int(tree.ancestors.sum()))
    assert work.operations == 2 * 2 * seen * shape.heads * shape.head_dim
    assert work.dtype == "bfloat16"


def test_a_step_reads_the_weights_once_however_many_rows_it_has() -> None:
    one, many = SMALL.work(1, 1, context=0), SMALL.work(2, 8, context=0)
    products = SMALL.layers * SMALL.layer_parameters, SMALL.vocab * SMALL.hidden
    for step, tokens in ((one, 1), (many, 16)):
        layers, _, lm_head = step
        assert (layers.bytes, lm_head.bytes) == tuple(4 * each for each in products)
        assert (layers.operations, lm_head.operations) == tuple(2 * tokens * each for each in products)


@pytest.mark.parametrize("shared", [True, False])
def test_a_proposal_reads_the_heads_weights_once(shared: bool) -> None:
    spec = HeadsSpec(hidden_size=16, vocab_size=48, num_heads=3, num_layers=2, fc_bias=False, shared_lm_head=shared)
    stored = sum(torch.Size(shape).numel() for shape in spec.shapes().values())
    stages = Heads(16, 48, 2, shared, "float32").work(requests=5, depth=3)
    assert sum(stage.bytes for stage in stages) == 4 * stored
    assert stages[1].operations == 2 * 5 * 3 * 48 * 16


@pytest.mark.parametrize(("vocab", "shared"), [(32000, True), (8192, False), (32000, False)])
def test_the_goal_of_a_step_leaves_less_room_with_own_lm_heads(vocab: int, shared: bool) -> None:
    """On a device on which 64 rows are still bound by bytes; the published tree of 63 nodes is three deep."""
    target, rates = full(1).target, Rates(1.0, {"bfloat16": 1e9})
    heads = Heads(target.hidden, vocab, 1, shared, "bfloat16")
    tree = rates.floor([*target.work(1, 64, 192), *heads.work(1, depth=3)])
    floor = tree.seconds / rates.floor(target.work(1, 1, 192)).seconds
    assert floor < 1.03 if vocab == 8192 or shared else 1.06 < floor < 1.08
