# SPDX-License-Identifier: Apache-2.0
"""The patches that stay for the life of a process. ``plugin.register`` applies them; importing this module does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, get_args

from vllm_medusa.compat.names import ENGINE_METHOD, HEADS, METHOD
from vllm_medusa.compat.version import check_vllm_version

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output import StructuredOutputManager


def engine_args_know_medusa() -> bool:
    """Whether ``add_method`` has been applied in this process."""
    from vllm.engine.arg_utils import EngineArgs

    return hasattr(EngineArgs.create_speculative_config, "knows_medusa")


def add_method(make: Callable[[dict[str, Any], ModelConfig, ParallelConfig, EngineArgs], SpeculativeConfig]) -> None:
    """Make ``EngineArgs`` understand ``method: medusa``.

    Args:
        make: makes the config from the options of ``--speculative-config``, the target's configs and all other options.

    """
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_speculative_config

    # Reason: vLLM's SpeculativeConfig takes a closed list of methods and has no registry for more. This method is the
    # one place where --speculative-config becomes a config; other methods reach vLLM's own code untouched.
    @wraps(create)
    def create_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> SpeculativeConfig | None:
        options = {key.replace("-", "_"): value for key, value in (self.speculative_config or {}).items()}
        if METHOD not in (self.spec_method, options.get("method")):
            return create(self, target_model_config, target_parallel_config)
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
        return make(options, target_model_config, target_parallel_config, self)

    create_speculative_config.knows_medusa = True  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


def add_heads(model_type: str, architecture: str, config: type[PretrainedConfig]) -> None:
    """Add the heads to vLLM's registries of configs and models.

    Args:
        model_type: the name of their config.
        architecture: the name of their model.
        config: the class of their config.

    """
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config as registry

    # Reason: vLLM has no public call that adds a config class.
    registry._CONFIG_REGISTRY[model_type] = config
    # Reason: published heads often have no model_type in config.json; vLLM reads the ones listed here all the same.
    registry._SPECULATIVE_DECODING_CONFIGS.add(model_type)
    ModelRegistry.register_model(architecture, HEADS)


def check_requests(
    is_medusa: Callable[[SpeculativeConfig], bool], check: Callable[[SamplingParams, SpeculativeConfig], None]
) -> None:
    """Let requests to an engine with Medusa use ``min_p``, ``logit_bias`` and Medusa's own options.

    Args:
        is_medusa: whether an engine with this speculative config decodes with Medusa.
        check: raises ValueError where a request's own options are wrong. The server answers HTTP 400 with its message,
            and offline the ValueError is what ``generate`` raises, before the engine knows of the request.

    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    class WrongOptionError(VLLMValidationError, ValueError):
        """A request's option is wrong."""

    validate = SamplingParams._validate_spec_decode

    # Reason: vLLM refuses min_p and logit_bias under speculation because its rejection sampler cannot apply them.
    # Medusa draws with vLLM's plain sampler, which can. And this is where vLLM's own check of a request at its
    # admission knows the engine's speculative config; Platform.validate_request does not, and belongs to the platform.
    @wraps(validate)
    def validate_spec_decode(self: SamplingParams, speculative_config: SpeculativeConfig | None) -> None:
        if speculative_config is None or not is_medusa(speculative_config):
            return validate(self, speculative_config)
        try:
            return check(self, speculative_config)
        except ValueError as error:
            raise WrongOptionError(str(error)) from None

    SamplingParams._validate_spec_decode = validate_spec_decode


def capture_further_sizes(further_sizes: Callable[[VllmConfig], list[int]]) -> None:
    """Capture CUDA graphs of more sizes than vLLM does, where the user has chosen none.

    Args:
        further_sizes: given an engine's configuration with vLLM's own sizes, what to add: tokens, ascending.

    """
    from vllm.config import VllmConfig

    set_sizes = VllmConfig._set_cudagraph_sizes

    # Reason: what the user has chosen can be told from vLLM's defaults only until this method has filled them in, and
    # the sizes depend on limits of the scheduler that are not known before.
    @wraps(set_sizes)
    def _set_cudagraph_sizes(self: VllmConfig) -> None:
        compilation = self.compilation_config
        chosen = (compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size) != (None, None)
        set_sizes(self)
        if not chosen and (further := further_sizes(self)):
            compilation.cudagraph_capture_sizes += further
            compilation.max_cudagraph_capture_size = further[-1]

    VllmConfig._set_cudagraph_sizes = _set_cudagraph_sizes


def allow_async_scheduling() -> None:
    """Let engines with Medusa use asynchronous scheduling."""
    from vllm.config import vllm as engine_config

    # Reason: vllm.config.vllm turns asynchronous scheduling off for methods that are in none of its closed lists. It
    # reads this list for nothing else, and a method name that is only ours changes nothing for other methods.
    engine_config.NgramGPUTypes = Literal[*get_args(engine_config.NgramGPUTypes), ENGINE_METHOD]


def manage_structured_output(manager: Callable[[VllmConfig], type[StructuredOutputManager] | None]) -> None:
    """Let engines have a manager of structured output of their own.

    Args:
        manager: given an engine's configuration, the subclass that it needs; None for vLLM's own.

    """
    from vllm.v1.structured_output import StructuredOutputManager

    # Reason: vLLM's engine core names this class and has no setting for another. Its module, where the name could be
    # replaced, takes most of a second to import in every worker, which has no use for it. Subclasses of others, with
    # arguments of their own, and copies, which are made without any, are left as they are.
    before = StructuredOutputManager.__new__

    def new(cls: type[StructuredOutputManager], *args: Any, **kwargs: Any) -> StructuredOutputManager:
        if cls is StructuredOutputManager and (args or kwargs):
            cls = manager(*args, **kwargs) or cls
        return object.__new__(cls) if before is object.__new__ else before(cls, *args, **kwargs)

    StructuredOutputManager.__new__ = new
