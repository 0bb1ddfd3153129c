# SPDX-License-Identifier: Apache-2.0
"""Self-distillation from ``vllm serve`` with dynamic trees: by its chat and completion endpoints the same records as
from an engine in the process of the test, which decodes plainly."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e.server import MODEL, Server
from tests.integration.distillation import DIALOGUE, SharedEngineTarget, read_back, write_lines
from tests.integration.engines import engine
from vllm_medusa.data.record_files import BadLineCounter, BadLineError, BadLines
from vllm_medusa.data.records import Record
from vllm_medusa.distillation.dialogue import PromptStyle, Target
from vllm_medusa.distillation.raw_text import TextRequest
from vllm_medusa.distillation.run import DistillConfig, distill
from vllm_medusa.distillation.served_target import ServedTarget

CONTEXT = 256


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    return write_lines(path, DIALOGUE, *({"prompt": f"def f{index}(x):"} for index in range(7)))


def run(target: Target, style: PromptStyle, prompts: Path, output: Path) -> list[Record]:
    config = DistillConfig(model=MODEL, style=style, temperature=(0.0, 0.9), max_tokens=12, shard_size=4)
    distill([prompts], output, config, target, BadLineCounter(BadLines.REFUSE), show_progress=False)
    return read_back(output)


@pytest.fixture(scope="module")
def offline(
    chat_target: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[PromptStyle, list[Record]]:
    """What an engine in this process says, in each style."""
    output = tmp_path_factory.mktemp("offline")
    with engine(chat_target, skip_tokenizer_init=False, max_model_len=CONTEXT) as llm:
        on_engine = SharedEngineTarget(llm, AutoTokenizer.from_pretrained(chat_target))
        return {style: run(on_engine, style, prompts, output / style) for style in PromptStyle}


@pytest.mark.parametrize("style", PromptStyle)
def test_a_server_s_records_are_those_of_an_own_engine(
    server: Server, offline: dict[PromptStyle, list[Record]], prompts: Path, tmp_path: Path, style: PromptStyle
) -> None:
    before = server.counters()["accepted_tokens"]
    served = run(ServedTarget(f"{server.url}/v1", MODEL, concurrency=4), style, prompts, tmp_path / "set")
    assert served == offline[style]
    assert server.counters()["accepted_tokens"] > before
    assert all(getattr(record, "tokens", ()) for record in served)


def test_a_server_writes_raw_text_as_an_own_engine_does(server: Server, chat_target: Path) -> None:
    opening = tuple(AutoTokenizer.from_pretrained(chat_target)("def ")["input_ids"])
    requests = [TextRequest(opening, ":", 1.0, 0.9, max_tokens=12, seed=seed) for seed in range(5)]
    written = ServedTarget(f"{server.url}/v1", MODEL, concurrency=1).write(requests, lambda text: None)
    with engine(chat_target, skip_tokenizer_init=False, max_model_len=CONTEXT) as llm:
        on_engine = SharedEngineTarget(llm, AutoTokenizer.from_pretrained(chat_target))
        assert written == on_engine.write(requests, lambda text: None)


def test_a_prompt_that_is_too_long_for_the_server_is_a_bad_line(server: Server, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", {"prompt": "word " * 2 * CONTEXT})
    target = ServedTarget(f"{server.url}/v1", MODEL, concurrency=1)
    with pytest.raises(BadLineError, match=rf"{prompts}:1: the server refuses it: .*{CONTEXT}"):
        run(target, PromptStyle.CHAT, prompts, tmp_path / "set")
