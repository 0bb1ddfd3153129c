"""How layers come to attend through the tree form of the backend that vLLM selects for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend


@contextmanager
def overridden(backends: Mapping[AttentionBackendEnum, type[AttentionBackend]]) -> Iterator[None]:
    """Make layers that are constructed in this context use other backends where they would use vLLM's.

    The registry's overrides are the way in; they are lifted again for the sake of other engines in the process.

    Args:
        backends: for each of vLLM's backends, what takes its place.

    """
    with ExitStack() as stack:
        for native, backend in backends.items():
            register_backend(native, f"{backend.__module__}.{backend.__name__}")
            stack.callback(native.clear_override)
        stack.callback(_cached_get_attn_backend.cache_clear)
        _cached_get_attn_backend.cache_clear()
        yield
