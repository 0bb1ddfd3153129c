# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process: API server, engine core and workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output import StructuredOutputManager


def register() -> None:
    """Teach vLLM the method ``medusa``; an engine that does not ask for it is left as it is.

    Registered as ``vllm.general_plugins``, so vLLM runs it once a process; further calls change nothing.
    """
    from vllm_medusa.compat import patches
    from vllm_medusa.compat.version import is_supported

    if patches.engine_args_know_medusa():
        return
    patches.add_method(_make_config)
    if not is_supported():
        return  # An unsupported vLLM is otherwise left alone; asking for the method is refused with its name.

    from vllm_medusa.checkpoint.config import ARCHITECTURE, MODEL_TYPE, MedusaHeadsConfig

    patches.add_heads(MODEL_TYPE, ARCHITECTURE, MedusaHeadsConfig)
    patches.check_requests(_is_medusa, _check_request)
    patches.allow_async_scheduling()
    patches.capture_further_sizes(_further_capture_sizes)
    patches.manage_structured_output(_structured_output_manager)


def _make_config(
    options: dict[str, Any],
    target_model_config: ModelConfig,
    target_parallel_config: ParallelConfig,
    engine_args: EngineArgs,
) -> SpeculativeConfig:
    from vllm_medusa.checkpoint.served import require_weights
    from vllm_medusa.config import MedusaSpeculativeConfig

    config = MedusaSpeculativeConfig.from_options(options, target_model_config, target_parallel_config)
    config.log_stats = not engine_args.disable_log_stats
    if str(engine_args.load_format) != "dummy":
        require_weights(config.draft_model_config.model)
    return config


def _is_medusa(speculative_config: SpeculativeConfig) -> bool:
    from vllm_medusa.config import MedusaSpeculativeConfig

    return isinstance(speculative_config, MedusaSpeculativeConfig)


def _check_request(params: SamplingParams, speculative_config: SpeculativeConfig) -> None:
    from vllm_medusa.config import MedusaSpeculativeConfig
    from vllm_medusa.request import check_request

    assert isinstance(speculative_config, MedusaSpeculativeConfig)
    check_request(params, speculative_config)


def _further_capture_sizes(vllm_config: VllmConfig) -> list[int]:
    from vllm_medusa.capture_sizes import further_capture_sizes
    from vllm_medusa.config import medusa_config

    return further_capture_sizes(vllm_config) if medusa_config(vllm_config) is not None else []


def _structured_output_manager(vllm_config: VllmConfig) -> type[StructuredOutputManager] | None:
    from vllm_medusa.config import medusa_config

    if medusa_config(vllm_config) is None:
        return None
    from vllm_medusa.structured_output.manager import TreeStructuredOutputManager

    return TreeStructuredOutputManager
