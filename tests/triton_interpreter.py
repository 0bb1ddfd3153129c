# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's Triton kernels, and with them model runner V2, run on a CPU, in Triton's interpreter.

To be imported before vLLM is: vLLM leaves Triton alone on machines where no Triton backend answers for the device.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton import language as tl  # noqa: F401
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.language import core  # noqa: F401
from triton.runtime import driver, interpreter
from triton.runtime.interpreter import InterpreterBuilder


class InterpreterDriver:
    """A Triton driver for a machine without a device of its own."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> object:
        return torch.cpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)


backends["cpu"] = Backend(compiler=next(iter(backends.values())).compiler, driver=InterpreterDriver)
driver.set_active(InterpreterDriver())

masked_store = InterpreterBuilder.create_masked_store


def store_under_any_mask(builder: InterpreterBuilder, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
    """Store as a GPU does under the integer mask that vLLM's kernel for grammars makes."""
    mask.data = mask.data.astype(bool)
    return masked_store(builder, ptrs, value, mask, *args)


InterpreterBuilder.create_masked_store = store_under_any_mask

# The interpreter puts its own functions into Triton's language for each call of a kernel, a third of all that the call
# takes; nothing here uses the language otherwise, so they are put there once (into the modules that this one names).
interpreter._patch_lang(store_under_any_mask)
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()

convert, converted = interpreter._get_np_dtype, {}


def numpy_type(dtype: Any) -> Any:
    """Look a type up once: the interpreter makes a table of all types for each operation."""
    if dtype.name not in converted:
        converted[dtype.name] = convert(dtype)
    return converted[dtype.name]


interpreter._get_np_dtype = numpy_type

# The interpreter cannot run this one kernel; vLLM's PyTorch version gives the same tokens.
from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402

topk_topp_sampler.HAS_TRITON = False
