# SPDX-License-Identifier: Apache-2.0
"""The files that a training run writes: heads, target, metrics and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from vllm_medusa.checkpoint.conversion import HEADS_DIRECTORY, TARGET_DIRECTORY
from vllm_medusa.checkpoint.format import TOKEN_MAP, write_heads
from vllm_medusa.checkpoint.published import BASE_MODEL
from vllm_medusa.files import replaced_directory, replaced_file, write_json
from vllm_medusa.training.accuracy import HeldOut
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.load import load_plain_target, load_tokenizer
from vllm_medusa.training.medusa1 import Medusa1
from vllm_medusa.training.medusa2 import Medusa2
from vllm_medusa.training.trainer import is_of_heads
from vllm_medusa.training.write_errors import explain_write_errors
from vllm_medusa.versions import installed_versions

RUN_FILE = "run.yaml"
RESULTS_FILE = "results.json"

FREE_TO_CHANGE = {
    "save_steps",
    "save_limit",
    "resume",
    "eval_steps",
    "logging_steps",
    "report_to",
    "chunk_size",
    "cache_directory",
}
"""Settings that may change when a run is resumed, since the result does not depend on them."""


@dataclass(frozen=True)
class Coverage:
    """How much of the text a draft vocabulary covers.

    Attributes:
        size: tokens of the draft vocabulary.
        training: the share of the training text's labels that it holds.
        held_out: that of the held-out text's.

    """

    size: int
    training: float
    held_out: float


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        output: the run's directory.
        steps: optimizer steps.
        after: the final metrics on held-out data.
        before: the metrics before the first step; None with Medusa-1.
        target: the trained target's directory; None with Medusa-1.
        coverage: how much of the text can be drafted; None if all tokens can.

    """

    output: Path
    steps: int
    after: HeldOut
    before: HeldOutBefore | None = None
    target: Path | None = None
    coverage: Coverage | None = None

    @property
    def heads(self) -> Path:
        return self.output / HEADS_DIRECTORY

    def write(self) -> None:
        """Write the metrics as JSON."""
        metrics = {"steps": self.steps, "before": self.before and asdict(self.before), "after": asdict(self.after)}
        write_json(self.output / RESULTS_FILE, metrics | {"coverage": self.coverage and asdict(self.coverage)})

    def print(self, console: Console) -> None:
        """Print the metrics as a table."""
        table = Table(title=f"Held-out data after {self.steps} steps")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        for head, top1 in enumerate(self.after.top1, start=1):
            before = "" if self.before is None else f"{self.before.top1[head - 1]:.3f}"
            table.add_row(f"head {head}, top-1 accuracy", before, f"{top1:.3f}")
        if self.before is not None and self.after.lm_loss is not None:
            table.add_row("target, LM loss", f"{self.before.lm_loss:.4f}", f"{self.after.lm_loss:.4f}")
        console.print(table)
        if self.coverage is not None:
            console.print(
                f"The {self.coverage.size} tokens that can be drafted are {self.coverage.training:.2%} of the training "
                f"text's, {self.coverage.held_out:.2%} of the held-out text's."
            )


@dataclass(frozen=True)
class HeldOutBefore:
    """The metrics on held-out data before the first step (see ``HeldOut``)."""

    top1: list[float]
    lm_loss: float

    @classmethod
    def of(cls, log: Sequence[Mapping[str, Any]]) -> HeldOutBefore:
        """Read them from a trainer's log, which a resumed run continues."""
        first = next(entry for entry in log if "eval_lm_loss" in entry)
        heads = sum(name.endswith("_top1") for name in first)
        return cls([first[f"eval_head{head}_top1"] for head in range(1, heads + 1)], first["eval_lm_loss"])


def write_run(config: TrainConfig, command: Sequence[str]) -> None:
    """Write all settings, the command and the package versions."""
    content = {
        "command": list(command),
        "versions": installed_versions(),
        "config": config.model_dump(mode="json"),
    }
    with replaced_file(config.output / RUN_FILE) as stream:
        yaml.safe_dump(content, stream, sort_keys=False)


def check_same_run(config: TrainConfig) -> None:
    """Raise ``ValueError`` if a setting differs from the earlier run in the output directory."""
    file = config.output / RUN_FILE
    if not file.exists():
        return
    earlier = yaml.safe_load(file.read_text())["config"]
    for name, value in config.model_dump(mode="json").items():
        if name not in FREE_TO_CHANGE and earlier.get(name, value) != value:
            raise ValueError(
                f"{config.output} holds the checkpoints of a run with {name} {earlier[name]!r}, got {value!r}; "
                "give that value, another output, or resume 'never', which starts anew"
            )


def write_heads_of(
    config: TrainConfig,
    model: Medusa1 | Medusa2,
    state: Mapping[str, torch.Tensor],
    held_out: HeldOut,
    dtype: torch.dtype,
) -> None:
    """Write the heads as vLLM reads them, in the target's dtype; their config holds target and accuracies."""
    trained = {name.removeprefix("heads."): tensor for name, tensor in state.items() if is_of_heads(name)}
    if config.shared_lm_head:
        trained["lm_heads.0.weight"] = model.heads.get_parameter("lm_heads.0.weight")
    trained = {name: tensor.to(dtype) for name, tensor in trained.items()}
    if model.heads.token_map is not None:
        trained[TOKEN_MAP] = model.heads.token_map
    target = config.target if isinstance(model, Medusa1) else str(config.output / TARGET_DIRECTORY)
    with explain_write_errors(config.output):
        write_heads(
            config.output / HEADS_DIRECTORY,
            model.heads.spec,
            trained,
            {BASE_MODEL: target, "medusa_accuracies": held_out.accuracies},
        )


def write_target_of(config: TrainConfig, model: Medusa2, state: Mapping[str, torch.Tensor]) -> Path:
    """Write the trained target and its tokenizer as an ordinary model and return its directory.

    The original target is loaded again without quantization and gets the trained weights. So a target that was
    quantized or sharded in training is written like any other.
    """
    trained = {
        name.removeprefix("target."): tensor.to("cpu") for name, tensor in state.items() if not is_of_heads(name)
    }
    target = load_plain_target(config)
    if isinstance(model.target, PeftModel):
        with TemporaryDirectory() as directory:
            model.target.save_pretrained(directory, state_dict=trained)
            target = PeftModel.from_pretrained(target, directory).merge_and_unload()
    else:
        target.load_state_dict(trained, strict=False)
    with explain_write_errors(config.output), replaced_directory(config.output / TARGET_DIRECTORY) as temporary:
        target.save_pretrained(temporary)
        load_tokenizer(config).save_pretrained(temporary)
    return config.output / TARGET_DIRECTORY
