# SPDX-License-Identifier: Apache-2.0
"""The overrides of vLLM's attention backends that stand only while layers are constructed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend


@contextmanager
def overridden(backends: Mapping[AttentionBackendEnum, type[AttentionBackend]]) -> Iterator[None]:
    """Make layers that are constructed in this context use other backends where they would use vLLM's.

    On exit the registry is as before, overrides of others included.

    Args:
        backends: for each of vLLM's backends, what takes its place.

    """
    with ExitStack() as stack:
        # Reason: the selector caches the class that it finds; the cache must not outlive either state of the registry.
        _cached_get_attn_backend.cache_clear()
        stack.callback(_cached_get_attn_backend.cache_clear)
        # Reason: a layer looks its backend up in vLLM's registry, and an override there is the public way to another.
        for native, backend in backends.items():
            if native.is_overridden():
                stack.callback(register_backend, native, native.get_path())
            else:
                stack.callback(native.clear_override)
            register_backend(native, f"{backend.__module__}.{backend.__name__}")
        yield
