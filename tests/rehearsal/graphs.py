# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs: what runs during a capture is recorded, and a replay runs exactly that again.

Recorded are the tensor operations and the kernel launches with their arguments, on the same memory. A Python number, a
grid or an address that a step would need anew is as frozen as in a real graph. Memory that only the graph knows holds
noise when a replay begins. Memory from outside the graph is not kept alive: a graph that reads what has been freed
since the capture fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Work
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

from tests.integration.launches import WAITS

REFUSED = WAITS | {torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default}
"""Operations that wait for the device; a real capture fails there."""

UNWRITTEN = {
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
"""Operations that make memory and write nothing into it."""

NOISE = 0xFF
"""Each byte of noise: NaN as a float, -1 as an integer."""


@dataclass
class Memory:
    """A storage that a graph uses. One that the capture made and nobody else keeps is the graph's own."""

    weak: StorageWeakRef
    size: int
    is_made_here: bool
    own: torch.UntypedStorage | None = None

    def storage(self) -> torch.UntypedStorage:
        if self.own is None and self.weak.expired():
            assert self.is_made_here, f"a graph uses {self.size} bytes that were freed after its capture"
            self.own = torch.UntypedStorage(self.size)
        return self.own if self.own is not None else torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)


@dataclass(frozen=True)
class Frozen:
    """A tensor argument: its place in a memory."""

    memory: Memory
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(self.memory.storage(), self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Call:
    """An operation or a launch, with what it makes; outputs that are inputs too are left out."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    outputs: list[Frozen | None]


class RecordedGraph:
    """Takes the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[Call] = []
        self.replays = 0
        self._memories: dict[int, Memory] = {}
        # Until the capture ends all that it makes stays alive, so that no address is used twice.
        self._alive: list[torch.UntypedStorage] = []

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            for memory in self._memories.values():
                storage = memory.storage()
                if memory.own is not None:
                    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(NOISE)
            for call in self.calls:
                args, kwargs = tree_map(_thaw, (call.args, call.kwargs))
                if call.function in UNWRITTEN:
                    continue
                made = call.function(*args, **kwargs)
                made = made if isinstance(made, tuple | list) else [made]
                for output, result in zip(call.outputs, made, strict=False):
                    if output is not None:
                        output.tensor().copy_(result)
                    elif isinstance(result, torch.ScriptObject):  # What other ranks take part in.
                        Work.unbox(result).wait()

    def reset(self) -> None:
        self.calls.clear()
        self._memories.clear()

    @property
    def launches(self) -> int:
        """Kernel launches and operations of one replay."""
        return sum(call.function not in UNWRITTEN for call in self.calls)

    def freeze(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is None:
            memory = self._memories[storage._cdata] = Memory(StorageWeakRef(storage), storage.nbytes(), False)
        return Frozen(memory, value.dtype, value.storage_offset(), value.size(), value.stride())

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> None:
        args, kwargs = tree_map(self.freeze, (args, kwargs))
        outputs = [self._own(each) for each in (made if isinstance(made, tuple | list) else [made])]
        self.calls.append(Call(function, args, kwargs, outputs))

    def finish(self) -> None:
        """End the capture: what it has made and nobody else keeps is from now on the graph's own."""
        self._alive.clear()

    def _own(self, made: Any) -> Frozen | None:
        if not isinstance(made, torch.Tensor) or made.untyped_storage()._cdata in self._memories:
            return None
        storage = made.untyped_storage()
        self._alive.append(storage)
        self._memories[storage._cdata] = Memory(StorageWeakRef(storage), storage.nbytes(), True)
        frozen = self.freeze(made)
        assert isinstance(frozen, Frozen)
        return frozen


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func not in REFUSED, f"{func} waits for the device in a capture"
        assert func.namespace != "vllm", f"{func} hides from the graph what it does"
        made = func(*args, **kwargs)
        # Some operations, such as a change of dtype, make a view of what is right already and a copy otherwise.
        if not (func.is_view and _memory_of(made) <= _memory_of((args, kwargs))):
            function = func.overloadpacket if func.overloadpacket in UNWRITTEN else func
            self.graph.record(function, args, kwargs, made)
        return made


def _memory_of(values: Any) -> set[int]:
    return {each.untyped_storage()._cdata for each in tree_leaves(values) if isinstance(each, torch.Tensor)}


def _thaw(value: Any) -> Any:
    return value.tensor() if isinstance(value, Frozen) else value


@contextmanager
def record(graph: RecordedGraph, pool: Any = None, stream: Any = None, **options: Any) -> Iterator[None]:
    """Take the place of ``torch.cuda.graph``."""
    launch = GridExecutor.__call__

    def noted(executor: Any, *args: Any, **kwargs: Any) -> None:
        graph.record(lambda *a, **k: launch(executor, *a, **k), args, kwargs, None)
        # The interpreter's own operations are no part of the graph.
        with _disable_current_modes():
            launch(executor, *args, **kwargs)

    GridExecutor.__call__ = noted
    try:
        with _Recorder(graph):
            yield
    finally:
        GridExecutor.__call__ = launch
        graph.finish()
