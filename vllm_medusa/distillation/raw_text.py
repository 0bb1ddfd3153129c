# SPDX-License-Identifier: Apache-2.0
"""Text that a target writes from given tokens on, outside of any dialogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TextRequest:
    """Asks a target to go on.

    Attributes:
        prompt_ids: the tokens before the text.
        stop: a string that ends the text, besides the end-of-sequence token.
        temperature, top_p: as in vLLM.
        max_tokens: the longest text.
        seed: of 31 bits.

    """

    prompt_ids: tuple[int, ...]
    stop: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class WrittenText:
    """What the target wrote.

    Attributes:
        text: with special tokens, without the stop string.
        num_tokens: number of tokens emitted.
        ended: whether the target ended it, rather than ``max_tokens``.

    """

    text: str
    num_tokens: int
    ended: bool


OnText = Callable[[WrittenText], None]
"""Called with each text when it is finished."""
