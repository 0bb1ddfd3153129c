# SPDX-License-Identifier: Apache-2.0
"""A training run, from the settings to heads that vLLM serves."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from vllm_medusa.data.dataset import label_all, load_blocks
from vllm_medusa.training.cached_blocks import cached_blocks
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.draft_vocabulary import DraftVocabulary, count_tokens
from vllm_medusa.training.hidden import lm_head_of
from vllm_medusa.training.initial import InitialHeads
from vllm_medusa.training.load import load_target, load_tokenizer
from vllm_medusa.training.medusa1 import Medusa1
from vllm_medusa.training.medusa2 import Medusa2, Medusa2Trainer
from vllm_medusa.training.results import (
    Coverage,
    HeldOutBefore,
    TrainResult,
    check_same_run,
    write_heads_of,
    write_run,
    write_target_of,
)
from vllm_medusa.training.trainer import Blocks, MedusaTrainer, training_arguments

CHECKPOINTS_DIRECTORY = "checkpoints"


def run_training(
    config: TrainConfig,
    command: Sequence[str],
    show_progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult | None:
    """Train heads, or heads and target, and write them; every process of a distributed run must call this.

    Args:
        config: the settings.
        command: the user's command, kept beside the heads.
        show_progress: whether to show progress.
        callbacks: further callbacks of ``transformers.Trainer``.

    Returns:
        The result on the main process, which writes the files; None on the others.

    Raises:
        ValueError: settings, data or target are wrong; the message is one line and says what to do.
        OSError: a file cannot be read or written.

    """
    checkpoints = config.output / CHECKPOINTS_DIRECTORY
    arguments = training_arguments(config, checkpoints, **_trainer_options(config))
    if config.resume == "auto" and _last_checkpoint(checkpoints) is not None:
        check_same_run(config)
    training, held_out = load_data(config, load_tokenizer(config))
    task = prepare(config, training, held_out, arguments.device, show_progress)
    model, trainer_class = task.model, Medusa2Trainer if config.method == "medusa2" else MedusaTrainer
    trainer = trainer_class(model, config, arguments, task.training, task.held_out, show_progress, callbacks)
    if trainer.is_world_process_zero():
        if config.resume == "never":
            shutil.rmtree(checkpoints)
        write_run(config, command)
    trainer.accelerator.wait_for_everyone()
    after = trainer.fit(_last_checkpoint(checkpoints))

    state = trainer.trained_state()
    result = None
    if trainer.is_world_process_zero():
        write_heads_of(config, model, state, after, task.dtype)
        result = TrainResult(
            output=config.output,
            steps=trainer.state.global_step,
            after=after,
            before=HeldOutBefore.of(trainer.state.log_history) if isinstance(model, Medusa2) else None,
            target=write_target_of(config, model, state) if isinstance(model, Medusa2) else None,
            coverage=task.coverage,
        )
        result.write()
    trainer.accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained, and on what.

    Attributes:
        model: the heads and, unless its outputs are kept on disk, their target.
        training: the blocks to train on.
        held_out: the blocks to evaluate on.
        dtype: the dtype of the target's LM head, in which heads are written.
        coverage: how much of the text can be drafted; None if all tokens can.

    """

    model: Medusa1 | Medusa2
    training: Blocks
    held_out: Blocks
    dtype: torch.dtype
    coverage: Coverage | None


def prepare(
    config: TrainConfig,
    training: datasets.Dataset,
    held_out: datasets.Dataset,
    device: torch.device,
    show_progress: bool,
) -> Task:
    """Load the target, make its heads and, if the settings say so, keep its outputs; raises as ``run_training``."""
    target = load_target(config)
    set_seed(config.seed)  # LoRA's weights are initialised at random.
    weight = lm_head_of(target).weight
    initial = None if config.initial_heads is None else InitialHeads.read(config.initial_heads)
    vocabulary, coverage = choose_vocabulary(config, initial, training, held_out, len(weight))
    kind = Medusa2 if config.method == "medusa2" else Medusa1
    model = kind(target, config, vocabulary, config.heads_loss)
    if initial is not None:
        initial.copy_to(model.heads)
    if config.labels == "all":
        training = label_all(training).with_format("torch")
    if isinstance(model, Medusa2) or not config.cache_hidden:
        return Task(model, training, held_out, weight.dtype, coverage)
    cached = cached_blocks(config, target, device, (training, held_out), show_progress)
    model.release_target()
    return Task(model, *cached, weight.dtype, coverage)


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the blocks to train on and the blocks to evaluate on.

    Raises:
        ValueError: a line is bad, or there are too few blocks.

    """
    blocks = load_blocks(config.data, tokenizer, config.block_length, config.bad_lines).with_format("torch")
    if config.held_out:
        held_out = load_blocks(config.held_out, tokenizer, config.block_length, config.bad_lines).with_format("torch")
        _check_size(blocks, 1, "data", config)
        _check_size(held_out, 1, "held_out", config)
        return blocks, held_out
    _check_size(blocks, 2, "data", config)
    test_size = max(1, round(config.held_out_share * len(blocks)))
    split = blocks.train_test_split(test_size=test_size, seed=config.seed)
    return split["train"], split["test"]


def choose_vocabulary(
    config: TrainConfig,
    initial: InitialHeads | None,
    training: datasets.Dataset,
    held_out: datasets.Dataset,
    vocab_size: int,
) -> tuple[DraftVocabulary | None, Coverage | None]:
    """Return the draft vocabulary and how much of the text it covers; None if all tokens can be drafted.

    Raises:
        ValueError: another vocabulary is asked for than that of heads whose LM heads have learnt theirs.

    """
    if initial is not None and config.draft_vocab is not None and not initial.spec.shared_lm_head:
        raise ValueError(
            f"draft_vocab must be left out with initial_heads {str(initial.directory)!r}, got {config.draft_vocab}: "
            "they have LM heads of their own, which have learnt the tokens that they have"
        )
    vocabulary = None if initial is None or config.draft_vocab is not None else initial.vocabulary
    if vocabulary is None and config.draft_vocab is None:
        return None, None
    counts = [count_tokens((each["labels"] for each in part.iter(1024)), vocab_size) for part in (training, held_out)]
    if vocabulary is None:
        assert config.draft_vocab is not None
        vocabulary = DraftVocabulary.most_frequent(config.draft_vocab, counts[0])
    return vocabulary, Coverage(len(vocabulary.tokens), *map(vocabulary.coverage, counts))


def _check_size(blocks: datasets.Dataset, least: int, name: str, config: TrainConfig) -> None:
    if len(blocks) < least:
        raise ValueError(
            f"{name} gives {len(blocks)} blocks of {config.block_length} tokens (block_length), but {least} are "
            "needed; give more text or a smaller block_length"
        )


def _trainer_options(config: TrainConfig) -> dict[str, Any]:
    return {
        "max_steps": config.steps or -1,
        "num_train_epochs": config.epochs,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "bf16": config.mixed_precision == "bf16",
        "fp16": config.mixed_precision == "fp16",
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_limit,
        "eval_strategy": "no" if config.eval_steps is None else "steps",
        "eval_steps": config.eval_steps,
        "eval_on_start": config.method == "medusa2",
        "logging_steps": config.logging_steps,
        "report_to": list(config.report_to) or "none",
        # In the first stage the loss does not depend on the target's trained parameters.
        "ddp_find_unused_parameters": config.heads_only_steps > 0,
    }


def _last_checkpoint(checkpoints: Path) -> Path | None:
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    return None if last is None else Path(last)
