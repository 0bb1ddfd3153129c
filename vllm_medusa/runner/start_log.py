# SPDX-License-Identifier: Apache-2.0
"""The line in vLLM's log that says what an engine decodes with."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING

from vllm.config import VllmConfig

from vllm_medusa.compat.log import logger
from vllm_medusa.compat.version import vllm_version
from vllm_medusa.config import medusa_config
from vllm_medusa.tree.options import Tree
from vllm_medusa.tree.static import StaticTree

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup


def log_start(vllm_config: VllmConfig, tree: Tree, groups: Iterable[AttentionGroup]) -> None:
    """Log what is active, once for all ranks."""
    options = medusa_config(vllm_config)
    assert options is not None
    logger.info_once(
        "Medusa: vllm-medusa %s on vLLM %s, model runner %s, attention %s, %s, %s acceptance, %d heads of %s",
        version("vllm-medusa"),
        str(vllm_version()),
        "V2" if vllm_config.use_v2_model_runner else "V1",
        ", ".join(sorted({group.backend.__name__ for group in groups})),
        describe(tree),
        options.medusa_acceptance,
        options.heads.num_heads,
        options.draft_model_config.model,
        scope="global",
    )


def describe(tree: Tree) -> str:
    """Say in a few words what is drafted."""
    if not isinstance(tree, StaticTree):
        floor = f", paths of probability {tree.min_probability} and more" if tree.min_probability else ""
        return f"dynamic tree of at most {tree.num_nodes} nodes{floor}"
    if not tree.branches:
        return f"chain of {tree.num_nodes}"
    return f"tree of {tree.num_nodes} nodes, {tree.depth} deep"
