# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for Hopper, on a machine without a GPU, and what they ask of it is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vllm_medusa.acceptance.walk_kernel import walk_drawn
from vllm_medusa.attention.triton.ops import AttentionStep, LayerOptions, Workspace, tree_attention
from vllm_medusa.kv_cache.kernel_commit import CacheTable, move_accepted
from vllm_medusa.step.derive_kernel import derive_trees_on_device
from vllm_medusa.step.trees import StepTrees

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 << 10
"""Bytes that one program may have there."""

FEW_BYTES = 32
"""Of stack: some numbers that the masks need. An accumulator that does not fit into registers is hundreds."""

PROCESSORS = 132
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Launch:
    """A launch that was asked for."""

    kernel: JITFunction
    arguments: dict[str, Any]

    def compile(self, tmp_path: Path) -> tuple[int, int]:
        """Compile for ``HOPPER``; return the bytes of shared memory and of stack, onto which registers spill."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[index,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[index,] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[index,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=HOPPER, options={"num_warps": self.arguments["num_warps"]})
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
        return compiled.metadata.shared, int(re.search(r"STACK:(\d+)", usage.stdout)[1])


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Note launches instead of carrying them out."""
    noted: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        noted.append(Launch(kernel, dict(zip(names, args, strict=False)) | kwargs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        yield noted


def attend(
    rows: int,
    group: int,
    head_dim: int = 128,
    requests: int = 1,
    cache_dtype: torch.dtype = torch.bfloat16,
    query_dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> list[Launch]:
    """Ask for the launches of a step in which every request has that many rows."""
    tokens, kv_heads, heads = requests * rows, 8, 8 * group
    query = empty(tokens, heads, head_dim, dtype=query_dtype)
    cache = empty(99, 16, kv_heads, 2 * head_dim, dtype=cache_dtype)
    step = AttentionStep(
        query_start_loc=empty(requests + 1, dtype=torch.int32),
        seq_lens=empty(requests, dtype=torch.int32),
        block_table=empty(requests, 512, dtype=torch.int32),
        ancestor_bits=empty(tokens, -(-rows // 63)),
        depths=empty(tokens, dtype=torch.int32),
        max_rows=rows,
    )
    workspace = Workspace.allocate(head_dim, 256, PROCESSORS, torch.device("meta"))
    with launches() as noted:
        tree_attention(
            query,
            *cache.split(head_dim, dim=-1),
            torch.empty_like(query, dtype=torch.bfloat16),
            step,
            LayerOptions(0.1, **options),
            workspace,
        )
    return noted


def scalar() -> torch.Tensor:
    return empty(dtype=torch.float32)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"rows": 64, "group": 1}, id="tree"),
        pytest.param({"rows": 64, "group": 4, "window": 4096, "soft_cap": 50.0}, id="tree-window-cap"),
        pytest.param({"rows": 64, "group": 2, "head_dim": 256}, id="tree-256"),
        pytest.param(
            {"rows": 1, "group": 4, "cache_dtype": torch.float8_e4m3fn, "key_scale": scalar(), "value_scale": scalar()},
            id="plain-fp8",
        ),
        pytest.param(
            {
                **{"rows": 64, "group": 4, "cache_dtype": torch.float8_e4m3fn, "query_dtype": torch.float8_e4m3fn},
                **dict.fromkeys(["query_scale", "key_scale", "value_scale"], empty(8, dtype=torch.float32)),
            },
            id="tree-fp8-by-head",
        ),
    ],
)
def test_attention_fits_into_registers_and_leaves_shared_memory_for_a_second_program(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    attention, merge = attend(**asked)
    shared, stack = attention.compile(tmp_path)
    assert 2 * shared <= SHARED_MEMORY
    assert stack <= FEW_BYTES
    assert merge.compile(tmp_path)[1] == 0


def test_a_batch_that_keeps_the_device_busy_by_itself_is_one_launch() -> None:
    assert len(attend(rows=64, group=4, requests=32)) == 1


def test_the_trees_the_walk_and_the_commit_are_one_launch_each(tmp_path: Path) -> None:
    buffers = StepTrees.allocate(31, 2, 80, torch.device("meta"))
    table = CacheTable(empty(32), empty(99, 16, 8, 64))
    with launches() as noted:
        trees = derive_trees_on_device(
            empty(2, 31), empty(2), empty(3), empty(3), empty(64), empty(80), empty(80), 4, 2, buffers
        )
        accepted = walk_drawn(trees, empty(64), max_rows=32)
        move_accepted(table, trees, accepted, empty(80))
    assert len(noted) == 3
    for launch in noted:
        assert launch.compile(tmp_path)[1] == 0
