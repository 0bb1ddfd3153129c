# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from tests.patched import changes, standing
from vllm_medusa.compat.backends import overridden

NATIVE = AttentionBackendEnum.CPU_ATTN
OTHER = AttentionBackendEnum.TRITON_ATTN


class Ours(CPUAttentionBackend):
    pass


class Foreign(CPUAttentionBackend):
    pass


@pytest.fixture
def foreign_override() -> Iterator[None]:
    register_backend(NATIVE, f"{__name__}.Foreign")
    yield
    NATIVE.clear_override()


def test_an_override_ends_with_its_context() -> None:
    before = standing("layers")
    with overridden({NATIVE: Ours, OTHER: Ours}):
        assert NATIVE.get_class() is OTHER.get_class() is Ours
    assert changes(before) == []
    assert not NATIVE.is_overridden()
    assert NATIVE.get_class() is CPUAttentionBackend


@pytest.mark.usefixtures("foreign_override")
def test_an_override_that_stood_before_ours_is_restored() -> None:
    before = standing("layers")
    with overridden({NATIVE: Ours, OTHER: Ours}):
        assert NATIVE.get_class() is Ours
    assert changes(before) == []
    assert NATIVE.get_class() is Foreign
    assert not OTHER.is_overridden()


@pytest.mark.usefixtures("foreign_override")
def test_an_override_ends_when_a_layer_cannot_be_constructed() -> None:
    with pytest.raises(RuntimeError, match="no memory"), overridden({NATIVE: Ours}):
        raise RuntimeError("no memory")
    assert NATIVE.get_class() is Foreign


def test_overrides_nest() -> None:
    with overridden({NATIVE: Foreign}):
        with overridden({NATIVE: Ours}):
            assert NATIVE.get_class() is Ours
        assert NATIVE.get_class() is Foreign
    assert not NATIVE.is_overridden()


def test_the_selector_remembers_no_class_from_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr(_cached_get_attn_backend, "cache_clear", lambda: cleared.append(NATIVE.is_overridden()))
    with overridden({NATIVE: Ours}):
        assert len(cleared) == 1
    assert cleared == [False, False]
