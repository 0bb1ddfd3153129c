# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for Ampere and Hopper, on a machine without a GPU, and what they ask of it is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
from vllm_medusa.attention.triton.tiling import WARPS_PER_PROCESSOR, Gpu
from vllm_medusa.budget.device_correction import DeviceCorrection
from vllm_medusa.kv_cache.kernel_commit import CacheTable, move_accepted
from vllm_medusa.step.derive_kernel import derive_trees_on_device
from vllm_medusa.step.trees import StepTrees
from vllm_medusa.tree.drafts import Drafts

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

REGISTERS = 1 << 16
"""Of a multiprocessor, of either architecture."""


@dataclass(frozen=True)
class Architecture:
    """Attributes:
    target: what Triton compiles for.
    shared_memory: bytes of a multiprocessor.
    gpu: what launches are fitted to.

    """

    target: GPUTarget
    shared_memory: int
    gpu: Gpu


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 164 << 10, Gpu(108, has_warpgroups=False)),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 228 << 10, Gpu(132, has_warpgroups=True)),
}
HOPPER = ARCHITECTURES["sm_90"]
RESERVED = 1 << 10
"""Bytes of shared memory that CUDA takes for itself, of each program's."""

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


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@dataclass(frozen=True)
class Usage:
    """What a program of a kernel takes.

    Attributes:
        registers: of all its threads.
        shared: bytes of shared memory.
        stack: bytes that registers spill onto.

    """

    registers: int
    shared: int
    stack: int

    def occupancy(self, architecture: Architecture) -> int:
        """Programs that a multiprocessor works on at once."""
        return min(REGISTERS // self.registers, architecture.shared_memory // (self.shared + RESERVED))


@dataclass(frozen=True)
class Launch:
    """A launch that was asked for."""

    kernel: JITFunction
    arguments: dict[str, Any]

    def compile(self, architecture: Architecture, tmp_path: Path) -> Usage:
        """Compile the kernel for this launch's arguments."""
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
        warps = self.arguments["num_warps"]
        compiled = triton.compile(source, target=architecture.target, options={"num_warps": warps})
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("REG", "STACK"))
        # A warp gets registers in portions of eight a thread.
        return Usage(-(-registers // 8) * 8 * 32 * warps, compiled.metadata.shared, stack)


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
    architecture: Architecture,
    rows: int,
    group: int,
    head_dim: int = 128,
    requests: int = 1,
    cache_dtype: torch.dtype = torch.bfloat16,
    query_dtype: torch.dtype = torch.bfloat16,
    contexts_apart: bool = False,
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
    workspace = Workspace.allocate(head_dim, torch.bfloat16, architecture.gpu, torch.device("meta"))
    with launches() as noted:
        tree_attention(
            query,
            *cache.split(head_dim, dim=-1),
            torch.empty_like(query, dtype=torch.bfloat16),
            step,
            LayerOptions(0.1, **options),
            workspace,
            empty(heads, tokens, dtype=torch.float32) if contexts_apart else None,
        )
    return noted


FP8 = {"cache_dtype": torch.float8_e4m3fn, "query_dtype": torch.float8_e4m3fn}
SCALES = dict.fromkeys(["query_scale", "key_scale", "value_scale"], empty(8, dtype=torch.float32))
CASES: dict[str, dict[str, Any]] = {
    "tree": {"rows": 64, "group": 1},
    "tree-group": {"rows": 64, "group": 4},
    "tree-behind-context": {"rows": 64, "group": 4, "contexts_apart": True},
    "tree-window-cap": {"rows": 64, "group": 4, "window": 4096, "soft_cap": 50.0},
    "tree-256": {"rows": 64, "group": 2, "head_dim": 256},
    "small-tree": {"rows": 8, "group": 4},
    "tree-fp8-by-head": {"rows": 64, "group": 4, **FP8, **SCALES},
    "tree-fp8-behind-context": {"rows": 64, "group": 4, "contexts_apart": True, **FP8, **SCALES},
}


@pytest.mark.parametrize("asked", CASES.values(), ids=CASES)
def test_attention_stays_in_registers_and_as_many_programs_run_at_once_as_slots_are_split_for(
    asked: dict[str, Any], architecture: Architecture, tmp_path: Path
) -> None:
    if ("cache_dtype" in asked or "contexts_apart" in asked) and architecture is not HOPPER:
        pytest.skip("Ampere has no eight-bit floats, and no FlashAttention 3 for the contexts")
    attention, *merge = attend(architecture, **asked)
    usage = attention.compile(architecture, tmp_path)
    assert usage.stack == 0
    assert usage.occupancy(architecture) >= WARPS_PER_PROCESSOR // attention.arguments["num_warps"]
    assert all(launch.compile(architecture, tmp_path).stack == 0 for launch in merge)


def test_slots_are_split_for_one_wave_of_programs(architecture: Architecture) -> None:
    for asked in CASES.values():
        attention, *merge = attend(architecture, **asked)
        at_once = architecture.gpu.processors * WARPS_PER_PROCESSOR // attention.arguments["num_warps"]
        blocks = -(-asked["rows"] * asked["group"] // attention.arguments["block_rows"])
        assert attention.arguments["splits"] * blocks * 8 <= at_once
        assert bool(merge) == (attention.arguments["splits"] > 1) == ("contexts_apart" not in asked)


def test_a_batch_that_keeps_the_device_busy_by_itself_is_one_launch(architecture: Architecture) -> None:
    assert len(attend(architecture, rows=64, group=4, requests=32)) == 1


def test_the_budget_is_told_of_drafts_and_learns_of_walks_in_a_launch_each(
    architecture: Architecture, tmp_path: Path
) -> None:
    device, lengths = torch.device("meta"), empty(2, dtype=torch.int32)
    correction, buffers = DeviceCorrection(4, 31, 8, device), StepTrees.allocate(31, 2, 80, device)
    probabilities = empty(2, 31, dtype=torch.float32)
    with launches() as noted:
        correction.rate(Drafts(empty(2, 31), empty(2, 31), empty(2), probabilities), empty(2), probabilities)
        trees = replace(buffers, logits_indices=empty(64), positions=buffers.positions[:64])
        correction.observe(trees, lengths, empty(2), empty(64), lengths, empty(8, dtype=torch.int32))
    assert len(noted) == 2
    for launch in noted:
        assert launch.compile(architecture, tmp_path).stack == 0


def test_the_trees_the_walk_and_the_commit_are_one_launch_each(architecture: Architecture, tmp_path: Path) -> None:
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
        assert launch.compile(architecture, tmp_path).stack == 0
