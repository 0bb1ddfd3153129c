# SPDX-License-Identifier: Apache-2.0
"""Kinds of attention and of models: what a branching tree serves as stock vLLM does, and what the start refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.integration.engines import engine, generate, greedy, spec_counters, texts

VOCABULARY = 96
HIDDEN = 128
WINDOW = 24
NUM_HEADS = 3
TREE = [3, 2, 1]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.08,
}
OPTIONS: dict[str, Any] = {"max_model_len": 192, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 26}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers and what its configuration adds to ``SIZES``."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    layers: Callable[[PreTrainedModel], None] = lambda _: None
    """What to do to the random weights, so that a feature shows in the text."""

    def save(self, directory: Path) -> Path:
        """Write random weights."""
        sizes = {key: value for key, value in SIZES.items() if key not in self.drop}
        config: PretrainedConfig = getattr(transformers, self.config)(**(sizes | self.options))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        lead_to_the_next_token(model)
        self.layers(model)
        model.save_pretrained(directory)
        return directory


def lead_to_the_next_token(model: PreTrainedModel) -> None:
    """Let token i suggest token i + 1, so that heads can predict something; where the LM head is the embedding, itself.

    The layers' random contribution is large enough that the text follows the suggestion only now and then.
    """
    embedding, lm_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is lm_head:
        embedding.data *= 0.2
    else:
        embedding.data *= 2
        lm_head.data = embedding.data.roll(1, dims=0).clone()


def save_heads(model: Path, directory: Path) -> Path:
    """Write heads with empty blocks whose LM heads suggest token i + 2, i + 3, ... as the target's suggests i + 1."""
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    embedding = weights.get_input_embeddings().weight.data
    generator = torch.Generator().manual_seed(1)
    tied = weights.config.tie_word_embeddings
    tensors = {}
    for head in range(NUM_HEADS):
        noise = 0.1 * embedding.std() * torch.randn(embedding.shape, generator=generator)
        tensors[f"blocks.{head}.layers.0.weight"] = torch.zeros(HIDDEN, HIDDEN)
        tensors[f"lm_heads.{head}.weight"] = embedding.roll(0 if tied else head + 2, dims=0) + noise
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    config = {"num_heads": NUM_HEADS, "num_hidden_layers": 1, "hidden_size": HIDDEN, "vocab_size": VOCABULARY}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def prompts(count: int = 16) -> list[list[int]]:
    """Return prompts shorter and longer than the window and than a block of the cache."""
    rng = random.Random(3)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(3, 3 * WINDOW))] for _ in range(count)]


def sharpen(**factors: float) -> Callable[[PreTrainedModel], None]:
    """Scale the parameters whose names contain these, so that attention tells more in the text."""

    def scale(model: PreTrainedModel) -> None:
        for name, factor in factors.items():
            found = [parameter for key, parameter in model.named_parameters() if name in key]
            assert found
            for parameter in found:
                parameter.data *= factor

    return scale


GEMMA = {
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": Architecture("LlamaConfig"),
    "multi-query": Architecture("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 64}),
    "qwen3": Architecture("Qwen3Config"),
    "mistral-sliding-window": Architecture("MistralConfig", {"sliding_window": WINDOW}, layers=sharpen(q_proj=3)),
    "gemma2-soft-cap-and-alternating-window": Architecture(
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0},
        layers=sharpen(q_proj=3),
    ),
    "gemma3-alternating-window": Architecture("Gemma3TextConfig", GEMMA, layers=sharpen(o_proj=2)),
    "mixtral-experts": Architecture("MixtralConfig", MOE),
    "bloom-alibi": Architecture(
        "BloomConfig",
        {"n_head": 4, "n_layer": 2, "tie_word_embeddings": True},
        drop=("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "head_dim", "intermediate_size"),
        layers=sharpen(dense=8, self_attention=2),
    ),
    "gpt-oss-attention-sinks": Architecture(
        "GptOssConfig",
        {**MOE, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        layers=sharpen(q_proj=3),
    ),
    "gpt-neox-through-transformers": Architecture(
        "GPTNeoXConfig", {"rotary_pct": 0.5}, drop=("num_key_value_heads", "head_dim")
    ),
}


Models = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return an architecture's target and heads; they are written once."""
    root = tmp_path_factory.mktemp("architectures")

    def directories(name: str) -> tuple[Path, Path]:
        target, heads = root / name, root / f"{name}-heads"
        if not target.exists():
            ARCHITECTURES[name].save(target)
            save_heads(target, heads)
        return target, heads

    return directories


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_branching_tree_gives_the_stock_text_and_has_tokens_accepted(models: Models, name: str) -> None:
    target, heads = models(name)
    with engine(target, **OPTIONS) as stock:
        expected = texts(generate(stock, prompts(), greedy(48)))
    assert len({tuple(text) for text in expected}) > len(expected) // 2
    with engine(target, heads=heads, tree=TREE, **OPTIONS) as llm:
        found = texts(generate(llm, prompts(), greedy(48)))
        counters = spec_counters(llm)
    assert found == expected
    assert counters.accepted > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_serves_a_branching_tree(models: Models, dtype: str) -> None:
    """Its text may part from the stock one where two tokens are as good as equal, so most first tokens must agree."""
    target, heads = models("llama")
    options = OPTIONS | {"dtype": dtype}
    with engine(target, **options) as stock:
        expected = texts(generate(stock, prompts(), greedy(48)))
    with engine(target, heads=heads, tree=TREE, **options) as llm:
        found = texts(generate(llm, prompts(), greedy(48)))
        counters = spec_counters(llm)
    assert [len(text) for text in found] == [48] * len(expected)
    assert sum(a[:8] == b[:8] for a, b in zip(found, expected, strict=True)) > len(expected) // 2
    assert counters.accepted > 0


MLA = Architecture(
    "DeepseekV2Config",
    {
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
    },
    drop=("head_dim",),
)


def refusal(target: Path, heads: Path, **options: Any) -> str:
    """Start an engine that must not start, and return what it says."""
    with pytest.raises(ValueError) as error, engine(target, heads=heads, **OPTIONS, **options):
        pass
    return str(error.value)


def save_config(name: str, directory: Path, **options: Any) -> Path:
    """Write a configuration without weights: what is refused for it is refused before weights are loaded."""
    config: PretrainedConfig = getattr(transformers, name)(**options)
    config.architectures = [name.replace("Config", "ForConditionalGeneration" if "Whisper" in name else "ForCausalLM")]
    config.save_pretrained(directory)
    return directory


UNSUPPORTED = {
    "attention-free": ("MambaConfig", {"hidden_size": HIDDEN, "num_hidden_layers": 2, "vocab_size": VOCABULARY}),
    "hybrid": ("JambaConfig", SIZES),
    "encoder-decoder": ("WhisperConfig", {"d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2}),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_model_that_medusa_cannot_serve_is_refused_by_kind_before_it_loads(
    models: Models, tmp_path: Path, kind: str
) -> None:
    name, sizes = UNSUPPORTED[kind]
    target = save_config(name, tmp_path / "target", **sizes)
    message = refusal(target, models("llama")[1])
    assert kind in message
    assert "medusa" in message
    assert "drop it" in message


def test_latent_attention_refuses_a_branching_tree_and_says_what_to_give(models: Models, tmp_path: Path) -> None:
    target = MLA.save(tmp_path / "target")
    message = refusal(target, models("llama")[1], tree=TREE)
    assert "multi-head latent attention" in message
    assert 'give medusa_tree "chain"' in message


def test_a_quantised_cache_refuses_a_branching_tree_and_says_what_to_give(models: Models) -> None:
    target, heads = models("llama")
    message = refusal(target, heads, tree=TREE, kv_cache_dtype="fp8")
    assert "kv_cache_dtype" in message
    assert "'fp8'" in message
    assert 'medusa_tree "chain"' in message
    assert "\n" not in message


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_f"), reason="vLLM itself refuses an fp8 cache on CPUs without AVX-512"
)
def test_a_quantised_cache_serves_a_chain_as_stock_vllm_does(models: Models) -> None:
    target, heads = models("llama")
    options = OPTIONS | {"kv_cache_dtype": "fp8"}
    with engine(target, **options) as stock:
        expected = texts(generate(stock, prompts(), greedy(48)))
    with engine(target, heads=heads, tree="chain", **options) as llm:
        found = texts(generate(llm, prompts(), greedy(48)))
        counters = spec_counters(llm)
    assert found == expected
    assert counters.accepted > 0


def test_latent_attention_serves_a_chain(tmp_path: Path) -> None:
    """Its text cannot be compared: on CPUs stock vLLM decodes such a model otherwise than it reads the same prompt."""
    target = MLA.save(tmp_path / "target")
    heads = save_heads(target, tmp_path / "heads")
    with engine(target, heads=heads, tree="chain", **OPTIONS) as llm:
        found = texts(generate(llm, prompts(), greedy(48)))
        counters = spec_counters(llm)
    assert [len(text) for text in found] == [48] * len(prompts())
    assert counters.accepted > 0
