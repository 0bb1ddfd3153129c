# SPDX-License-Identifier: Apache-2.0
"""Read the layouts in which Medusa heads have been published, and write the original one.

======================  ==========================================  ====================================
what                    original repository, TGI, LoRAX             served: vLLM 0.32
======================  ==========================================  ====================================
residual layer l        ``HEAD.l.linear.weight``, ``.bias``         ``blocks.HEAD.layers.l.weight``, ...
LM head                 ``HEAD.LAYERS.weight``                      ``lm_heads.HEAD.weight``
shared LM head          none, ``"version": "2"`` in config.json     ``lm_heads.0.weight`` alone
======================  ==========================================  ====================================

Names may start with ``medusa_head.`` or ``medusa_heads.``. In Medusa-2 checkpoints, which hold a whole model, this
prefix tells the heads' tensors from the model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.checkpoint.entries import check_entries
from vllm_medusa.checkpoint.format import CONFIG_FILE, HeadsSpec, is_read_as_size
from vllm_medusa.checkpoint.weight_files import ORIGINAL_FILE, Weights
from vllm_medusa.files import replaced_directory, write_json
from vllm_medusa.messages import some_of

PREFIX = r"(?P<prefix>medusa_heads?\.)?"
ORIGINAL_NAME = re.compile(PREFIX + r"(?P<head>\d+)\.(?P<layer>\d+)\.(?:linear\.(?P<parameter>weight|bias)|weight)")
SERVED_NAME = re.compile(
    PREFIX + r"(?:blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<parameter>weight|bias)"
    r"|lm_heads\.(?P<lm_head>\d+)\.weight)"
)

SHARED_VERSION = "2"
"""``version`` in the original layout if the heads use the target's LM head."""

BASE_MODEL = "base_model_name_or_path"
"""The entry of the heads' ``config.json`` that names their target."""

OWN_ENTRIES = {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "version"}
"""Entries of a ``config.json`` that describe its own layout; a conversion drops them."""


@dataclass(frozen=True)
class HeadTensor:
    """One tensor of a head.

    Attributes:
        head: the head, counted from 0.
        layer: the residual layer, counted from 0. For an LM head: the number of layers in the original layout, else
            None.
        parameter: "weight" or "bias" of a residual layer, None for an LM head.
        prefixed: whether its stored name starts with ``medusa_head.`` or ``medusa_heads.``.

    """

    head: int
    layer: int | None
    parameter: str | None
    prefixed: bool

    @classmethod
    def parse(cls, name: str) -> HeadTensor | None:
        """Parse a stored name in any layout; return None if the tensor does not belong to a head."""
        if found := ORIGINAL_NAME.fullmatch(name):
            return cls(int(found["head"]), int(found["layer"]), found["parameter"], bool(found["prefix"]))
        if not (found := SERVED_NAME.fullmatch(name)):
            return None
        if found["lm_head"] is not None:
            return cls(int(found["lm_head"]), None, None, bool(found["prefix"]))
        return cls(int(found["head"]), int(found["layer"]), found["parameter"], bool(found["prefix"]))

    @property
    def is_lm_head(self) -> bool:
        return self.parameter is None

    @property
    def served_name(self) -> str:
        if self.is_lm_head:
            return f"lm_heads.{self.head}.weight"
        return f"blocks.{self.head}.layers.{self.layer}.{self.parameter}"

    def original_name(self, num_layers: int) -> str:
        """Return its name in the original layout for heads of ``num_layers`` residual layers."""
        if self.is_lm_head:
            return f"{self.head}.{num_layers}.weight"
        return f"{self.head}.{self.layer}.linear.{self.parameter}"


@dataclass(frozen=True, eq=False)
class PublishedHeads:
    """Heads as read from a checkpoint.

    Attributes:
        spec: their sizes.
        state: their tensors under the served names, in their stored dtype.
        extra: the other entries of their ``config.json``, such as ``BASE_MODEL``.

    """

    spec: HeadsSpec
    state: dict[str, torch.Tensor]
    extra: dict[str, Any]


@dataclass(frozen=True)
class HeadNames:
    """The names of a checkpoint's tensors.

    Attributes:
        heads: the heads' tensors by stored name.
        others: the names of all other tensors; they are the model's in a Medusa-2 checkpoint.

    Raises:
        ValueError: there are no heads, the heads mix two layouts, or other tensors are mixed with heads without prefix.

    """

    heads: dict[str, HeadTensor]
    others: list[str]

    @classmethod
    def of(cls, weights: Weights) -> HeadNames:
        parsed = {name: HeadTensor.parse(name) for name in weights}
        heads = {name: tensor for name, tensor in parsed.items() if tensor is not None}
        others = [name for name, tensor in parsed.items() if tensor is None]
        if not heads:
            raise ValueError(
                f"the checkpoint is in no known layout of Medusa heads: it holds {some_of(others)}; expected names "
                "like 0.0.linear.weight, medusa_head.0.0.linear.weight or blocks.0.layers.0.weight"
            )
        if others and not all(tensor.prefixed for tensor in heads.values()):
            raise ValueError(
                f"the checkpoint is in no known layout of Medusa heads: beside heads it holds {some_of(others)}; "
                "in a whole model the heads' names must start with medusa_head., as in medusa_head.0.0.linear.weight"
            )
        return cls(heads, others)

    def __post_init__(self) -> None:
        num_layers = self.num_layers
        if num_layers == 0:
            raise ValueError("the heads have no residual layers; give heads with at least one")
        for name, tensor in self.heads.items():
            if tensor.is_lm_head and tensor.layer not in (None, num_layers):
                raise ValueError(
                    f"{name} is named as an LM head after {tensor.layer} layers, but there are {num_layers}"
                )
        if len({tensor.served_name for tensor in self.heads.values()}) < len(self.heads):
            raise ValueError(f"the checkpoint holds the same heads in two layouts: {some_of(list(self.heads))}")

    @property
    def num_heads(self) -> int:
        return 1 + max(tensor.head for tensor in self.heads.values())

    @property
    def num_layers(self) -> int:
        return max((1 + (tensor.layer or 0) for tensor in self.heads.values() if not tensor.is_lm_head), default=0)


def read_published(
    weights: Weights, config: Mapping[str, Any], lm_head: Callable[[], torch.Tensor] | None
) -> PublishedHeads:
    """Read heads in any layout.

    The numbers of heads and layers are read from the tensors, since not every published config states them.

    Args:
        weights: the checkpoint's tensors; only the heads' are loaded.
        config: the checkpoint's ``config.json``.
        lm_head: loads the target's LM head, ``[vocab_size, hidden_size]``, for heads without LM heads.

    Raises:
        ValueError: the layout is unknown, tensors are missing, or their shapes do not fit together.

    """
    names = HeadNames.of(weights)
    check_entries(dict(config), CONFIG_FILE)
    num_heads, num_layers = names.num_heads, names.num_layers
    if (named := config.get("medusa_num_heads", num_heads)) > num_heads:
        raise ValueError(f"config.json names {named} heads, but the weights hold {num_heads}; download both again")
    loaded = weights.load(names.heads)
    state = {tensor.served_name: loaded[name] for name, tensor in names.heads.items()}
    if "lm_heads.0.weight" not in state:
        if lm_head is None:
            raise ValueError("the heads have no LM heads of their own; give their target model with --target")
        state["lm_heads.0.weight"] = lm_head()
    _drop_empty_biases(state, config)
    spec = HeadsSpec(
        hidden_size=len(state[next(name for name in state if name.startswith("blocks."))]),
        vocab_size=len(state["lm_heads.0.weight"]),
        num_heads=num_heads,
        num_layers=num_layers,
        fc_bias=any(name.endswith(".bias") for name in state),
        shared_lm_head=_shares_lm_head(names, config),
    )
    spec.validate(state)
    return PublishedHeads(spec, state, _extra(config, spec))


def write_original(directory: Path, heads: PublishedHeads) -> Path:
    """Write heads as the original repository reads them: ``medusa_lm_head.pt`` and its ``config.json``.

    The original code initialises missing biases at random, so layers without biases get zeros, and ``medusa_fc_bias``
    is set to false. A shared LM head is not written, since the original code takes the target's.

    Raises:
        ValueError: the layers of a head differ (the original code has one module for all of them), or the config does
            not name the heads' target (the original code would take Vicuna).

    """
    spec = heads.spec
    _check_one_module(heads)
    if BASE_MODEL not in heads.extra:
        raise ValueError(
            f"config.json does not name the heads' model ({BASE_MODEL}), which the original code needs; give --target"
        )
    state: dict[str, torch.Tensor] = {}
    for served, stored in heads.state.items():
        tensor = HeadTensor.parse(served)
        assert tensor is not None
        if tensor.is_lm_head and spec.shared_lm_head:
            continue
        name = tensor.original_name(spec.num_layers)
        state[name] = stored
        if not tensor.is_lm_head and not spec.fc_bias:
            state[name.removesuffix("weight") + "bias"] = stored.new_zeros(len(stored))
    config = heads.extra | {"medusa_num_heads": spec.num_heads, "medusa_num_layers": spec.num_layers}
    if spec.shared_lm_head:
        config["version"] = SHARED_VERSION
    if not spec.fc_bias:
        config["medusa_fc_bias"] = False
    with replaced_directory(directory) as temporary:
        write_json(temporary / CONFIG_FILE, config)
        with (temporary / ORIGINAL_FILE).open("wb") as file:
            torch.save(state, file)
    return directory


def _shares_lm_head(names: HeadNames, config: Mapping[str, Any]) -> bool:
    """Whether all heads use the target's LM head: they store none, or head 0's alone in the served layout."""
    lm_heads = [tensor for tensor in names.heads.values() if tensor.is_lm_head]
    if not lm_heads:
        return True
    only_first = len(lm_heads) == 1 and lm_heads[0].head == 0 and lm_heads[0].layer is None
    return only_first and bool(config.get("original_lm_head", names.num_heads > 1))


def _drop_empty_biases(state: dict[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Remove the zero biases that ``write_original`` adds to layers without biases; other biases stay."""
    biases = [name for name in state if name.endswith(".bias")]
    if config.get("medusa_fc_bias") is False and not any(bool(state[name].any()) for name in biases):
        for name in biases:
            del state[name]


def _check_one_module(heads: PublishedHeads) -> None:
    for name, tensor in heads.state.items():
        first = re.sub(r"\.layers\.\d+\.", ".layers.0.", name)
        if not torch.equal(tensor, heads.state[first]):
            raise ValueError(
                f"{first} and {name} differ, but the original code has one module for all layers of a head; "
                "only heads of one layer can be written for it"
            )


def _extra(config: Mapping[str, Any], spec: HeadsSpec) -> dict[str, Any]:
    """Keep the entries of ``config`` that state neither sizes nor the layout."""
    known = {*spec.to_config(), *OWN_ENTRIES}
    return {key: value for key, value in config.items() if key not in known and not is_read_as_size(key)}
