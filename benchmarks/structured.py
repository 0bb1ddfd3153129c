# SPDX-License-Identifier: Apache-2.0
"""Structured output beside free text: whether it is valid and plain decoding's, and tokens per step by kind of grammar.

Requests with a JSON schema, a regular expression or a choice decode greedily in fp32 in batches that they share with
free ones: on plain vLLM, with the chain of each head's most probable token, and with a tree. Steps count
from the one behind a request's first token. No budget cuts the drafts, so the figures do not depend on the machine.

    python benchmarks/structured.py --output build/structured.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# vLLM's CPU worker replaces torch.set_num_threads by a warning.
from torch import set_num_threads

from vllm_medusa.cli.errors import one_line_errors
from vllm_medusa.demo.engine import Engine
from vllm_medusa.demo.places import HEADS, MODEL, QUESTIONS
from vllm_medusa.demo.process import Contender, share_environment
from vllm_medusa.demo.questions import read_questions
from vllm_medusa.demo.report import machine
from vllm_medusa.files import write_json
from vllm_medusa.progress import track
from vllm_medusa.versions import installed_versions

PLAIN, CHAIN, TREE = "plain", "chain", "tree"
JSON, REGEX, CHOICE, FREE = "JSON schema", "regex", "choice", "free"
KINDS = (JSON, REGEX, CHOICE, FREE)
TOKENS = 64


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
NAME = {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"}
SCHEMAS = {
    "Describe a person in JSON with first_name, family_name, age and is_student. The person is a {} from {}.": _object(
        first_name=NAME, family_name=NAME, age=NUMBER, is_student={"type": "boolean"}
    ),
    "Describe a product in JSON with category, price, in_stock and rating. A shop for {}s in {} sells it.": _object(
        category={"enum": ["book", "food", "clothing", "furniture", "electronics"]},
        price=NUMBER,
        in_stock={"type": "boolean"},
        rating={"enum": ["poor", "average", "good", "excellent"]},
    ),
    "Give a {}'s plan for a day in {} in JSON, with the weather and a list of hours.": _object(
        weather={"enum": ["sunny", "cloudy", "rainy", "snowy"]},
        hours={"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 4},
    ),
}
PATTERNS = {
    "On which date was the famous {} of {} born? Answer as YYYY-MM-DD.": r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]",
    "What is the e-mail address of a {} in {}?": r"[a-z]{3,8}\.[a-z]{3,8}@(example|mail)\.(com|org)",
    "Say in one sentence what a {} does in {}.": r"The [a-z]{3,9} (is|has|makes) (a|the) [a-z]{3,9} [a-z]{2,9}\.",
}
CHOICES = {
    "Does a {} in {} work outdoors? Answer yes, no or sometimes.": ["yes", "no", "sometimes"],
    "How does a {} in {} travel?": ["by train", "by car", "by bicycle", "on foot"],
    "What would please a {} from {} most?": ["a new garden", "a new book", "a long journey", "a good dinner"],
}
JOBS = ["teacher", "baker", "sailor", "painter", "doctor", "farmer", "writer", "singer", "tailor", "gardener", "pilot"]
PLACES = ["Paris", "Lagos", "Lima", "Oslo", "Delhi", "Kyoto", "Boston"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Asked:
    """A request: its kind, the user's words, and the argument of ``StructuredOutputsParams`` of that kind."""

    kind: str
    words: str
    rule: Any = None

    def holds_for(self, text: str) -> bool:
        """Whether a text is what was asked for."""
        match self.kind:
            case "JSON schema":
                return _fits(self.rule, text)
            case "regex":
                return re.fullmatch(self.rule, text) is not None
            case "choice":
                return text in self.rule
        return True


@dataclass(frozen=True)
class Answer:
    """A request's text, and in how many steps behind that of the first token the tokens after it came."""

    text: str
    tokens: int
    steps: int


@app.command()
def structured(
    target: Annotated[Path, typer.Option(help="The target's directory.")] = MODEL,
    heads: Annotated[Path, typer.Option(help="Its heads' directory.")] = HEADS,
    requests: Annotated[int, typer.Option(min=3, help="Requests with structured output.")] = 200,
    free: Annotated[int, typer.Option(min=0, help="Requests without.")] = 24,
    nodes: Annotated[int, typer.Option(min=1, help="num_speculative_tokens of the tree.")] = 15,
    batch: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Of each engine.")] = 1,
    output: Annotated[Path, typer.Option(help="The file for the results.")] = Path("build/structured.json"),
) -> None:
    """Decode the requests on each engine, and compare."""
    with one_line_errors():
        asked = list(_mixed(list(islice(_structured(), requests)), list(islice(_free(), free))))
        medusa = {"method": "medusa", "model": str(heads), "medusa_budget": "off"}
        configs = {
            PLAIN: None,
            CHAIN: {**medusa, "medusa_tree": "chain"},
            TREE: {**medusa, "medusa_tree": "dynamic", "num_speculative_tokens": nodes},
        }
        share_environment()

        def ask(name: str) -> list[Answer]:
            engine = Engine(
                str(target),
                "float32",
                configs[name],
                max_model_len=512,
                max_num_seqs=batch,
                kv_cache_memory_bytes=1 << 29,
                skip_tokenizer_init=False,
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            )
            with Contender(name, serve, (engine, threads), {}, output.parent / f"structured-{name}.log") as contender:
                contender.answer()
                answers: list[Answer] = contender.ask(asked)
                return answers

        with ThreadPoolExecutor() as pool:  # At the same time, for nothing is timed.
            asking = {name: pool.submit(ask, name) for name in configs}
            answers = {name: asking[name].result() for name in track(list(asking), "Engines")}
        results = {name: _summary(asked, own, answers[PLAIN]) for name, own in answers.items()}
        details = {"machine": machine(), "versions": installed_versions(), "command": " ".join(sys.argv)}
        write_json(
            output,
            {
                **details,
                "nodes": nodes,
                "results": results,
                "requests": [
                    {**asdict(each), **{name: own[index].text for name, own in answers.items()}}
                    for index, each in enumerate(asked)
                ],
            },
        )
        _print_table(results)


def _structured() -> Iterator[Asked]:
    """Yield requests with a grammar without end, the three kinds in turns."""
    filled = cycle((job, place) for place in PLACES for job in JOBS)
    rules = [(JSON, SCHEMAS), (REGEX, PATTERNS), (CHOICE, CHOICES)]
    for number, pair in enumerate(filled):
        kind, rules_of_kind = rules[number % 3]
        words, rule = list(rules_of_kind.items())[number // 3 % len(rules_of_kind)]
        yield Asked(kind, words.format(*pair), rule)


def _free() -> Iterator[Asked]:
    return cycle(Asked(FREE, question.turns[0]) for question in read_questions(QUESTIONS))


def _mixed(some: Sequence[Asked], others: Sequence[Asked]) -> list[Asked]:
    """Spread the others evenly among some."""
    places = [(index / len(some), each) for index, each in enumerate(some)]
    places += [(index / len(others), each) for index, each in enumerate(others)]
    return [each for _, each in sorted(places, key=lambda placed: placed[0])]


def serve(connection: Connection, engine: Engine, threads: int) -> None:
    """Be an engine: send ``None`` after the start, then the answers to each list of requests."""
    set_num_threads(threads)  # Before weights are loaded: oneDNN packs them for this number of threads.
    llm = engine.open()
    connection.send(None)
    while True:
        connection.send(decode(llm, connection.recv()))


def decode(llm: Any, asked: Sequence[Asked]) -> list[Answer]:
    """Decode all requests greedily, as many at a time as the engine takes."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    tokenizer = llm.get_tokenizer()
    for index, each in enumerate(asked):
        argument = {JSON: "json", REGEX: "regex", CHOICE: "choice"}.get(each.kind)
        params = SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=StructuredOutputsParams(**{argument: each.rule}) if argument else None,
        )
        messages = [{"role": "user", "content": each.words}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, params)
    steps: list[list[tuple[str, int]]] = [[] for _ in asked]
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            [completion] = output.outputs
            steps[int(output.request_id)].append((completion.text, len(completion.token_ids)))
    return [Answer("".join(text for text, _ in own), sum(count for _, count in own[1:]), len(own) - 1) for own in steps]


def _summary(asked: Sequence[Asked], answers: Sequence[Answer], plain: Sequence[Answer]) -> dict[str, Any]:
    """Return by kind: requests, how many are valid and plain decoding's, and tokens per step."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        own = [index for index, each in enumerate(asked) if each.kind == kind]
        steps = sum(answers[index].steps for index in own)
        found[kind] = {
            "requests": len(own),
            "valid": sum(asked[index].holds_for(answers[index].text) for index in own),
            "as plain": sum(answers[index].text == plain[index].text for index in own),
            "tokens per step": sum(answers[index].tokens for index in own) / steps if steps else None,
        }
    return found


def _fits(schema: dict[str, Any], text: str) -> bool:
    from jsonschema import ValidationError, validate

    try:
        validate(json.loads(text), schema)
    except (ValidationError, json.JSONDecodeError):
        return False
    return True


def _print_table(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="tokens per step; requests, valid, as plain decoding")
    table.add_column("")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for name, by_kind in results.items():
        table.add_row(name, *(_cell(by_kind[kind]) for kind in KINDS))
    Console().print(table)


def _cell(found: dict[str, Any]) -> str:
    speed = found["tokens per step"]
    of = f"{found['requests']}, {found['valid']}, {found['as plain']}"
    return f"{speed:.2f}; {of}" if speed is not None else of


if __name__ == "__main__":
    app()
