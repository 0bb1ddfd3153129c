# SPDX-License-Identifier: Apache-2.0
"""A tiny target and its heads, trained once per version of their settings and kept under ``build/test-models``."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.toy.blocks import pack_blocks
from tests.toy.corpus import load_corpus
from tests.toy.target import TargetConfig, train_target
from tests.toy.tokenizer import cut_prompts, encode_documents, train_tokenizer
from vllm_medusa.checkpoint.format import write_heads
from vllm_medusa.distillation.continuation import continue_prompts
from vllm_medusa.files import replaced_directory
from vllm_medusa.training.medusa1 import Medusa1Config, train_medusa1

CACHE = Path(__file__).parents[1] / "build" / "test-models"


@dataclass(frozen=True)
class TinySettings:
    """Everything that the tiny models depend on."""

    characters: int = 1_500_000
    target: TargetConfig = field(
        default_factory=lambda: TargetConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=352,
            num_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            block_length=128,
            batch_size=8,
            steps=400,
            learning_rate=1e-2,
        )
    )
    heads: Medusa1Config = field(
        default_factory=lambda: Medusa1Config(steps=120, batch_size=16, learning_rate=3e-3, prompt_length=32)
    )
    path_rank: int = 64
    own_texts: int = 640
    corpus_version: int = 2

    @property
    def key(self) -> str:
        settings = asdict(self) | {"heads": self.heads.model_dump()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def tiny_target(settings: TinySettings = TinySettings()) -> Path:
    """Return the directory of a trained Llama and its tokenizer."""

    def build(directory: Path) -> None:
        corpus = load_corpus(settings.characters)
        tokenizer = train_tokenizer(corpus.training, settings.target.vocab_size)
        blocks = pack_blocks(encode_documents(tokenizer, corpus.training), settings.target.block_length)
        train_target(settings.target, blocks, show_progress=False).save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return _cached(f"target-{settings.key}", build)


def tiny_heads(settings: TinySettings = TinySettings()) -> Path:
    """Return the directory of the tiny target's four heads."""

    return _cached(f"heads-{settings.key}", lambda directory: _train_heads(settings, settings.heads, directory))


def tiny_sequential_heads(settings: TinySettings = TinySettings()) -> Path:
    """Return the directory of four heads that read the path to a node, trained as the plain ones are."""
    recipe = settings.heads.model_copy(update={"path_rank": settings.path_rank})
    return _cached(f"sequential-heads-{settings.key}", lambda directory: _train_heads(settings, recipe, directory))


def _train_heads(settings: TinySettings, recipe: Medusa1Config, directory: Path) -> None:
    target_directory = tiny_target(settings)
    target = AutoModelForCausalLM.from_pretrained(target_directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(target_directory)
    documents = encode_documents(tokenizer, load_corpus(settings.characters).training)
    prompts = cut_prompts(documents, [settings.heads.prompt_length], settings.own_texts)
    new = settings.target.block_length - settings.heads.prompt_length
    samples = continue_prompts(target, prompts, new, batch_size=64, show_progress=False, min_new_tokens=new)
    own = torch.tensor([sample.input_ids for sample in samples])
    # The blocks held out here come from training prompts: no test needs them to be more than plausible.
    result = train_medusa1(target, own[64:], own[:64], recipe, show_progress=False)
    extra = {"medusa_accuracies": result.accuracies.tolist()}
    write_heads(directory, result.heads.spec, result.heads.state_dict(), extra)


def held_out_prompts(settings: TinySettings = TinySettings(), count: int = 320) -> list[list[int]]:
    """Return token ids of 16 to 96 tokens from files that no training saw."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_target(settings))
    documents = encode_documents(tokenizer, load_corpus(0).held_out)
    return cut_prompts(documents, lengths=range(16, 97, 8), count=count)


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """Build a directory unless it is there; of several processes that ask for it at once, one builds."""
    directory = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            with replaced_directory(directory) as temporary, _one_thread():
                build(temporary)
    return directory


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let sums be taken in one order, so that the weights do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
