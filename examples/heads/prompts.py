# SPDX-License-Identifier: Apache-2.0
"""Write chat prompts of many kinds, for the model to answer: python examples/heads/prompts.py N SEED OUTPUT TEXTS...

Prompts that a small chat model writes itself are much alike. These ask for what chat models are asked for: stories,
code, maths, facts, advice; and for summaries, translations, corrections and lists of facts of texts that the model has
written: its own prompts in TEXTS, files of ``vllm-medusa distill --self-prompts``. Some are asked as they are. A
quarter has a second turn.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from vllm_medusa.data.prompts import read_prompts
from vllm_medusa.data.record_files import BadLineCounter, BadLines
from vllm_medusa.demo.places import QUESTIONS
from vllm_medusa.demo.questions import read_questions

ABOUT = {
    name: [item.strip() for item in items.split("|")]
    for name, items in yaml.safe_load(Path(__file__).with_name("prompt_words.yaml").read_text()).items()
}
WORDS = 60
"""Most words of a passage."""


def writing(pick: random.Random, _: str) -> str:
    topic, thing, person = pick.choice(ABOUT["topics"]), pick.choice(ABOUT["things"]), pick.choice(ABOUT["people"])
    place = pick.choice(("a harbour", "a kitchen", "a railway station", "a classroom", "a forest", "a busy square"))
    return pick.choice(
        (
            f"Write a short story about {topic}.",
            f"Write a poem about {topic}.",
            f"Write a {pick.choice(('friendly', 'formal', 'short', 'polite'))} e-mail to {person}.",
            f"Write an advertisement for {thing}.",
            f"Describe {place} in {pick.choice(('spring', 'winter', 'the evening', 'the early morning'))}.",
            f"Write the beginning of a novel about {topic}.",
            f"Write a dialogue between {' and '.join(pick.sample(ABOUT['names'], 2))} about {topic}.",
            f"Write a review of {thing}.",
        )
    )


def facts(pick: random.Random, _: str) -> str:
    concept, other = pick.sample(ABOUT["concepts"], 2)
    return pick.choice(
        (
            f"What is {concept}?",
            f"Explain {concept} in simple words.",
            f"Why is {concept} important?",
            f"Give {pick.randint(3, 6)} facts about {concept}.",
            f"What is the difference between {concept} and {other}?",
            f"Write an introduction to an essay about {concept}.",
            f"What are common mistakes that people make about {concept}?",
        )
    )


def advice(pick: random.Random, _: str) -> str:
    what = pick.choice(ABOUT["advice"])
    return pick.choice(
        (
            f"How do I {what}?",
            f"Give me {pick.randint(3, 7)} tips: how can I {what}?",
            f"Make a plan for two weeks, so that I {what}.",
            f"What do I need to {what}?",
        )
    )


def code(pick: random.Random, _: str) -> str:
    what, language = pick.choice(ABOUT["code"]), pick.choice(ABOUT["languages"])
    return pick.choice(
        (
            f"Write a {language} function that {what}.",
            f"Write a {language} function that {what}.",
            f"Show me a {language} program that {what}, and explain it.",
            f"What is wrong with a {language} function that {what} but returns nothing?",
            f"Write an SQL query that {pick.choice(ABOUT['queries'])}.",
            f"How do I write a {pick.choice(('loop', 'class', 'test', 'function with default values'))} in {language}?",
        )
    )


def maths(pick: random.Random, _: str) -> str:
    name, goods = pick.choice(ABOUT["names"]), pick.choice(ABOUT["goods"])
    a, b, c = pick.randint(2, 12), pick.randint(3, 40), pick.randint(2, 90)
    return pick.choice(
        (
            f"{name} has {b} {goods} and buys {a} boxes of {c} more. How many {goods} are there now?",
            f"Solve the equation {a}x + {b} = {a * pick.randint(2, 20) + b} and show every step.",
            f"What is {b} times {c}?",
            f"What is {a * 5} % of {b * 20}?",
            f"A rectangle is {b} metres long and {a} metres wide. What are its area and its perimeter?",
            f"A car drives {a * 60} kilometres in {a} hours. How long does it take for {b * 10} kilometres?",
            f"{a} {goods} cost {a * c} euros. How much do {b} {goods} cost?",
            f"What is the average of {b}, {c}, {a} and {b + c}?",
            f"What is the volume of a cube with an edge of {a} centimetres?",
            f"{name} is {b} years old, {pick.choice(ABOUT['names'])} is {a} years older. How old are they together?",
        )
    )


def passage(pick: random.Random, text: str) -> str:
    short = ". ".join(text.split(". ")[:1])
    return pick.choice(
        (
            f"Summarise in one sentence: {text}",
            f"Summarise: {text}",
            f"Summarise in {pick.randint(2, 3)} sentences: {text}",
            f"What is this text about? {text}",
            f"List the most important points of this text: {text}",
            f"List all names, dates and numbers in this text: {text}",
            f"Translate into {pick.choice(ABOUT['tongues'])}: {short}",
            f"Translate into {pick.choice(ABOUT['tongues'])}: {short}",
            f"Correct the mistakes in this text: {text.lower()}",
            f"Say this in simpler words: {short}",
            f"Go on with this text: {short}",
            f"Write three questions about this text: {text}",
        )
    )


def own(_: random.Random, text: str) -> str:
    return text


KINDS: tuple[Callable[[random.Random, str], str], ...] = (writing, facts, advice, code, maths, passage, passage, own)


def passages(files: list[Path]) -> list[str]:
    """Return the first ``WORDS`` words of each text in files of prompts."""
    read = read_prompts(files, BadLineCounter(BadLines.REFUSE))
    return [" ".join(prompt.first_user_message.content.split()[:WORDS]) for _, prompt in read]


def prompts(count: int, seed: int, texts: list[str], left_out: set[str]) -> Iterator[list[str]]:
    """Yield the user's turns of ``count`` different conversations."""
    pick, known = random.Random(seed), set(left_out)
    while len(known) < count + len(left_out):
        kind = pick.choice(KINDS)
        first = kind(pick, pick.choice(texts))
        if first not in known:
            known.add(first)
            follow_ups = ABOUT["code_follow_ups"] if kind is code else ABOUT["follow_ups"]
            yield [first, pick.choice(follow_ups)] if pick.random() < 0.25 else [first]


def main() -> None:
    count, seed, output, texts = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), list(map(Path, sys.argv[4:]))
    # The benchmarks' own questions are not to be learnt.
    asked = {question.turns[0] for question in read_questions(QUESTIONS)}
    with output.open("w") as file:
        for turns in prompts(count, seed, passages(texts), asked):
            messages = [{"role": "user", "content": turn} for turn in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    read = sum(1 for _ in read_prompts([output], BadLineCounter(BadLines.REFUSE)))
    print(f"{output}: {read} prompts")


if __name__ == "__main__":
    main()
