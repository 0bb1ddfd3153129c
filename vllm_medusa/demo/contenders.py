# SPDX-License-Identifier: Apache-2.0
"""Who takes part: stock vLLM without and with its own Medusa, and our trees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.checkpoint.format import read_spec
from vllm_medusa.demo.native_heads import native_heads

PLAIN, NATIVE_CHAIN, TREE, TREE_WIDE = CONTENDERS = ("plain", "native_chain", "tree", "tree_wide")

TITLES = {
    PLAIN: "plain vLLM",
    NATIVE_CHAIN: "vLLM's chain",
    TREE: "our tree",
    TREE_WIDE: "our wide tree",
}

SMALL_TREE = {"medusa_tree": "dynamic", "num_speculative_tokens": 6}
"""A small tree of each step's most probable nodes, since on a CPU every row costs compute."""

WIDE_TREE = {"medusa_tree": "sparse", "num_speculative_tokens": 31, "medusa_budget": "off"}
"""Shows the tokens per step that are possible where rows are nearly free."""

TREES: dict[str, dict[str, Any]] = {TREE: SMALL_TREE, TREE_WIDE: WIDE_TREE}


def speculative_configs(
    names: Sequence[str], target: Path, heads: Path, plain_heads: Path, directory: Path
) -> dict[str, dict[str, Any] | None]:
    """Return the ``--speculative-config`` of each contender.

    Args:
        names: some of ``CONTENDERS``.
        target: the target's directory.
        heads: its heads' directory.
        plain_heads: the heads of vLLM's own chain.
        directory: where heads for vLLM's own chain are kept (see ``native_heads``).

    Raises:
        ValueError: the heads cannot be read, or not by vLLM's own chain.
        OSError: a file cannot be read or written.

    """
    configs: dict[str, dict[str, Any] | None] = {}
    for name in names:
        if name == PLAIN:
            configs[name] = None
        elif name == NATIVE_CHAIN:
            depth = {"num_speculative_tokens": read_spec(plain_heads).num_heads}
            configs[name] = {"method": "medusa", "model": str(native_heads(plain_heads, target, directory)), **depth}
        else:
            configs[name] = {"method": "medusa", "model": str(heads), **TREES[name]}
    return configs


def plugins(name: str) -> dict[str, str]:
    """Return a contender's environment: stock vLLM runs without the plugin."""
    return {"VLLM_PLUGINS": "" if name in (PLAIN, NATIVE_CHAIN) else "medusa"}


def fastest_dtype() -> str:
    """Return bf16 if the CPU has instructions for it, else fp32: emulated bf16 makes rows several times as costly."""
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("bf16") else "float32"
