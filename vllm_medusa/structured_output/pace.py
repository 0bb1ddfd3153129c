# SPDX-License-Identifier: Apache-2.0
"""How large a draft may be whose rows need a grammar's masks."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from vllm.v1.request import Request

MASK_SECONDS = 0.002
"""Time that the masks of a step's drafts may take, of all requests together and beside the roots'. Most masks take some
ten microseconds; but there are grammars (a count of repetitions over a wide class of characters) whose masks take ten
milliseconds at some places, and then a large draft costs more than it gains."""


class Pace:
    """Watches the time that each request's masks take."""

    def __init__(self) -> None:
        self._seconds: WeakKeyDictionary[Request, float] = WeakKeyDictionary()
        self._num_reqs = 1

    def shared_by(self, num_reqs: int) -> None:
        """Note how many requests of the last step followed a grammar."""
        self._num_reqs = num_reqs

    def took(self, request: Request, num_masks: int, seconds: float) -> None:
        """Note what the masks of a request's draft took in the last step."""
        if num_masks:
            self._seconds[request] = seconds / num_masks

    def most_nodes(self, request: Request) -> int | None:
        """Return most nodes of a request's next draft, at least one; None where nothing is known of its masks."""
        seconds = self._seconds.get(request)
        return None if seconds is None else max(1, int(MASK_SECONDS / self._num_reqs / seconds))
