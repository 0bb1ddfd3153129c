# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from tests.unit.structured_output.test_manager import Asking
from vllm_medusa.structured_output.pace import MASK_SECONDS, Pace


def test_a_steps_requests_share_its_time_by_what_their_masks_took() -> None:
    pace, fast, slow = Pace(), Asking(), Asking()
    assert pace.most_nodes(fast) is None
    pace.took(fast, 40, 40 * MASK_SECONDS / 100)
    pace.took(slow, 2, 2 * MASK_SECONDS / 4)
    pace.took(slow, 0, 1.0)
    assert (pace.most_nodes(fast), pace.most_nodes(slow)) == (100, 4)
    pace.shared_by(2)
    assert (pace.most_nodes(fast), pace.most_nodes(slow)) == (50, 2)
    pace.took(slow, 1, 10 * MASK_SECONDS)
    assert pace.most_nodes(slow) == 1
