# SPDX-License-Identifier: Apache-2.0
"""The life of vLLM's CUDA worker, rehearsed on a CPU.

What stands in for the GPU holds for a whole process, so ``tests/integration/test_v2.py`` runs these files in processes
of their own; elsewhere they are not collected.
"""

from __future__ import annotations

from tests.under_test import UNDER_TEST

if "cuda" not in UNDER_TEST.words:
    collect_ignore_glob = ["test_*.py"]
