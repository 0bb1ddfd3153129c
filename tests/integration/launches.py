# SPDX-License-Identifier: Apache-2.0
"""What the plugin's code asks of the device in a step: kernels, and results that it would have to wait for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[2] / "vllm_medusa"
WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
"""Operations whose result, or whose result's shape, the host must have before it goes on."""

FREE = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.detach.default}
"""Operations that launch nothing."""


@dataclass
class Watch(TorchDispatchMode):
    """Notes operations that the plugin's own code starts; those of vLLM and of Triton's interpreter are not ours.

    Attributes:
        waits: where the host would wait, as ``file:line operation``.
        launches: operations that would launch kernels, by the stage that started them.
        stage: what is going on.
        whole: stages of which everything counts, what the plugin's code has vLLM do included.

    """

    waits: set[str] = field(default_factory=set)
    launches: Counter[str] = field(default_factory=Counter)
    stage: str | None = None
    whole: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in FREE and not (func.is_view and is_alias(result, args[0])):
            self._count(sys._getframe(1))
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (func in WAITS or by_mask) and (where := ours(sys._getframe(1))) is not None:
            self.waits.add(f"{where} {func}")
        return result

    def _count(self, frame: FrameType | None) -> None:
        if self.stage is not None and (self.stage in self.whole or ours(frame) is not None):
            self.launches[self.stage] += 1

    def watching(self, stage: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that what it starts counts for a stage, or not at all."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.stage, before = stage, self.stage
            try:
                return function(*args, **kwargs)
            finally:
                self.stage = before

        return run

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Count launches of Triton kernels, which the dispatcher does not see, and nothing that interpreting takes."""
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def count(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._count(sys._getframe(1))
            self.stage, before = None, self.stage
            try:
                launch(executor, *args, **kwargs)
            finally:
                self.stage = before

        GridExecutor.__call__ = count
        try:
            yield
        finally:
            GridExecutor.__call__ = launch

    @contextmanager
    def reads(self) -> Iterator[None]:
        """Note tensors that are copied to the host by name."""
        methods = {name: getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu")}

        def noting(name: str, method: Any) -> Any:
            def read(*args: Any, **kwargs: Any) -> Any:
                if (where := ours(sys._getframe(1))) is not None:
                    self.waits.add(f"{where} {name}")
                return method(*args, **kwargs)

            return read

        for name, method in methods.items():
            setattr(torch.Tensor, name, noting(name, method))
        try:
            yield
        finally:
            for name, method in methods.items():
                setattr(torch.Tensor, name, method)


def is_alias(result: Any, of: torch.Tensor) -> bool:
    """Whether a view is one: some operations of that kind, such as ``aten.reshape``, copy where they must."""
    return (
        not isinstance(result, torch.Tensor) or result.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
    )


def ours(frame: FrameType | None) -> str | None:
    """Return where in the plugin an operation was started; None if it was started elsewhere."""
    while frame is not None and any(
        f"/site-packages/{part}/" in frame.f_code.co_filename for part in ("torch", "triton")
    ):
        frame = frame.f_back
    if frame is None:
        return None
    path = Path(frame.f_code.co_filename)
    if PACKAGE not in path.parents:
        return None
    return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
