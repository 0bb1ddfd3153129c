"""Two ranks on one machine, vLLM's multiprocessing executor."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.parallel import Decoded, decode, no_process_left


def test_two_ranks_say_what_one_says_and_accept_as_much(
    tiny_target: Path, tiny_heads: Path, four_prompts: list[list[int]], on_one_rank: Decoded
) -> None:
    with no_process_left():
        together = decode(
            tiny_target, tiny_heads, four_prompts, tensor_parallel_size=2, distributed_executor_backend="mp"
        )
    assert together == on_one_rank
