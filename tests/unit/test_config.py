# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.unit.engine_configs import LLAMA, Models
from vllm_medusa.compat.names import ENGINE_METHOD, PROPOSER
from vllm_medusa.config import (
    BUDGETED_NUM_NODES,
    DEFAULT_NUM_NODES,
    MedusaSpeculativeConfig,
    medusa_config,
)
from vllm_medusa.runner.proposer import MedusaProposer
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.dynamic import DynamicTree
from vllm_medusa.tree.static import MAX_NODES, StaticTree, cartesian


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def test_the_method_and_the_heads_are_all_that_must_be_given(models: Models) -> None:
    config = models.configure({})
    medusa = medusa_config(config)
    assert medusa is not None
    assert medusa.num_speculative_tokens == BUDGETED_NUM_NODES["cpu"] == len(medusa.tree) - 1
    assert not medusa.tree.topology.is_chain
    assert medusa.heads.num_heads == 4
    assert (medusa.method, medusa.model) == (ENGINE_METHOD, PROPOSER)
    assert config.parallel_config.worker_cls == "vllm_medusa.runner.cpu_worker.MedusaCPUWorker"


def test_flags_say_the_same_as_the_json(models: Models) -> None:
    heads = models.heads()
    engine_args = EngineArgs(
        model=models.write("target", LLAMA),
        spec_method="medusa",
        spec_model=heads,
        spec_tokens=3,
        speculative_config={"medusa-tree": [2, 2]},
        skip_tokenizer_init=True,
    )
    medusa = medusa_config(engine_args.create_engine_config())
    assert medusa is not None
    assert medusa.draft_model_config.model == heads
    assert medusa.tree.choices == cartesian([2, 2]).prefix(4).choices


def test_a_flag_that_contradicts_the_json_is_refused(models: Models) -> None:
    message = models.refusal({"num_speculative_tokens": 3}, spec_tokens=4)
    assert "['num_speculative_tokens'] is 3" in message
    assert "4" in message


def test_sizes_that_the_heads_leave_out_are_the_targets(models: Models) -> None:
    heads = models.write("sparing", {"medusa_num_heads": 3, "medusa_num_layers": 2, "base_model_name_or_path": "x"})
    config = models.medusa({"model": heads}, load_format="dummy").heads
    assert (config.num_heads, config.num_hidden_layers) == (3, 2)
    assert (config.hidden_size, config.vocab_size, config.truncated_vocab_size) == (64, 96, 96)


@pytest.mark.parametrize(
    ("tree", "choices"),
    [
        ("chain", [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]),
        ([2, 1], [[0], [1], [0, 0], [1, 0]]),
        ([[1], [0], [1, 2]], [[1], [0], [1, 2]]),
    ],
)
@pytest.mark.parametrize("form", ["option", "file", "file with a key", "checkpoint"])
def test_a_tree_is_the_same_from_the_options_a_file_or_the_checkpoint(
    models: Models, tmp_path: Path, tree: Any, choices: list[list[int]], form: str
) -> None:
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"medusa_tree": tree} if form == "file with a key" else tree))
    match form:
        case "option":
            options = {"medusa_tree": tree}
        case "checkpoint":
            options = {"model": models.heads(medusa_tree=tree)}
        case _:
            options = {"medusa_tree": str(path)}
    assert sorted(models.medusa(options).tree.choices) == sorted(choices)


def test_the_options_tree_goes_before_the_checkpoints(models: Models) -> None:
    heads = models.heads(medusa_tree=[2])
    assert models.medusa({"model": heads, "medusa_tree": "chain"}).tree.topology.is_chain


def test_a_sparse_tree_grows_from_the_checkpoints_accuracies(models: Models) -> None:
    heads = models.heads(medusa_accuracies=[[0.4, 0.35, 0.2], [0.1, 0.05, 0.01], [0.1, 0.0, 0.0], [0.1, 0.0, 0.0]])
    options = {"model": heads, "num_speculative_tokens": 4}
    assert models.medusa(dict(options)).tree.choices == [[0], [1], [2], [0, 0]]
    assert models.medusa({**options, "medusa_top_k": 2}).tree.choices == [[0], [1], [0, 0], [1, 0]]


def test_a_sparse_tree_grows_from_the_checkpoints_paths_where_there_are_enough(models: Models) -> None:
    accuracies = [[0.4, 0.35, 0.2], [0.1, 0.05, 0.01], [0.1, 0.0, 0.0], [0.1, 0.0, 0.0]]
    paths = {"0": 0.4, "0,0": 0.3, "1": 0.35, "0,0,0": 0.25, "1,2": 0.1}
    options = {"model": models.heads(medusa_accuracies=accuracies, medusa_path_accuracies=paths)}
    assert models.medusa({**options, "num_speculative_tokens": 4}).tree.choices == [[0], [1], [0, 0], [0, 0, 0]]
    assert models.medusa({**options, "num_speculative_tokens": 6}).tree.choices[:4] == [[0], [1], [2], [0, 0]]
    narrow = {**options, "num_speculative_tokens": 4, "medusa_top_k": 2}
    assert models.medusa(narrow).tree.choices == [[0], [1], [0, 0], [0, 0, 0]]


def test_paths_are_looked_up_where_the_checkpoint_has_weights_and_the_option_is_on(models: Models) -> None:
    weights = [[0.1, 0.5]] * 4
    heads = models.heads(medusa_lookup_weights=weights, medusa_tree="dynamic")
    default = models.medusa({"model": heads})
    assert default.lookup_weights == weights
    assert isinstance(default.tree, BeamTree)
    off = models.medusa({"model": heads, "medusa_lookup": False})
    assert off.lookup_weights is None
    assert isinstance(off.tree, DynamicTree)
    assert models.medusa({}).lookup_weights is None


@pytest.mark.parametrize("form", ["option", "file", "checkpoint"])
def test_a_dynamic_tree_has_the_nodes_and_the_least_probability_asked_for(
    models: Models, tmp_path: Path, form: str
) -> None:
    path = tmp_path / "tree.json"
    path.write_text('"dynamic"')
    options: dict[str, Any] = {
        "option": {"medusa_tree": "dynamic"},
        "file": {"medusa_tree": str(path)},
        "checkpoint": {"model": models.heads(medusa_tree="dynamic")},
    }[form]
    default = models.medusa(dict(options))
    assert isinstance(default.tree, DynamicTree)
    assert (default.medusa_tree, default.num_speculative_tokens) == ("dynamic", BUDGETED_NUM_NODES["cpu"])
    assert (default.tree.top_k, default.tree.min_probability) == (10, 0.0)
    asked = models.medusa(
        {**options, "num_speculative_tokens": 20, "medusa_top_k": 3, "medusa_min_probability": 0.25}
    ).tree
    assert isinstance(asked, DynamicTree)
    assert (asked.num_nodes, asked.top_k, asked.min_probability) == (20, 3, 0.25)


@pytest.mark.parametrize("budget", ["off", 8])
def test_a_tree_of_which_no_part_is_chosen_by_cost_is_small_on_a_cpu(models: Models, budget: str | int) -> None:
    medusa = models.medusa({"medusa_budget": budget})
    assert (medusa.medusa_budget, medusa.num_speculative_tokens) == (budget, DEFAULT_NUM_NODES["cpu"])
    assert DEFAULT_NUM_NODES["cpu"] < BUDGETED_NUM_NODES["cpu"]


@pytest.mark.parametrize(
    ("budget", "is_judged"),
    [("auto", True), (8, True), ("off", False)],
)
def test_drafts_of_a_static_tree_say_how_probable_they_are_where_a_budget_asks(
    models: Models, budget: str | int, is_judged: bool
) -> None:
    options = models.medusa({"medusa_budget": budget, "medusa_tree": [20, 2, 1]})
    tree = MedusaProposer(SimpleNamespace(speculative_config=options)).tree
    assert isinstance(tree, StaticTree)
    assert (tree.log_probs is not None) is is_judged


def test_num_speculative_tokens_cuts_a_tree_to_its_first_nodes(models: Models) -> None:
    cut = models.medusa({"medusa_tree": [3, 2], "num_speculative_tokens": 4})
    assert cut.tree.choices == cartesian([3, 2]).choices[:4]
    assert cut.num_speculative_tokens == 4


def test_num_speculative_tokens_is_a_bound_that_a_smaller_tree_need_not_reach(models: Models) -> None:
    assert models.medusa({"medusa_tree": [2], "num_speculative_tokens": 40}).num_speculative_tokens == 2


@pytest.mark.parametrize("tree", [[10] * 4, [10_000] * 4, [1024, 1], [[rank] for rank in range(1025)]])
def test_too_large_a_tree_is_refused_before_it_is_built(models: Models, tree: Any) -> None:
    start = time.process_time()
    assert f"give a tree of at most {MAX_NODES}" in models.refusal({"medusa_tree": tree})
    assert time.process_time() - start < 2


def test_the_largest_tree_is_accepted(models: Models) -> None:
    target = {**LLAMA, "vocab_size": 2048}
    medusa = models.medusa({"model": models.heads(vocab_size=2048), "medusa_tree": [MAX_NODES]}, target=target)
    assert medusa.num_speculative_tokens == MAX_NODES


def test_a_gpu_gets_its_worker_and_a_wider_tree(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_medusa.config.current_platform", SimpleNamespace(device_type="cuda"))
    config = models.configure({})
    assert config.parallel_config.worker_cls == "vllm_medusa.runner.gpu_worker.MedusaGPUWorker"
    assert config.speculative_config.num_speculative_tokens == DEFAULT_NUM_NODES["cuda"] > BUDGETED_NUM_NODES["cpu"]


def described(config: MedusaSpeculativeConfig | None) -> tuple[Any, ...]:
    assert config is not None
    assert isinstance(config.tree, StaticTree)
    return (
        config.method,
        config.model,
        config.num_speculative_tokens,
        config.tree.choices,
        config.draft_model_config.model,
        config.heads.to_dict(),
    )


def test_the_configuration_reaches_workers_by_pickle_unchanged(models: Models) -> None:
    config = models.configure({"medusa_tree": [2, 2]})
    copied = pickle.loads(pickle.dumps(config))
    assert described(medusa_config(copied)) == described(medusa_config(config))
    assert copied.parallel_config.worker_cls == config.parallel_config.worker_cls


def test_the_configuration_survives_being_replaced(models: Models) -> None:
    medusa = models.medusa({"medusa_tree": [2, 2], "medusa_top_k": 3})
    copied = dataclasses.replace(medusa, revision="main")
    assert isinstance(copied, MedusaSpeculativeConfig)
    assert described(copied) == described(medusa)
    assert (copied.revision, copied.medusa_top_k) == ("main", 3)


@pytest.mark.parametrize(
    ("tree", "shown"), [([2, 2], "6 nodes, 2 deep"), ("chain", "4 nodes, 4 deep"), ("dynamic", "dynamic")]
)
def test_the_configuration_shows_what_matters_in_a_few_words(models: Models, tree: Any, shown: str) -> None:
    medusa = models.medusa({"medusa_tree": tree})
    assert repr(medusa) == (
        f"MedusaSpeculativeConfig(model={medusa.draft_model_config.model!r}, num_heads=4, medusa_tree=<{shown}>)"
    )
