# SPDX-License-Identifier: Apache-2.0
"""The demo's models, built once and kept in directories named by a hash of their settings."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_medusa.checkpoint.format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_spec,
    read_state,
    write_heads,
)
from vllm_medusa.demo.blocks import pack_blocks
from vllm_medusa.demo.corpus import Corpus, load_corpus
from vllm_medusa.demo.padding import PaddedSizes, pad_heads, pad_target, verify_padding
from vllm_medusa.demo.target import TargetConfig, train_target
from vllm_medusa.demo.tokenizer import cut_prompts, encode_documents, train_tokenizer
from vllm_medusa.distillation.continuation import continue_prompts
from vllm_medusa.files import replaced_directory
from vllm_medusa.training.medusa1 import Medusa1Config, train_medusa1


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the demo's models.

    Attributes:
        characters: how much of the corpus the target is trained on.
        target: the target's sizes and training.
        heads: the heads' training.
        own_texts: number of texts that the target writes for its heads to learn from.
        own_text_length: tokens of each text, including the prompt.
        held_out_texts: number of texts, from held-out prompts, on which the heads are evaluated.
        padded: the sizes of the padded models.

    """

    characters: int = 4_000_000
    target: TargetConfig = field(default_factory=TargetConfig)
    heads: Medusa1Config = field(default_factory=lambda: Medusa1Config(prompt_length=32, steps=200, learning_rate=3e-3))
    own_texts: int = 768
    own_text_length: int = 192
    held_out_texts: int = 64
    padded: PaddedSizes = field(default_factory=PaddedSizes)


@dataclass(frozen=True)
class Artifacts:
    """The models of given settings in one directory; each is built when it is first needed."""

    directory: Path
    settings: DemoSettings

    @cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.settings.characters)

    @cached_property
    def target(self) -> Path:
        """The trained target and its tokenizer."""
        settings = self.settings

        def build(directory: Path) -> None:
            tokenizer = train_tokenizer(self.corpus.training, settings.target.vocab_size)
            blocks = pack_blocks(encode_documents(tokenizer, self.corpus.training), settings.target.block_length)
            train_target(settings.target, blocks).save_pretrained(directory)
            tokenizer.save_pretrained(directory)

        return self._built("target", (settings.characters, asdict(settings.target)), build)

    @cached_property
    def heads(self) -> Path:
        """The heads, trained on the target's own text."""
        settings = self.settings

        def build(directory: Path) -> None:
            own = self._own_texts(self.corpus.training, settings.own_texts)
            held_out = self._own_texts(self.corpus.held_out, settings.held_out_texts)
            result = train_medusa1(self.load_target(), own, held_out, settings.heads)
            extra = {"medusa_accuracies": result.accuracies.tolist()}
            write_heads(directory, result.heads.spec, result.heads.state_dict(), extra)

        texts = (settings.own_texts, settings.own_text_length, settings.held_out_texts)
        key = (self.target.name, settings.heads.model_dump(), texts)
        return self._built("heads", key, build)

    @cached_property
    def padded_target(self) -> Path:
        """The target padded to a realistic cost, in bf16."""

        def build(directory: Path) -> None:
            target = self.load_target()
            padded = pad_target(target, self.settings.padded)
            verify_padding(target, padded, torch.tensor([self.prompts(1)[0]]))
            padded.to(torch.bfloat16).save_pretrained(directory)

        return self._built("padded-target", (self.target.name, asdict(self.settings.padded)), build)

    @cached_property
    def padded_heads(self) -> Path:
        """The heads padded to the padded target's width, in bf16."""

        def build(directory: Path) -> None:
            width = self.settings.padded.hidden_size
            spec, state = pad_heads(read_spec(self.heads), read_state(self.heads), width)
            write_heads(directory, spec, {name: tensor.to(torch.bfloat16) for name, tensor in state.items()})

        return self._built("padded-heads", (self.heads.name, asdict(self.settings.padded)), build)

    @property
    def accuracies(self) -> torch.Tensor:
        """``[heads, ranks]``: the heads' held-out accuracies."""
        return torch.tensor(json.loads((self.heads / CONFIG_FILE).read_text())["medusa_accuracies"])

    def describe(self) -> str:
        """Describe the models; results of padded models must be labelled as such."""
        small, large = (_parameters(directory) / 1e6 for directory in (self.target, self.padded_target))
        return (
            f"a {small:.1f} M parameter Llama trained on the standard library's code, "
            f"padded with zeros to the cost of {large:.0f} M parameters"
        )

    def load_target(self) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.target, dtype=torch.float32).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.target)

    def prompts(self, count: int, length: int = 64) -> list[list[int]]:
        """Cut prompts out of held-out files."""
        return cut_prompts(encode_documents(self.load_tokenizer(), self.corpus.held_out), [length], count)

    def _own_texts(self, texts: tuple[str, ...], count: int) -> torch.Tensor:
        documents = encode_documents(self.load_tokenizer(), texts)
        prompts = cut_prompts(documents, [self.settings.heads.prompt_length], count)
        new = self.settings.own_text_length - self.settings.heads.prompt_length
        samples = continue_prompts(self.load_target(), prompts, new, batch_size=64, min_new_tokens=new)
        return torch.tensor([sample.input_ids for sample in samples])

    def _built(self, kind: str, key: Any, build: Callable[[Path], None]) -> Path:
        """Return a model's directory, built if missing; its hash includes Python's version, which sets the corpus."""
        content = json.dumps([key, sys.version_info[:3]], sort_keys=True)
        directory = self.directory / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        if not directory.exists():
            with replaced_directory(directory) as temporary:
                build(temporary)
        return directory


def _parameters(directory: Path) -> int:
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
