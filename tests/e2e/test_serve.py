# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with Medusa, through the official client: it says what plain decoding says, and survives errors."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from vllm import SamplingParams

from tests.e2e.server import MODEL, Server, command, environment, free_port
from tests.integration.engines import engine
from tests.unit.refusals.heads import malicious

TOKENS = 24
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_p": 0.9, "seed": 1234},
    "penalised": {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    "stopped": {"temperature": 0.0, "stop": ["e", "("]},
}
"""Parameters that the API and ``SamplingParams`` name alike."""

DIALOGUE: list[Any] = [
    {"role": "system", "content": "Python."},
    {"role": "user", "content": "def add(x, y):"},
    {"role": "assistant", "content": "return x + y"},
    {"role": "user", "content": "class Point:"},
]


@dataclass(frozen=True)
class Plain:
    """What plain decoding says, by the name of the request: to each prompt, and to the dialogue."""

    texts: dict[str, list[str]]
    chats: dict[str, str | None]


@pytest.fixture(scope="module")
def prompts(held_out_prompts: list[list[int]]) -> list[list[int]]:
    return held_out_prompts[:8]


@pytest.fixture(scope="module")
def plain(chat_target: Path, prompts: list[list[int]]) -> Plain:
    with engine(chat_target, skip_tokenizer_init=False, max_model_len=256) as llm:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        parameters = {name: SamplingParams(max_tokens=TOKENS, **params) for name, params in REQUESTS.items()}
        return Plain(
            {
                name: [output.outputs[0].text for output in llm.generate(requests, each, use_tqdm=False)]
                for name, each in parameters.items()
            },
            {name: llm.chat(DIALOGUE, each, use_tqdm=False)[0].outputs[0].text for name, each in parameters.items()},
        )


@pytest.fixture(scope="module")
def plain_texts(plain: Plain) -> dict[str, list[str]]:
    return plain.texts


@pytest.mark.parametrize("name", REQUESTS)
def test_a_completion_is_what_plain_decoding_says(
    server: Server, prompts: list[list[int]], plain_texts: dict[str, list[str]], name: str
) -> None:
    for prompt, expected in zip(prompts[:3], plain_texts[name], strict=False):
        completion = server.client.completions.create(model=MODEL, prompt=prompt, max_tokens=TOKENS, **REQUESTS[name])
        assert completion.choices[0].text == expected


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_adds_up_to_what_plain_decoding_says(
    server: Server, prompts: list[list[int]], plain_texts: dict[str, list[str]], name: str
) -> None:
    stream = server.client.completions.create(
        model=MODEL, prompt=prompts[3], max_tokens=TOKENS, stream=True, **REQUESTS[name]
    )
    pieces = [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == plain_texts[name][3]
    assert len(pieces) > 1


@pytest.mark.parametrize("name", REQUESTS)
def test_a_chat_and_its_stream_are_what_plain_decoding_says(server: Server, plain: Plain, name: str) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": DIALOGUE, "max_tokens": TOKENS, **REQUESTS[name]}
    before = server.counters()["drafts"]
    answer = server.client.chat.completions.create(**request)
    assert answer.choices[0].message.content == plain.chats[name]
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in server.client.chat.completions.create(**request, stream=True)
    ]
    assert "".join(pieces) == plain.chats[name]
    assert server.counters()["drafts"] > before


def test_usage_counts_the_prompt_and_every_emitted_token(server: Server, prompts: list[list[int]]) -> None:
    request: dict[str, Any] = {"model": MODEL, "prompt": prompts[4], "max_tokens": TOKENS, "temperature": 0.0}
    request["extra_body"] = {"ignore_eos": True}
    usage = server.client.completions.create(**request).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompts[4]), TOKENS)
    *_, last = server.client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompts[4]), TOKENS)


def test_concurrent_requests_say_what_each_says_alone(
    server: Server, prompts: list[list[int]], plain_texts: dict[str, list[str]]
) -> None:
    def complete(request: tuple[str, int]) -> str:
        name, prompt = request
        completion = server.client.completions.create(
            model=MODEL, prompt=prompts[prompt], max_tokens=TOKENS, **REQUESTS[name]
        )
        return completion.choices[0].text

    requests = [(name, prompt) for prompt in range(len(prompts)) for name in REQUESTS]
    with ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(complete, requests)) == [plain_texts[name][prompt] for name, prompt in requests]


def test_prometheus_counts_drafted_and_accepted_tokens(server: Server, prompts: list[list[int]]) -> None:
    before, own_before = server.counters(), server.counters("medusa:")
    server.client.completions.create(
        model=MODEL, prompt=prompts[0], max_tokens=TOKENS, temperature=0.0, extra_body={"ignore_eos": True}
    )
    drafts, drafted, accepted, by_position = (
        server.counters()[name] - before[name]
        for name in ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
    )
    # The prompt's step emits a token without a draft, every other step one more than it accepts; the last step may
    # accept tokens beyond the limit.
    assert TOKENS - 1 <= drafts + accepted <= TOKENS + 2
    assert accepted > 0
    assert by_position == accepted
    assert 12 * (drafts - 1) < drafted <= 15 * drafts
    own = {name: value - own_before.get(name, 0) for name, value in server.counters("medusa:").items()}
    assert (own["drafted_steps"], own["verified_nodes"], own["accepted_nodes"]) == (drafts, drafted, accepted)
    assert drafts <= own["steps"] <= TOKENS


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"prompt": [5] * 257}, 400),
        ({"prompt": [5], "max_tokens": 500}, 400),
        ({"prompt": [5], "temperature": -1.0}, 400),
        ({"prompt": [5], "top_p": 2.0}, 400),
        ({"prompt": [10**6]}, 400),
        ({"prompt": [5], "extra_body": {"vllm_xargs": {"medusa_acceptance": "eager"}}}, 400),
        ({"prompt": [5], "extra_body": {"vllm_xargs": {"medusa_max_nodes": -1}}}, 400),
        ({"prompt": [5], "extra_body": {"vllm_xargs": {"medusa_nodes": 3}}}, 400),
        ({"prompt": [5], "model": "another"}, 404),
    ],
    ids=[
        "prompt too long",
        "too many tokens",
        "temperature",
        "top_p",
        "unknown token",
        "acceptance",
        "max_nodes",
        "unknown option",
        "unknown model",
    ],
)
def test_a_bad_request_is_refused_and_the_server_goes_on(
    server: Server, prompts: list[list[int]], plain_texts: dict[str, list[str]], request_: dict[str, Any], status: int
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        server.client.completions.create(**{"model": MODEL, "max_tokens": 4, **request_})
    assert refused.value.status_code == status
    for name in request_.get("extra_body", {}).get("vllm_xargs", {}):
        assert name in str(refused.value)
    completion = server.client.completions.create(
        model=MODEL, prompt=prompts[0], max_tokens=TOKENS, **REQUESTS["greedy"]
    )
    assert completion.choices[0].text == plain_texts["greedy"][0]


def test_a_client_that_leaves_a_stream_leaves_the_others_alone(
    server: Server, prompts: list[list[int]], plain_texts: dict[str, list[str]]
) -> None:
    with server.client.completions.create(model=MODEL, prompt=prompts[1], max_tokens=150, stream=True) as stream:
        next(iter(stream))
    completion = server.client.completions.create(
        model=MODEL, prompt=prompts[2], max_tokens=TOKENS, **REQUESTS["greedy"]
    )
    assert completion.choices[0].text == plain_texts["greedy"][2]
    assert httpx.get(f"{server.url}/health").status_code == 200


def failed_start(target: Path, medusa: dict[str, Any], directory: Path) -> str:
    """Return the last line of a server that does not start."""
    done = subprocess.run(
        command(target, medusa, free_port()),
        cwd=directory,
        env=environment(directory),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_a_wrong_option_ends_the_start_with_its_one_line(tiny_target: Path, tiny_heads: Path, tmp_path: Path) -> None:
    medusa = {"method": "medusa", "model": str(tiny_heads), "medusa_tree": [2, 2, 1, 1, 1]}
    assert failed_start(tiny_target, medusa, tmp_path) == (
        "ValueError: medusa_tree: path [0, 0, 0, 0, 0] is 5 deep, but there are 4 heads; give paths of at most 4 ranks"
    )


def test_heads_that_are_a_malicious_pickle_end_the_start_and_nothing_of_them_is_run(
    tiny_target: Path, tiny_heads: Path, tmp_path: Path
) -> None:
    heads = tmp_path / "heads"
    heads.mkdir()
    shutil.copy(tiny_heads / "config.json", heads)
    malicious(heads / "pytorch_model.bin")
    line = failed_start(tiny_target, {"method": "medusa", "model": str(heads)}, tmp_path)
    assert line.startswith("ValueError: speculative_config: model: ")
    assert str(heads / "pytorch_model.bin") in line
    assert not (tmp_path / "was-run").exists()
