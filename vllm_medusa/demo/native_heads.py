# SPDX-License-Identifier: Apache-2.0
"""Heads for stock vLLM's own Medusa out of heads with a draft vocabulary.

vLLM 0.32's Medusa model reads no ``token_map``: it wants an LM head over the whole vocabulary in the heads' file. Heads
that share their target's LM head lack only rows that the target has, so the whole one makes the same heads.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from vllm_medusa.checkpoint.format import CONFIG_FILE, TOKEN_MAP, WEIGHTS_FILE, read_spec, read_state, write_heads
from vllm_medusa.checkpoint.target import check_sizes, read_lm_head
from vllm_medusa.files import sha256_of

LM_HEAD = "lm_heads.0.weight"


def native_heads(heads: Path, target: Path, directory: Path) -> Path:
    """Return heads that stock vLLM reads: the heads themselves, or ones over the whole vocabulary.

    Args:
        heads: the heads' directory.
        target: their target's directory.
        directory: where derived heads are kept, under a name that follows from the content of heads and LM head.

    Raises:
        ValueError: the heads read paths, have LM heads of their own over a draft vocabulary, or belong to another
            target.
        OSError: a file cannot be read or written.

    """
    spec = read_spec(heads)
    if spec.path_rank is not None:
        raise ValueError(
            f"{heads}: vLLM's own chain runs plain heads, and these read the path to a node; give plain ones with "
            "--native-heads"
        )
    if spec.draft_vocab_size is None:
        return heads
    if not spec.shared_lm_head:
        raise ValueError(
            f"{heads}: vLLM's own chain needs LM heads over the whole vocabulary, and these heads' own ones have "
            f"{spec.draft_vocab_size} rows; give heads that share the target's LM head"
        )
    check_sizes(spec, target)
    lm_head = read_lm_head(target).contiguous()
    derived = directory / f"native-heads-{_key(heads, lm_head)}"
    if not derived.exists():
        state = read_state(heads)
        kept, token_map = state.pop(LM_HEAD), state.pop(TOKEN_MAP)
        if not torch.equal(kept, lm_head[token_map.long()].to(kept.dtype)):
            raise ValueError(
                f"{heads}: the LM head of these heads is not that of {target}; give the target that they were "
                "trained for"
            )
        write_heads(derived, replace(spec, draft_vocab_size=None), state | {LM_HEAD: lm_head.to(kept.dtype)})
    return derived


def _key(heads: Path, lm_head: torch.Tensor) -> str:
    parts = [sha256_of(heads / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    parts.append(hashlib.sha256(lm_head.view(torch.uint8).numpy().tobytes()).hexdigest())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
