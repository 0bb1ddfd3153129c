# SPDX-License-Identifier: Apache-2.0
"""Tests of Triton kernels on a CPU, in Triton's interpreter.

Triton decides at its import whether to interpret, for the whole process, so ``tests/unit/test_triton_kernels.py`` runs
these files in a process of their own; elsewhere they are not collected.
"""

from __future__ import annotations

import os

import numpy as np

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import triton.language as tl
    from triton.runtime import interpreter

    interpret_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(
        builder: interpreter.InterpreterBuilder,
        left: interpreter.TensorHandle,
        right: interpreter.TensorHandle,
        *args: object,
    ) -> interpreter.TensorHandle:
        """Multiply bfloat16 as float32: the interpreter itself multiplies the bits as integers."""
        if left.dtype.scalar == tl.bfloat16:
            left, right = (builder.cast_impl(operand, tl.float32) for operand in (left, right))
        return interpret_dot(builder, left, right, *args)

    interpreter.InterpreterBuilder.create_dot = create_dot
    # As on a GPU, the logarithm of zero and the exponential of much are no matter for a warning.
    np.seterr(all="ignore")
