# SPDX-License-Identifier: Apache-2.0
"""Wrong prompts and data, heads that ``eval`` refuses, and wrong options of the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.unit.published import HIDDEN, VOCAB, write_original, write_target
from tests.unit.refusals.case import Case, Section, value_error
from tests.unit.refusals.heads import DEEP, safetensors
from vllm_medusa.checkpoint.format import HeadsSpec, write_heads
from vllm_medusa.cli import app
from vllm_medusa.data.prompts import read_prompts
from vllm_medusa.data.record_files import BadLineCounter, BadLines, read_records
from vllm_medusa.evaluation.measure import load_heads

CONVERSATION = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]}


def data(what: str, content: str | bytes, *names: str, file: str = "data.jsonl", read: Any = read_records) -> Case:
    def refused(directory: Path) -> str:
        (directory / file).write_bytes(content.encode() if isinstance(content, str) else content)
        return value_error(lambda: list(read([directory / file], BadLineCounter(BadLines.REFUSE))))

    return Case(what, (file, *names), refused)


def record(value: Any, *names: str) -> Case:
    text = json.dumps(value)
    return data(f"`{text}`", text, "data.jsonl:1: ", *names)


def prompt(what: str, content: str, *names: str, file: str = "prompts.jsonl") -> Case:
    return data(what, content, *names, file=file, read=read_prompts)


DATA = Section(
    "Prompts and data",
    "`train`, `distill` and `eval` print `Error:` and this line, and exit with 2. With `--skip-bad` they skip and "
    "count such lines; an array that is broken cannot be skipped.",
    (
        data(
            "a line that is not JSON",
            '{"text": \n',
            "data.jsonl:1: not JSON: Expecting value at character 9",
            "--skip-bad",
        ),
        data("a line that is not UTF-8", b'{"text": "\xe9"}\n', "data.jsonl:1: not UTF-8"),
        data("a line of lists in lists, 100,000 deep", DEEP, "data.json:1", "nested too deeply", file="data.json"),
        data(
            "a line of objects in objects, 100,000 deep",
            '{"text":' * 100_000,
            "data.jsonl:1: not JSON: a value is nested too deeply",
        ),
        data("an integer of 10,000 digits", '{"id": ' + "9" * 10_000 + "}", "data.jsonl:1: not JSON"),
        data(
            "an array with an integer of 10,000 digits",
            "[" + "9" * 10_000 + "]",
            "data.json:1: the JSON array is broken",
            file="data.json",
        ),
        data(
            "an array that ends early",
            '[{"text": "a"}',
            "data.json:1: the JSON array is broken: it ends early",
            file="data.json",
        ),
        data("a file of another kind", "", "unknown kind of file '.csv'", file="data.csv"),
        data("`[1]` in a line", '\n{"text": "a"}\n[1]', "data.jsonl:3: must be a JSON object, got [1]"),
        record({"id": 1, "body": ""}, "holds 'id', 'body'; give 'messages', 'conversations'"),
        record({"conversations": [{"from": "tool", "value": "x"}]}, "conversations.0.from: ", "got 'tool'"),
        record({"messages": [{"role": "user", "content": None}]}, "content: input should be a valid string, got None"),
        record({"messages": [{"role": "user"}]}, "content is missing"),
        record({"messages": [{"role": "user", "content": "Hello?"}]}, "no turn is the assistant's"),
        record({"messages": []}, "no turn is the assistant's"),
        record(
            {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": " "}]},
            "message 2 (counted from 1), the assistant's, is empty",
        ),
        record({"prompt": "Hello?", "completion": ""}, "completion: ", "at least 1 character"),
        record({"text": ""}, "text: ", "at least 1 character"),
        record(
            {**CONVERSATION, "tokens": [{"prompt_ids": [], "completion_ids": [1]}] * 2}, "tokens of 2 turns", "has 1"
        ),
        record(
            {**CONVERSATION, "tokens": [{"prompt_ids": [-1], "completion_ids": [1]}]},
            "greater than or equal to 0, got -1",
        ),
        prompt('a prompt `{"id": 1}`', '{"id": 1}', "prompts.jsonl:1: holds 'id'; give 'messages'"),
        prompt(
            "a prompt without a user's turn",
            '{"messages": [{"role": "system", "content": "x"}]}',
            "no turn is the user's",
        ),
        prompt("a prompt nested 100,000 deep", DEEP, "nested too deeply", file="prompts.json"),
    ),
)


def measured(what: str, *names: str, change: Callable[[Path], Any], vocab: int = VOCAB) -> Case:
    """Heads for ``eval``, of which ``change`` changes something in their directory."""

    def refused(directory: Path) -> str:
        spec = HeadsSpec(HIDDEN, vocab, 2)
        target = write_target(directory / "target")
        heads = write_heads(
            directory / "heads", spec, {name: torch.zeros(shape) for name, shape in spec.shapes().items()}
        )
        change(heads)
        return value_error(lambda: load_heads(heads, directory / "target", target))

    return Case(what, names, refused)


def missing_heads(directory: Path) -> str:
    target = write_target(directory / "target")
    return value_error(lambda: load_heads(directory / "missing", directory / "target", target))


def published_heads(directory: Path) -> str:
    target = write_target(directory / "target")
    write_original(directory / "heads")
    return value_error(lambda: load_heads(directory / "heads", directory / "target", target))


def with_config(**changes: Any) -> Callable[[Path], Any]:
    def change(heads: Path) -> None:
        path = heads / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


EVAL = Section(
    "`vllm-medusa eval --heads`",
    "The command prints `Error:` and this line, and exits with 2.",
    (
        Case("a directory that is not there", ("there is no directory", "missing"), missing_heads),
        Case("published heads", ("heads/config.json: the heads' config lacks", "vllm-medusa convert"), published_heads),
        measured(
            "`config.json` that is cut",
            "heads/config.json is not JSON",
            change=lambda heads: (heads / "config.json").write_text("{"),
        ),
        measured(
            "`config.json` that holds `null`",
            "heads/config.json holds None",
            change=lambda heads: (heads / "config.json").write_text("null"),
        ),
        measured(
            "`config.json` of lists in lists, 100,000 deep",
            "nested too deeply",
            change=lambda heads: (heads / "config.json").write_text(DEEP),
        ),
        measured('`config.json` with "num_heads": "2"', "has num_heads '2'", change=with_config(num_heads="2")),
        measured(
            '`config.json` with "model_type": "eagle"',
            "model_type must be",
            "'eagle'",
            change=with_config(model_type="eagle"),
        ),
        measured(
            "a draft vocabulary without its `token_map`",
            "heads/model.safetensors: the heads' weights lack token_map",
            change=with_config(truncated_vocab_size=8),
        ),
        measured(
            "`model.safetensors` cut at 1,000 bytes",
            "heads/model.safetensors",
            "incomplete or damaged",
            change=lambda heads: (heads / "model.safetensors").write_bytes(safetensors()[:1000]),
        ),
        measured(
            "no `model.safetensors`",
            "heads/model.safetensors",
            "No such file",
            change=lambda heads: (heads / "model.safetensors").unlink(),
        ),
        measured(
            "`model.safetensors` of other tensors",
            "heads/model.safetensors: the heads' weights lack blocks.0.layers.0.bias, ",
            " and 3 more",
            change=lambda heads: save_file({"a": torch.zeros(1)}, heads / "model.safetensors"),
        ),
        measured(
            "heads of another target",
            "the heads have vocab_size 17, the target",
            "has 16",
            change=lambda heads: None,
            vocab=VOCAB + 1,
        ),
    ),
)


def command(given: str, *names: str, arguments: Callable[[Path], list[object]]) -> Case:
    def refused(directory: Path) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments(directory))))
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        [line] = result.stderr.splitlines()
        assert line.startswith("Error: ")
        return line.removeprefix("Error: ")

    return Case(given, names, refused)


def prompts(directory: Path) -> Path:
    (directory / "prompts.txt").write_text("a prompt\n")
    return directory / "prompts.txt"


def distill(directory: Path, *more: object) -> list[object]:
    return ["distill", prompts(directory), "--output", directory / "set", *more]


def distill_from(directory: Path, *more: object) -> list[object]:
    return distill(directory, "--model", directory / "model", *more)


def train(directory: Path, *more: object) -> list[object]:
    return ["train", "--target", "T", "--data", directory / "a.jsonl", "--output", directory / "out", *more]


COMMANDS = Section(
    "Options of the commands",
    "The command prints `Error:` and this line, and exits with 2.",
    (
        command(
            "`convert missing OUTPUT`",
            "there is no directory",
            "missing",
            arguments=lambda d: ["convert", d / "missing", d / "output"],
        ),
        command(
            "`convert no/such OUTPUT`",
            "no/such is neither a directory nor a repository",
            arguments=lambda d: ["convert", "no/such", d / "output"],
        ),
        command(
            "`eval --model missing`",
            "there is no directory",
            "missing",
            arguments=lambda d: ["eval", "--model", d / "missing", "--heads", d, "--prompts", prompts(d)],
        ),
        command(
            "`eval` without prompts and data",
            "give either --prompts",
            arguments=lambda d: ["eval", "--model", d, "--heads", d],
        ),
        command(
            "`eval --output missing/eval.json`",
            "missing/eval.json cannot be written, there is no directory",
            arguments=lambda d: [
                "eval",
                "--model",
                d,
                "--heads",
                d,
                "--prompts",
                prompts(d),
                "--output",
                d / "missing" / "eval.json",
            ],
        ),
        command("`distill` without `--model`", "model is missing", arguments=distill),
        command(
            "`distill --temperature -1`",
            "temperature: ",
            "at least 0",
            arguments=lambda d: distill_from(d, "--temperature", "-1"),
        ),
        command(
            "`distill --engine-args '{'`",
            "engine-args: '{' is not JSON",
            arguments=lambda d: distill_from(d, "--engine-args", "{"),
        ),
        command(
            "`distill --engine-args` nested 100,000 deep",
            "engine-args: ",
            "nested too deeply",
            arguments=lambda d: distill_from(d, "--engine-args", DEEP),
        ),
        command(
            "`distill --engine-args '[]'`",
            "engine-args: must be a JSON object",
            arguments=lambda d: distill_from(d, "--engine-args", "[]"),
        ),
        command(
            "`train --learning-rate -1`",
            "learning_rate: input should be greater than 0, got '-1'",
            arguments=lambda d: train(d, "--learning-rate", "-1"),
        ),
        command(
            "`train --num-heads many`", "num_heads: ", "got 'many'", arguments=lambda d: train(d, "--num-heads", "many")
        ),
        command(
            "`train --method medusa2 --target-training full --distill`",
            "distill must be false",
            arguments=lambda d: train(d, "--method", "medusa2", "--target-training", "full", "--distill"),
        ),
        command(
            "`train --config absent.yaml`", "absent.yaml", arguments=lambda d: train(d, "--config", d / "absent.yaml")
        ),
    ),
)
