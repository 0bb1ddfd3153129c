# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from packaging.version import Version

from vllm_medusa.compat import version


@pytest.mark.parametrize("found", ["0.32.0rc1", "0.32.0", "0.32.1", "0.33.0", "0.33.0+cu130", "0.33.7"])
def test_supported_versions_pass(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(version, "vllm_version", lambda: Version(found))
    version.check_vllm_version()
