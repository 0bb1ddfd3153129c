# SPDX-License-Identifier: Apache-2.0
"""The options of ``--speculative-config '{"method": "medusa", ...}'``: one typed class, all errors at start-up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SkipValidation, ValidationError
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.platforms import current_platform

from vllm_medusa.acceptance.typical import Typical
from vllm_medusa.checkpoint.config import MODEL_TYPE, MedusaHeadsConfig
from vllm_medusa.checkpoint.entries import paths_of
from vllm_medusa.checkpoint.hub import require_name
from vllm_medusa.checkpoint.served import check_directory
from vllm_medusa.compat.names import ENGINE_METHOD, PROPOSER, WORKERS
from vllm_medusa.engine_checks import check_branching, check_target
from vllm_medusa.messages import shortened, shortened_message
from vllm_medusa.tree.options import NAMED_TREES, Tree, TreeOptions
from vllm_medusa.tree.static import StaticTree

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DEFAULT_NUM_NODES = {"cpu": 7, "cuda": 31}
"""Nodes of a sparse or dynamic tree where ``num_speculative_tokens`` is not given: on a CPU each row costs compute, so
few."""

BUDGETED_NUM_NODES = {"cpu": 15, "cuda": 31}
"""The same where a budget chooses among them, step by step."""

MAX_REASON = 400
"""Characters of another library's error that a refusal repeats."""

VLLM_OPTIONS = ("method", "model", "num_speculative_tokens", "draft_tensor_parallel_size", "revision", "code_revision")
"""vLLM's own speculative options that mean something to Medusa heads; the others are refused."""

AcceptanceName = Literal["exact", "typical"]

MedusaTree = str | list[int] | list[list[int]]

MedusaBudget = str | int


@config
class MedusaSpeculativeConfig(SpeculativeConfig):
    """The speculative configuration of an engine that decodes with Medusa heads.

    ``num_speculative_tokens`` is the most tree nodes per request, the root not counted. Defaults come from the heads'
    checkpoint, then from here.

    Once constructed, ``method`` is ``names.ENGINE_METHOD``, ``model`` names our proposer, ``draft_model_config.model``
    is the heads' checkpoint, and ``medusa_tree`` is resolved: to "dynamic" or to explicit choices.

    Raises:
        ValueError: an option is wrong, does not fit the heads, or asks for what the target cannot do; one line that
            names the option, its value, what is allowed and what to do.

    """

    method: Literal["medusa", "vllm_medusa", "custom_class"] = "medusa"
    model: str | None = None
    """The heads' checkpoint: a directory or a Hugging Face repository."""
    medusa_tree: SkipValidation[MedusaTree | None] = None
    """"sparse", "dynamic", "chain", a Cartesian product such as [4, 2, 2], explicit choices such as
    [[0], [0, 0], [1]], or a JSON file that holds one of these."""
    medusa_top_k: int | None = Field(default=None, ge=1)
    """Most tokens of each head that a sparse or dynamic tree may use."""
    medusa_min_probability: float | None = Field(default=None, ge=0, le=1)
    """The least probability, by the heads' own judgement, of a path that a dynamic tree drafts."""
    medusa_lookup: bool = True
    """Whether what followed a node's path earlier in the request's text is drafted beside what heads say, where the
    heads' config.json says how far that is to be trusted."""
    medusa_budget: SkipValidation[MedusaBudget] = "auto"
    """"auto" verifies the drafted nodes that pay, by what they are expected to give and what rows cost; "off" all of
    them; a number the so many most probable ones of all requests in a step."""
    medusa_acceptance: AcceptanceName = "exact"
    """The rule by which drafted tokens are kept where a request names none; "exact" keeps the target's own output."""
    medusa_posterior_threshold: float = Field(default=0.09, ge=0, le=1)
    """Epsilon of typical acceptance: a token more probable than that is always kept."""
    medusa_posterior_alpha: float = Field(default=0.3, ge=0, le=1)
    """Delta of typical acceptance: a token more probable than delta times exp(-entropy) is kept too."""

    log_stats: bool = False
    """Whether the engine logs statistics; not an option, since ``--disable-log-stats`` says so."""
    draft_model_config: SkipValidation[ModelConfig] = None
    """The heads' checkpoint as vLLM sees it; resolved from ``model``."""

    @classmethod
    def from_options(
        cls, options: dict[str, Any], target_model_config: ModelConfig, target_parallel_config: ParallelConfig
    ) -> MedusaSpeculativeConfig:
        """Make the configuration that ``--speculative-config`` asks for; every error is one line (see the class)."""
        known = {*VLLM_OPTIONS, *(name for name in cls.__dataclass_fields__ if name.startswith("medusa_"))}
        for key in options:
            if key not in known:
                raise ValueError(
                    f"speculative_config: method 'medusa' has no option {key!r}; its options are {sorted(known)}"
                )
        try:
            return cls(
                **options, target_model_config=target_model_config, target_parallel_config=target_parallel_config
            )
        except ValidationError as error:
            raise ValueError(_in_one_line(error)) from None

    def __post_init__(self) -> None:
        if self.draft_model_config is not None:
            return  # vLLM copies configs through their constructor; this one is resolved already.
        if self.model is None:
            raise ValueError(
                "speculative_config: 'model' is missing; method 'medusa' needs the heads' directory or repository"
            )
        heads: str = self.model
        self._check_budget()
        check_target(self.target_model_config, self.target_parallel_config)
        self._check_ranks()
        try:
            require_name(heads)
            if Path(heads).is_dir():
                check_directory(Path(heads))
        except (OSError, ValueError) as error:
            raise ValueError(f"speculative_config: model: {_in_one_line(error)}") from None
        try:
            self.draft_model_config = self._heads_model_config(heads)
        except Exception as error:  # What a stranger's config can make fail in transformers and vLLM has no bound.
            raise ValueError(
                f"speculative_config: model {heads!r} holds no heads that can be read: {_in_one_line(error)}"
            ) from error
        self.draft_parallel_config = SpeculativeConfig.create_draft_parallel_config(
            self.target_parallel_config,
            self.draft_tensor_parallel_size or self.target_parallel_config.tensor_parallel_size,
        )
        self._fit_heads_to_target()
        tree = self._build_tree()
        self.num_speculative_tokens = tree.num_nodes
        self.medusa_tree = tree.choices if isinstance(tree, StaticTree) else "dynamic"
        check_branching(tree, self.target_model_config)
        self.method = ENGINE_METHOD
        self.model = PROPOSER
        self._choose_worker()

    @property
    def heads(self) -> MedusaHeadsConfig:
        """The heads' own configuration."""
        return self.draft_model_config.hf_config

    @property
    def lookup_weights(self) -> list[list[float]] | None:
        """How far what followed a path before is trusted, ``[heads][match lengths]``; None if it is not drafted."""
        return self.heads.medusa_lookup_weights if self.medusa_lookup else None

    @property
    def typical(self) -> Typical:
        """The rule of requests that ask for typical acceptance."""
        return Typical(self.medusa_posterior_threshold, self.medusa_posterior_alpha)

    @property
    def tree(self) -> Tree:
        """The resolved tree."""
        return self._tree_options.build(self.medusa_tree)

    @property
    def judged_tree(self) -> Tree:
        """The resolved tree, and its drafts say how probable their paths are, which a budget asks for."""
        return self._tree_options.judge(self.tree)

    def __repr__(self) -> str:
        tree = self.tree
        shown = f"{tree.num_nodes} nodes, {tree.depth} deep" if isinstance(tree, StaticTree) else "dynamic"
        return (
            f"MedusaSpeculativeConfig(model={self.draft_model_config.model!r}, "
            f"num_heads={self.heads.num_heads}, medusa_tree=<{shown}>)"
        )

    def _build_tree(self) -> Tree:
        if self.medusa_tree is not None:
            return self._tree_options.build(self.medusa_tree)
        stored = self.heads.medusa_tree
        if isinstance(stored, str) and stored not in NAMED_TREES:
            raise ValueError(
                f"medusa_tree: the heads' config.json holds {shortened(stored)}, but only the option may name a file; "
                "give the option, or calibrate the heads again"
            )
        return self._tree_options.build(stored)

    def _heads_model_config(self, heads: str) -> ModelConfig:
        target = self.target_model_config
        return ModelConfig(
            model=heads,
            runner="draft",
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            trust_remote_code=target.trust_remote_code,
            dtype=target.dtype,
            seed=target.seed,
            revision=self.revision,
            code_revision=self.code_revision,
            spec_target_max_model_len=target.max_model_len,
            quantization=self.quantization,
            enforce_eager=target.enforce_eager,
            hf_overrides={"model_type": MODEL_TYPE},
            config_format="hf",
        )

    def _fit_heads_to_target(self) -> None:
        """Fill in what the checkpoint leaves to the target, and refuse what contradicts it."""
        heads, target = self.heads, self.target_model_config
        if not heads.num_heads:
            raise ValueError(
                f"speculative_config: the config.json of {self.draft_model_config.model!r} has no num_heads, so it is "
                "not of heads; give the heads' own repository"
            )
        sizes = {"hidden_size": target.get_hidden_size(), "vocab_size": target.get_vocab_size()}
        for name, size in sizes.items():
            found = getattr(heads, name)
            if found and found != size:
                raise ValueError(
                    f"speculative_config: the heads in {self.draft_model_config.model!r} have {name} {found}, "
                    f"the target has {size}; give heads that were trained for this target"
                )
            setattr(heads, name, size)
        heads.truncated_vocab_size = heads.truncated_vocab_size or heads.vocab_size
        if not 0 < heads.truncated_vocab_size <= heads.vocab_size:
            raise ValueError(
                f"speculative_config: the heads in {self.draft_model_config.model!r} have truncated_vocab_size "
                f"{heads.truncated_vocab_size}, the target has {heads.vocab_size} tokens; correct config.json"
            )

    @property
    def _tree_options(self) -> TreeOptions:
        heads, platform = self.heads, current_platform.device_type
        return TreeOptions(
            num_heads=heads.num_heads,
            vocab_size=heads.truncated_vocab_size or heads.vocab_size,
            accuracies=heads.medusa_accuracies,
            path_accuracies=paths_of(heads.medusa_path_accuracies or {}),
            num_nodes=self.num_speculative_tokens,
            default_num_nodes=(BUDGETED_NUM_NODES if self.medusa_budget == "auto" else DEFAULT_NUM_NODES)[platform],
            top_k=self.medusa_top_k,
            min_probability=self.medusa_min_probability,
            by_level=heads.sequential_path_rank is not None or self.lookup_weights is not None,
        )

    def _check_budget(self) -> None:
        budget = self.medusa_budget
        if budget not in ("auto", "off") and (type(budget) is not int or budget < 1):
            raise ValueError(
                f"speculative_config: medusa_budget is {shortened(budget)}; give 'auto', 'off', or the most nodes that "
                "all requests of a step verify together, an integer of at least 1"
            )

    def _check_ranks(self) -> None:
        tensor_parallel = self.target_parallel_config.tensor_parallel_size
        if self.draft_tensor_parallel_size not in (None, tensor_parallel):
            raise ValueError(
                f"speculative_config: draft_tensor_parallel_size is {self.draft_tensor_parallel_size}, but Medusa "
                f"heads run on the target's ranks; leave it out or give {tensor_parallel}"
            )

    def _choose_worker(self) -> None:
        worker = WORKERS[current_platform.device_type]
        if self.target_parallel_config.worker_cls not in ("auto", worker):
            raise ValueError(
                f"speculative_config: method 'medusa' brings its own worker class, but worker_cls is "
                f"{self.target_parallel_config.worker_cls!r}; leave worker_cls at 'auto'"
            )
        self.target_parallel_config.worker_cls = worker


def medusa_config(vllm_config: VllmConfig) -> MedusaSpeculativeConfig | None:
    """Return the engine's Medusa options, None if it does not decode with Medusa."""
    speculative = vllm_config.speculative_config
    return speculative if isinstance(speculative, MedusaSpeculativeConfig) else None


def _in_one_line(error: Exception) -> str:
    """Return what was wrong, without the frame of several lines that pydantic puts around it."""
    if not isinstance(error, ValidationError):
        return shortened_message(error, MAX_REASON)
    first = error.errors()[0]
    if first["type"] == "value_error":
        return _in_one_line(first["ctx"]["error"])
    must = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    return f"speculative_config: {first['loc'][0]} is {shortened(first['input'])}; {must}"
