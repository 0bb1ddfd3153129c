# SPDX-License-Identifier: Apache-2.0
"""Heads for stock vLLM's own Medusa out of heads with a draft vocabulary.

vLLM 0.32's Medusa model reads no ``token_map``: it wants LM heads over the whole vocabulary. Rows of zeros for tokens
that the heads cannot draft make heads that predict the same: such a token's logit is 0, and the likeliest token's is
larger. The target's own rows would not: heads have learnt nothing of these tokens, and would often draft them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from vllm_medusa.checkpoint.format import CONFIG_FILE, TOKEN_MAP, WEIGHTS_FILE, read_spec, read_state, write_heads
from vllm_medusa.checkpoint.target import check_sizes
from vllm_medusa.files import sha256_of


def native_heads(heads: Path, target: Path, directory: Path) -> Path:
    """Return heads that stock vLLM reads: the heads themselves, or ones over the whole vocabulary.

    Args:
        heads: the heads' directory.
        target: their target's directory.
        directory: where derived heads are kept, under a name that follows from the heads' content.

    Raises:
        ValueError: the heads read paths, or do not fit the target.
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
    check_sizes(spec, target)
    derived = directory / f"native-heads-{_key(heads)}"
    if not derived.exists():
        state = read_state(heads)
        token_map = state.pop(TOKEN_MAP).long()
        for name, kept in state.items():
            if name.startswith("lm_heads."):
                state[name] = kept.new_zeros(spec.vocab_size, spec.hidden_size).index_copy(0, token_map, kept)
        write_heads(derived, replace(spec, draft_vocab_size=None), state)
    return derived


def _key(heads: Path) -> str:
    parts = [sha256_of(heads / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
