# SPDX-License-Identifier: Apache-2.0
"""Rounds under a load become figures against plain decoding, and so does what vLLM's load generator writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from load import Round, Work, summarise
from load_report import Result, report
from load_servers import Traffic, bench_options, command, result_of
from vllm_medusa.demo.engine import Engine


def test_speed_is_all_tokens_by_all_seconds_and_rows_are_those_of_a_step() -> None:
    plain = [Round(40, 4.0, 10, 0, [0.4, 0.4]), Round(40, 6.0, 10, 0, [0.8, 0.8])]
    tree = [Round(40, 1.0, 5, 20, [0.1, 0.3]), Round(40, 4.0, 5, 30, [0.2, 0.4])]
    found = summarise({"plain": plain, "tree_4": tree})
    assert found["plain"] == Result(8.0, 1.0, 800.0, 800.0, 2.0)
    assert found["tree_4"] == Result(16.0, 2.0, 300.0, 400.0, 7.0)


def test_a_contender_of_fewer_rounds_is_compared_over_these() -> None:
    plain = [Round(40, 4.0, 10, 0, [0.4, 0.4]), Round(40, 8.0, 10, 0, [0.8, 0.8])]
    found = summarise({"plain": plain, "tree_63": [Round(40, 16.0, 5, 20, [0.1, 0.3])]})
    assert found["tree_63"].speedup == 0.25


def test_rounds_of_a_load_have_the_next_prompts_and_repeat_them_where_they_are_few() -> None:
    work = Work([[1], [2], [3]], {2: 16}, {2: 3})
    assert [work.load(2, number).prompts for number in range(3)] == [[[1], [2]], [[3], [1]], [[2], [3]]]


def test_what_a_server_was_asked_becomes_a_result() -> None:
    plain = {"total_output_tokens": 64, "completed": 4, "output_throughput": 10.0, "p50_tpot_ms": 90, "p95_tpot_ms": 95}
    tree = {**plain, "output_throughput": 15.0, "spec_decode_accepted_tokens": 20, "spec_decode_draft_tokens": 120}
    assert result_of(plain, None, 2) == Result(10.0, None, 90, 95, 2.0)
    assert result_of(tree, plain, 2) == Result(15.0, 1.5, 90, 95, 2 * (1 + 120 / 40))


def test_vllm_knows_the_options_of_servers_and_of_its_load_generator() -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    engine = Engine("TARGET", "float32", {"method": "medusa", "model": "HEADS"}, max_num_seqs=64)
    served = make_arg_parser(FlexibleArgumentParser()).parse_args(command(engine, 8001)[3:])
    assert (served.model, served.max_num_seqs, served.enforce_eager) == ("TARGET", 64, True)
    assert served.speculative_config == engine.speculative_config
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    traffic = Traffic(Path("TARGET"), Path("questions.jsonl"), concurrency=4, requests=8, tokens=32)
    asked = parser.parse_args(bench_options(8001, traffic, warm_ups=1))
    assert (asked.max_concurrency, asked.num_prompts, asked.spec_bench_output_len, asked.ignore_eos) == (4, 8, 32, True)


def test_the_file_has_tokens_per_second_by_requests_and_contender(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {
        1: {"plain": Result(10.0, 1.0, 100, 110, 1), "auto": Result(12.0, 1.2, 80, 99, 3.4)},
        64: {"plain": Result(99.0, 1.0, 640, 650, 64), "auto": Result(98.0, 0.99, 650, 660, 64)},
    }
    report(results, "a title", tmp_path, {"dtype": "float32"})
    written = json.loads((tmp_path / "load.json").read_text())
    assert written["concurrency"] == {"1": {"plain": 10.0, "auto": 12.0}, "64": {"plain": 99.0, "auto": 98.0}}
    assert written["details"]["1"]["auto"]["rows_per_step"] == 3.4
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert "1.20" in capsys.readouterr().out
