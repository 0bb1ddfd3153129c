# SPDX-License-Identifier: Apache-2.0
"""A target that vLLM runs in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_medusa.data.chat import encode_prompt
from vllm_medusa.data.records import TurnTokens
from vllm_medusa.distillation.dialogue import Answer, Dialogue, OnAnswer, PromptStyle
from vllm_medusa.distillation.raw_text import OnText, TextRequest, WrittenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import RequestOutput, SamplingParams


class OfflineTarget:
    """A ``Target`` that answers with ``vllm.LLM(model, **engine_args)``."""

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, engine_args: Mapping[str, Any]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._engine_args = engine_args

    @property
    def settings(self) -> dict[str, Any]:
        return {"engine": "offline", "engine_args": dict(self._engine_args)}

    @contextmanager
    def running(self) -> Iterator[None]:
        # Requests that share a step affect each other's rounding. Without another process, timing does not group them.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM
        from vllm.platforms import current_platform

        options = dict(self._engine_args)
        if current_platform.is_cpu():
            # vLLM 0.32 takes back the draw of a partial prefill by its generator's offset, which a CPU's has not.
            options.setdefault("enable_chunked_prefill", False)
        try:
            self._llm = LLM(model=self._model, **options)
        except TypeError as error:
            raise ValueError(f"engine_args: {error}") from error
        try:
            yield
        finally:
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm

    def converse(self, dialogues: Sequence[Dialogue], on_answer: OnAnswer) -> None:
        self._llm.reset_prefix_cache()  # Cached prompts would change which requests share a step.
        for number, dialogue in enumerate(dialogues):
            self._submit(number, dialogue)
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                number, answer = int(output.request_id), _answer(output)
                dialogues[number].add_answer(answer)
                on_answer(dialogues[number], answer)
                self._submit(number, dialogues[number])

    def write(self, requests: Sequence[TextRequest], on_text: OnText) -> list[WrittenText]:
        self._llm.reset_prefix_cache()
        for number, request in enumerate(requests):
            self._add(number, list(request.prompt_ids), self._text_params(request))
        texts: dict[int, WrittenText] = {}
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                text = _written(output)
                texts[int(output.request_id)] = text
                on_text(text)
        return [texts[number] for number in range(len(requests))]

    def _submit(self, number: int, dialogue: Dialogue) -> None:
        from vllm.exceptions import VLLMClientError

        if not dialogue.is_open:
            return
        try:
            self._add(number, self._encode(dialogue), self._params(dialogue))
        except (ValueError, VLLMClientError) as error:
            dialogue.refuse(" ".join(str(error).split()))

    def _add(self, number: int, prompt_ids: list[int], params: SamplingParams) -> None:
        [prompt] = self._llm.renderer.render_cmpl([{"prompt_token_ids": prompt_ids}])
        self._llm.llm_engine.add_request(str(number), prompt, params)

    def _encode(self, dialogue: Dialogue) -> list[int]:
        if dialogue.style is PromptStyle.CHAT:
            return encode_prompt(self._tokenizer, dialogue.messages)
        return self._tokenizer(dialogue.messages[-1].content)["input_ids"]

    def _params(self, dialogue: Dialogue) -> SamplingParams:
        return self._overridden(asdict(dialogue.turn_sampling))

    def _text_params(self, request: TextRequest) -> SamplingParams:
        options = asdict(request)
        del options["prompt_ids"]
        return self._overridden(options | {"skip_special_tokens": False})

    def _overridden(self, options: dict[str, Any]) -> SamplingParams:
        """Return the model's generation config, overridden by ``options``, as ``vllm serve`` does."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = self._llm.model_config.get_diff_sampling_param() | options
        return SamplingParams.from_optional(**options, output_kind=RequestOutputKind.FINAL_ONLY)


def _answer(output: RequestOutput) -> Answer:
    completion = output.outputs[0]
    prompt_ids, completion_ids = tuple(output.prompt_token_ids or ()), tuple(completion.token_ids)
    tokens = TurnTokens(prompt_ids=prompt_ids, completion_ids=completion_ids) if completion_ids else None
    return Answer(completion.text, len(completion_ids), tokens)


def _written(output: RequestOutput) -> WrittenText:
    completion = output.outputs[0]
    return WrittenText(completion.text, len(completion.token_ids), completion.finish_reason == "stop")
