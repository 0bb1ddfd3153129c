"""The entry point that vLLM calls in every process: API server, engine core and workers."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

METHOD = "medusa"
"""The value of ``method`` in ``--speculative-config`` that asks for this plugin."""

ENGINE_METHOD: Final = "vllm_medusa"
"""What ``method`` is in such an engine: a name that vLLM knows nothing of, so that it takes it for none of its own."""


def register() -> None:
    """Teach vLLM the method ``medusa``; an engine that does not ask for it is left as it is.

    Registered as ``vllm.general_plugins``, so vLLM runs it once a process; further calls change nothing.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_medusa.compat.version import is_supported

    if getattr(EngineArgs.create_speculative_config, "knows_medusa", False):
        return
    # The one place where --speculative-config becomes a config; other methods reach vLLM's own untouched.
    EngineArgs.create_speculative_config = _with_medusa(EngineArgs.create_speculative_config)
    if not is_supported():
        return  # The method is refused by name; nothing else may reach into a vLLM that is not known here.

    from vllm.config import speculative
    from vllm.config import vllm as engine_config
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.sampling_params import SamplingParams
    from vllm.transformers_utils import config as hf_configs

    from vllm_medusa.checkpoint.config import ARCHITECTURE, MODEL_TYPE, MedusaHeadsConfig

    # A heads' config.json often has no model_type; this set makes vLLM read it by our class all the same.
    hf_configs._CONFIG_REGISTRY[MODEL_TYPE] = MedusaHeadsConfig
    hf_configs._SPECULATIVE_DECODING_CONFIGS.add(MODEL_TYPE)
    ModelRegistry.register_model(ARCHITECTURE, "vllm_medusa.model.heads:MedusaHeads")
    # vLLM refuses min_p and logit_bias under speculation, for its rejection sampler; our draws are the plain sampler's.
    SamplingParams._validate_spec_decode = _unless_medusa(SamplingParams._validate_spec_decode)
    # Asynchronous scheduling is for methods in closed lists; ours, under a name that is nobody else's, joins one.
    engine_config.NgramGPUTypes = Literal[*get_args(speculative.NgramGPUTypes), ENGINE_METHOD]


def _with_medusa(create: Any) -> Any:
    """Wrap ``EngineArgs.create_speculative_config`` so that ``method: medusa`` makes our config."""

    @wraps(create)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        options = {key.replace("-", "_"): value for key, value in (self.speculative_config or {}).items()}
        if METHOD not in (self.spec_method, options.get("method")):
            return create(self, target_model_config, target_parallel_config)

        from vllm_medusa.compat.version import check_vllm_version
        from vllm_medusa.config import MedusaSpeculativeConfig

        check_vllm_version()
        flags = {
            "method": self.spec_method,
            "model": self.spec_model,
            "num_speculative_tokens": self.spec_tokens,
        }
        for key, value in flags.items():
            if value is not None and options.setdefault(key, value) != value:
                raise ValueError(
                    f"--speculative-config['{key}'] is {options[key]!r}, but the flag for it says {value!r}"
                )
        return MedusaSpeculativeConfig.from_options(options, target_model_config, target_parallel_config)

    create_speculative_config.knows_medusa = True  # type: ignore[attr-defined]
    return create_speculative_config


def _unless_medusa(validate: Any) -> Any:
    """Wrap ``SamplingParams._validate_spec_decode`` so that an engine with Medusa takes every sampling parameter."""

    @wraps(validate)
    def validate_spec_decode(self: SamplingParams, speculative_config: SpeculativeConfig | None) -> None:
        from vllm_medusa.config import MedusaSpeculativeConfig

        if not isinstance(speculative_config, MedusaSpeculativeConfig):
            validate(self, speculative_config)

    return validate_spec_decode
