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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import RequestOutput, SamplingParams


class OfflineTarget:
    """Answers with vLLM.

    Args:
        model: a directory or a repository.
        tokenizer: the model's.
        engine_args: further options of ``vllm.LLM``, which checks them.

    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, engine_args: Mapping[str, Any]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._engine_args = engine_args

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Target``."""
        return {"engine": "offline", "engine_args": dict(self._engine_args)}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Load the model (see ``Target``).

        Raises:
            ValueError: vLLM refuses an option.

        """
        # With the scheduler in this process, which requests share a step, and so their rounding, has nothing to do with
        # how fast processes are.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        try:
            self._llm = LLM(model=self._model, **self._engine_args)
        except TypeError as error:
            raise ValueError(f"engine_args: {error}") from error
        try:
            yield
        finally:
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm

    def converse(self, dialogues: Sequence[Dialogue], on_answer: OnAnswer) -> None:
        """Answer all dialogues at once, each turn as soon as the one before it is over (see ``Target``).

        What is said does not depend on what was said in former calls.
        """
        self._llm.reset_prefix_cache()  # A prompt found there would change which requests share a step.
        for number, dialogue in enumerate(dialogues):
            self._submit(number, dialogue)
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                number, answer = int(output.request_id), _answer(output)
                dialogues[number].add_answer(answer)
                on_answer(dialogues[number], answer)
                self._submit(number, dialogues[number])

    def _submit(self, number: int, dialogue: Dialogue) -> None:
        from vllm.exceptions import VLLMClientError

        if not dialogue.is_open:
            return
        try:
            [prompt] = self._llm.renderer.render_cmpl([{"prompt_token_ids": self._encode(dialogue)}])
            self._llm.llm_engine.add_request(str(number), prompt, self._params(dialogue))
        except (ValueError, VLLMClientError) as error:
            dialogue.refuse(" ".join(str(error).split()))

    def _encode(self, dialogue: Dialogue) -> list[int]:
        if dialogue.style is PromptStyle.CHAT:
            return encode_prompt(self._tokenizer, dialogue.messages)
        return self._tokenizer(dialogue.messages[-1].content)["input_ids"]

    def _params(self, dialogue: Dialogue) -> SamplingParams:
        """Return what ``vllm serve`` would sample by: the model's own generation config, and what was asked for."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = self._llm.model_config.get_diff_sampling_param() | asdict(dialogue.turn_sampling)
        return SamplingParams.from_optional(**options, output_kind=RequestOutputKind.FINAL_ONLY)


def _answer(output: RequestOutput) -> Answer:
    completion = output.outputs[0]
    prompt_ids, completion_ids = tuple(output.prompt_token_ids or ()), tuple(completion.token_ids)
    tokens = TurnTokens(prompt_ids=prompt_ids, completion_ids=completion_ids) if completion_ids else None
    return Answer(completion.text, len(completion_ids), tokens)
