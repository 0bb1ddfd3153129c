# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import silu
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from vllm_medusa.checkpoint.format import HeadsSpec, path_shapes
from vllm_medusa.config import medusa_config
from vllm_medusa.model.heads import MedusaHeads
from vllm_medusa.model.lm_heads import CalibratedLMHead
from vllm_medusa.training.heads import TrainableHeads
from vllm_medusa.tree.beam import BeamTree
from vllm_medusa.tree.options import TreeOptions

HIDDEN, VOCAB, HEADS = 32, 96, 3
"""The vocabulary is no multiple of 64, to which vLLM pads LM heads: padding must never be drafted."""

State = dict[str, torch.Tensor]
Load = Callable[..., MedusaHeads]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The process group of one process that vLLM's layers ask for."""
    store = tmp_path_factory.mktemp("group") / "store"
    init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    config = EngineArgs(model=write_target(store.parent), skip_tokenizer_init=True).create_engine_config()
    with set_current_vllm_config(config):
        initialize_model_parallel(1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


def write_target(directory: Path) -> str:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    (directory / "target").mkdir(exist_ok=True)
    (directory / "target" / "config.json").write_text(json.dumps(config))
    return str(directory / "target")


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Write heads as a checkpoint and load them as an engine does."""
    # vLLM's CPU runner does this to its process, and its model loader relies on it.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)

    def load_heads(
        state: State,
        file: str = "model.safetensors",
        tree: Any = "chain",
        overrides: dict[str, str] | None = None,
        **config: Any,
    ) -> MedusaHeads:
        heads = tmp_path / "heads"
        heads.mkdir()
        config = {"num_heads": HEADS, "hidden_size": HIDDEN, "vocab_size": VOCAB, **config}
        (heads / "config.json").write_text(json.dumps(config))
        if file.endswith(".safetensors"):
            save_file(state, heads / file)
        else:
            torch.save(state, heads / file)
        vllm_config = EngineArgs(
            model=write_target(tmp_path),
            speculative_config={"method": "medusa", "model": str(heads), "medusa_tree": tree},
            hf_overrides=overrides or {},
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
        ).create_engine_config()
        medusa = medusa_config(vllm_config)
        assert medusa is not None
        with set_current_vllm_config(vllm_config):
            model = get_model(vllm_config=vllm_config, model_config=medusa.draft_model_config)
        assert isinstance(model, MedusaHeads)
        return model

    return load_heads


def random_state(heads: int = HEADS, layers: int = 1, vocab: int = VOCAB, bias: bool = True) -> State:
    torch.manual_seed(0)
    state = {}
    for head in range(heads):
        for layer in range(layers):
            state[f"blocks.{head}.layers.{layer}.weight"] = torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5
            if bias:
                state[f"blocks.{head}.layers.{layer}.bias"] = torch.randn(HIDDEN)
        state[f"lm_heads.{head}.weight"] = torch.randn(vocab, HIDDEN)
    return state


def plain_states(state: State, hidden: torch.Tensor, layers: int = 1) -> torch.Tensor:
    """Each head's transformed hidden states, by the paper's equation; ``[heads, requests, hidden_size]``."""
    transformed = []
    for head in range(HEADS):
        output = hidden
        for layer in range(layers):
            weight = state[f"blocks.{head}.layers.{layer}.weight"]
            bias = state.get(f"blocks.{head}.layers.{layer}.bias", torch.zeros(HIDDEN))
            output = output + silu(output @ weight.T + bias)
        transformed.append(output)
    return torch.stack(transformed)


def plain_logits(state: State, hidden: torch.Tensor, layers: int = 1) -> torch.Tensor:
    lm_heads = torch.stack([state[f"lm_heads.{head}.weight"] for head in range(HEADS)])
    return plain_states(state, hidden, layers) @ lm_heads.transpose(1, 2)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_heads_compute_what_plain_pytorch_computes(load: Load, layers: int, bias: bool, batched: bool) -> None:
    state, hidden = random_state(layers=layers, bias=bias), torch.randn(5, HIDDEN)
    model = load(state, num_hidden_layers=layers)
    assert model.lm_heads is not None
    assert len(model.lm_heads.parts) == HEADS
    if batched:
        model.lm_heads.parts.clear()  # As on a GPU, all LM heads in one product.
    expected = plain_logits(state, hidden, layers)
    torch.testing.assert_close(model.compute_logits(model(hidden)), expected)
    assert torch.equal(model.top_tokens(hidden, 4), expected.topk(4).indices.transpose(0, 1))
    log_probs, tokens = model.top_predictions(hidden, 4)
    torch.testing.assert_close(log_probs, expected.log_softmax(dim=-1).topk(4).values.transpose(0, 1))
    assert torch.equal(tokens, model.top_tokens(hidden, 4))


@pytest.mark.parametrize("kind", ["own", "target's", "shared draft vocabulary"])
def test_logits_are_divided_by_each_heads_temperature_where_probabilities_are_read(load: Load, kind: str) -> None:
    state, hidden, temperatures = random_state(), torch.randn(5, HIDDEN), torch.tensor([0.5, 1.0, 2.0])
    config: dict[str, Any] = {"medusa_temperatures": temperatures.tolist()}
    states = plain_states(state, hidden)
    expected = plain_logits(state, hidden)
    if kind != "own":
        config["original_lm_head"] = True
        expected = states @ state["lm_heads.0.weight"].T
        state = {name: each for name, each in state.items() if name != "lm_heads.1.weight"}
    if kind == "shared draft vocabulary":
        kept = torch.arange(0, VOCAB, 2)
        state |= {"lm_heads.0.weight": state["lm_heads.0.weight"][kept], "token_map": kept}
        config["truncated_vocab_size"] = len(kept)
        expected = expected[:, :, kept]
    model = load(state, **config)
    weight = random_state()["lm_heads.0.weight"]
    model.share(SimpleNamespace(compute_logits=lambda states: states @ weight.T))
    log_probs, tokens = model.top_predictions(hidden, 4)
    divided = (expected / temperatures[:, None, None]).log_softmax(dim=-1).topk(4)
    torch.testing.assert_close(log_probs, divided.values.transpose(0, 1))
    rows = tokens if kind != "shared draft vocabulary" else tokens // 2
    assert torch.equal(rows, expected.topk(4).indices.transpose(0, 1))
    assert torch.equal(tokens, model.top_tokens(hidden, 4))


def test_calibrated_logits_of_a_model_in_16_bits_are_float32_and_keep_the_tokens_order(load: Load) -> None:
    """``LogitsProcessor`` has no cast left to do then, and the division rounds no two logits to one."""
    state, temperatures = random_state(), [0.7, 1.0, 1.9]
    lm_head = load(state, medusa_temperatures=temperatures).lm_heads
    assert lm_head is not None
    lm_head.to(torch.bfloat16)
    lm_head.parts.clear()
    states = torch.randn(HEADS * 5, HIDDEN, dtype=torch.bfloat16)
    inverse = torch.tensor(temperatures).reciprocal()
    calibrated = CalibratedLMHead(lm_head, inverse)
    logits, plain = calibrated.apply(calibrated, states), lm_head.quant_method.apply(lm_head, states)
    assert (logits.dtype, plain.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits, plain.float() * inverse.repeat_interleave(5)[:, None], rtol=1e-6, atol=0)
    assert torch.equal(logits.argsort(stable=True), plain.argsort(stable=True))


def test_all_of_the_vocabulary_and_no_padding_can_be_drafted(load: Load) -> None:
    drafted = load(random_state()).top_tokens(torch.randn(2, HIDDEN), VOCAB)
    assert torch.equal(drafted.sort().values, torch.arange(VOCAB).expand(2, HEADS, -1))


def test_biases_of_the_checkpoint_are_kept(load: Load) -> None:
    state = random_state()
    loaded = load(state).get_parameter("blocks.layers.0.bias").view(HEADS, HIDDEN)
    assert all(torch.equal(loaded[head], state[f"blocks.{head}.layers.0.bias"]) for head in range(HEADS))


def test_biases_that_the_checkpoint_leaves_out_are_zero(load: Load) -> None:
    biases = [tensor for name, tensor in load(random_state(bias=False)).named_parameters() if name.endswith(".bias")]
    assert [bias.numel() for bias in biases] == [HEADS * HIDDEN]
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("file", ["model.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize("prefix", ["", "medusa_head.", "medusa_heads."])
def test_published_names_are_understood(load: Load, prefix: str, file: str) -> None:
    state, published = random_state(layers=2), {}
    for name, tensor in state.items():
        kind, head, *rest = name.split(".")
        new = f"{head}.{rest[1]}.linear.{rest[2]}" if kind == "blocks" else f"{head}.2.weight"
        published[prefix + new] = tensor
    model = load(published, file, num_hidden_layers=2)
    hidden = torch.randn(2, HIDDEN)
    torch.testing.assert_close(model.compute_logits(model(hidden)), plain_logits(state, hidden, layers=2))


def test_original_lm_head_shares_the_targets(load: Load) -> None:
    class Target(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN))

        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.weight.T

    state = {name: tensor for name, tensor in random_state().items() if not name.startswith("lm_heads")}
    model, target = load(state, original_lm_head=True), Target()
    model.share(target)
    hidden = torch.randn(4, HIDDEN)
    expected = plain_states(state, hidden) @ target.weight.T
    torch.testing.assert_close(model.compute_logits(model(hidden)), expected)
    assert not any(parameter is target.weight for parameter in model.parameters())


def test_heads_with_lm_heads_of_their_own_ignore_the_targets(load: Load) -> None:
    state, hidden = random_state(), torch.randn(4, HIDDEN)
    model = load(state)
    model.share(torch.nn.Identity())
    torch.testing.assert_close(model.compute_logits(model(hidden)), plain_logits(state, hidden))


def test_a_truncated_vocabulary_is_mapped_to_the_targets_tokens(load: Load) -> None:
    state, token_map = random_state(vocab=40), torch.randperm(VOCAB)[:40]
    model, hidden = load({**state, "token_map": token_map}, truncated_vocab_size=40), torch.randn(3, HIDDEN)
    expected = token_map[plain_logits(state, hidden).topk(5).indices].transpose(0, 1)
    assert torch.equal(model.top_tokens(hidden, 5), expected)


@pytest.mark.parametrize(
    ("token_map", "said"),
    [
        (torch.arange(39), r"token_map must have shape \(40,\), got \(39,\)"),
        (
            torch.arange(40) + VOCAB,
            r"token_map holds \[96, 97, 98\]...; it must hold 40 different tokens of the target's",
        ),
        (torch.arange(40) - 1, r"token_map holds \[-1, 0, 1\]"),
        (torch.arange(40) // 2, r"token_map holds \[0, 0, 1\]...; it must hold 40 different tokens"),
    ],
)
def test_a_token_map_that_does_not_fit_is_refused(load: Load, token_map: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load({**random_state(vocab=40), "token_map": token_map}, truncated_vocab_size=40)


@pytest.mark.parametrize("batched", [True, False])
def test_heads_share_the_rows_of_a_truncated_vocabulary(load: Load, batched: bool) -> None:
    state, token_map = random_state(vocab=40), torch.randperm(VOCAB)[:40]
    stored = {name: tensor for name, tensor in state.items() if not name.startswith(("lm_heads.1", "lm_heads.2"))}
    model = load({**stored, "token_map": token_map}, truncated_vocab_size=40, original_lm_head=True)
    model.share(torch.nn.Identity())
    assert model.lm_heads is not None
    assert len(model.lm_heads.parts) == 1
    if batched:
        model.lm_heads.parts.clear()
    hidden = torch.randn(5, HIDDEN)
    expected = plain_states(state, hidden) @ state["lm_heads.0.weight"].T
    torch.testing.assert_close(model.compute_logits(model(hidden)), expected)
    assert torch.equal(model.top_tokens(hidden, 4), token_map[expected.topk(4).indices].transpose(0, 1))


@pytest.mark.parametrize("shared", [True, False])
def test_a_truncated_vocabulary_without_its_token_map_is_refused(load: Load, shared: bool) -> None:
    with pytest.raises(ValueError, match="lacks token_map, but its config names a truncated_vocab_size of 40; give"):
        load(random_state(vocab=40), truncated_vocab_size=40, original_lm_head=shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_token_map_that_holds_no_integers_is_refused(load: Load, dtype: torch.dtype) -> None:
    token_map = torch.arange(40).to(dtype)
    with pytest.raises(ValueError, match=r"token_map is of dtype (float32|bool); it must hold integers"):
        load({**random_state(vocab=40), "token_map": token_map}, truncated_vocab_size=40)


@pytest.mark.parametrize("name", ["lm_heads.1.weight", "blocks.0.layers.0.weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_tensor_is_refused_by_name(load: Load, name: str, dtype: torch.dtype) -> None:
    state = random_state()
    with pytest.raises(ValueError, match=rf"{name} is of dtype (int8|float8_e4m3fn); heads must be float32"):
        load({**state, name: state[name].to(dtype)})


def test_logits_are_scaled_as_the_config_says(load: Load) -> None:
    state, hidden = random_state(), torch.randn(2, HIDDEN)
    model = load(state, logit_scale=0.25)
    torch.testing.assert_close(model.compute_logits(model(hidden)), plain_logits(state, hidden) * 0.25)


def test_heads_draft_in_their_own_dtype_whatever_dtype_the_targets_lm_head_has(load: Load) -> None:
    state, hidden = random_state(), torch.randn(3, HIDDEN)
    model = load(state, overrides={"head_dtype": "float16"})
    torch.testing.assert_close(model.compute_logits(model(hidden)), plain_logits(state, hidden))


def test_more_tokens_than_a_rank_holds_are_refused(load: Load) -> None:
    lm_heads = load(random_state()).lm_heads
    assert lm_heads is not None
    lm_heads.check_top_k(128)
    with pytest.raises(ValueError, match="rank 128 is asked for, but each tensor-parallel rank holds 128"):
        lm_heads.check_top_k(129)


def test_heads_beyond_the_trees_depth_are_neither_held_nor_run(load: Load) -> None:
    state, hidden = random_state(), torch.randn(5, HIDDEN)
    shallow = load(state, tree=[3, 2])
    assert shallow(hidden).shape == (2, 5, HIDDEN)
    assert shallow.get_parameter("blocks.layers.0.bias").shape == (2 * HIDDEN,)
    assert shallow.get_parameter("lm_heads.weight").shape == (2, 128, HIDDEN)
    expected = plain_logits(state, hidden)[:2].topk(3).indices.transpose(0, 1)
    assert torch.equal(shallow.top_tokens(hidden, 3), expected)


@pytest.mark.parametrize("name", ["blocks.2.layers.0.weight", "lm_heads.2.weight"])
def test_heads_beyond_the_trees_depth_must_fit_like_the_others(load: Load, name: str) -> None:
    with pytest.raises(ValueError, match=rf"holds '{name}' of shape"):
        load({**random_state(), name: torch.zeros(1, 1)}, tree=[3, 2])


@pytest.mark.parametrize("missing", ["blocks.1.layers.0.weight", "lm_heads.2.weight"])
def test_a_missing_tensor_is_refused_by_name(load: Load, missing: str) -> None:
    state = random_state()
    del state[missing]
    with pytest.raises(ValueError, match=rf"lacks {missing}, but its config names 3 heads of 1 layers"):
        load(state)


@pytest.mark.parametrize(("heads", "layers", "name"), [(4, 1, "3"), (3, 2, "layers.1")])
def test_a_tensor_beyond_the_configs_heads_and_layers_is_refused_by_name(
    load: Load, heads: int, layers: int, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"holds '[^']*{name}[^']*', but its config names 3 heads of 1 layers"):
        load(random_state(heads=heads, layers=layers))


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [
        ("blocks.0.layers.0.weight", (HIDDEN, HIDDEN + 1), r"\(32, 33\), the target needs \(32, 32\)"),
        ("blocks.0.layers.0.bias", (HIDDEN + 1,), r"\(33,\), the target needs \(32,\)"),
        ("lm_heads.1.weight", (VOCAB + 1, HIDDEN), r"\(97, 32\), the target needs \(96, 32\)"),
        ("lm_heads.1.weight", (VOCAB - 1, HIDDEN), r"\(95, 32\), the target needs \(96, 32\)"),
    ],
)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(
    load: Load, name: str, shape: tuple[int, ...], needed: str
) -> None:
    with pytest.raises(ValueError, match=rf"holds '{name}' of shape {needed}"):
        load({**random_state(), name: torch.zeros(shape)})


def test_heads_without_lm_heads_are_refused_unless_they_share_the_targets(load: Load) -> None:
    state = {name: tensor for name, tensor in random_state().items() if not name.startswith("lm_heads")}
    with pytest.raises(ValueError, match=r"lacks lm_heads.0.weight and 2 more"):
        load(state)


RANK = 8


def sequential_state(state: State) -> State:
    """Add random layers that read paths."""
    torch.manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(HEADS):
        shapes |= path_shapes(head, HIDDEN, RANK)
    return state | {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}


class Embedding(torch.nn.Module):
    """A target as far as heads that read paths need one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.weight = torch.randn(VOCAB, HIDDEN)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return 3 * self.weight[input_ids]  # Some models scale their embeddings.


def trained(state: State, target: Embedding, **sizes: Any) -> TrainableHeads:
    spec = HeadsSpec(HIDDEN, VOCAB, HEADS, path_rank=RANK, **sizes)
    token_map = state.get("token_map")
    heads = TrainableHeads(spec, torch.zeros(VOCAB, HIDDEN), token_map, target.weight)
    heads.load_state_dict(state)
    return heads


@pytest.mark.parametrize("temperatures", [None, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("kind", ["own", "shared draft vocabulary"])
@pytest.mark.parametrize("tree", [[3, 2, 2], "dynamic"])
def test_sequential_heads_draft_along_each_path_what_they_say_in_training(
    load: Load, tree: Any, kind: str, temperatures: list[float] | None
) -> None:
    state, sizes = sequential_state(random_state()), {}
    config: dict[str, Any] = {"sequential_path_rank": RANK, "medusa_temperatures": temperatures}
    if kind != "own":
        kept = torch.arange(0, VOCAB, 2)
        state = {name: each for name, each in state.items() if not name.startswith("lm_heads.") or "s.0." in name}
        state |= {"lm_heads.0.weight": state["lm_heads.0.weight"][kept], "token_map": kept}
        sizes = {"shared_lm_head": True, "draft_vocab_size": len(kept)}
        config |= {"original_lm_head": True, "truncated_vocab_size": len(kept)}
    model, target = load(state, tree=tree, medusa_fc_bias=True, **config), Embedding()
    model.share(target)
    hidden, roots = torch.randn(2, HIDDEN), torch.tensor([5, 90])
    options = TreeOptions(HEADS, VOCAB, None, 12, 12, 4, None, by_level=True)
    grown = options.build(tree)

    with torch.inference_mode():
        heads = model.by_level(hidden)
        drafts = (
            grown.draft(heads, roots) if isinstance(grown, BeamTree) else grown.draft_by_level(heads, roots)  # type: ignore[union-attr]
        )

    training = trained(state, target, **sizes)
    for request in range(2):
        paths, scores = [[int(roots[request])]], [0.0]
        for node, token in enumerate(drafts.tokens[request].tolist()):
            parent = int(drafts.parents[request, node])
            path = torch.tensor([paths[parent]])
            with torch.no_grad():
                logits = training.logits(len(paths[parent]) - 1, hidden[request : request + 1], path)[0]
            logits /= 1.0 if temperatures is None else temperatures[len(paths[parent]) - 1]
            row = int(training.rows_of(torch.tensor([token])))
            scores.append(scores[parent] + float(logits.log_softmax(-1)[row]))
            paths.append([*paths[parent], token])
            if drafts.log_probs is not None:
                assert float(drafts.log_probs[request, node]) == pytest.approx(scores[-1], abs=1e-3)
            else:
                rank = grown.choices[node][-1]  # type: ignore[union-attr]
                assert row == logits.topk(rank + 1).indices[-1]


def test_sequential_heads_without_their_paths_layers_are_refused(load: Load) -> None:
    with pytest.raises(ValueError, match=r"lacks paths\.0\.down\.weight and 11 more"):
        load(random_state(), sequential_path_rank=RANK)


def test_layers_that_read_paths_of_another_rank_are_refused(load: Load) -> None:
    with pytest.raises(ValueError, match=r"paths\.0\.down\.bias' of shape \(8,\), the target needs \(4,\)"):
        load(sequential_state(random_state()), sequential_path_rank=4)
