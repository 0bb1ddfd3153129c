# SPDX-License-Identifier: Apache-2.0
"""Heads that are missing, damaged, malicious, or not for the target, given to an engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.unit.engine_configs import HEADS, LLAMA, Models
from tests.unit.refusals.case import Case, Section

DEEP = "[" * 100_000


class Malicious:
    """Runs a command as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was-run",)


def malicious(path: Path) -> None:
    torch.save({"blocks.0.layers.0.weight": Malicious()}, path)


def safetensors() -> bytes:
    return save({"blocks.0.layers.0.weight": torch.zeros(1000)})


def given(what: str, *names: str, make: Callable[[Path], Any]) -> Case:
    """Heads of which ``make`` changes something in their directory."""

    def refused(directory: Path) -> str:
        models = Models(directory)
        heads = models.heads()
        make(Path(heads))
        line = models.refusal({"model": heads})
        assert not (Path.cwd() / "was-run").exists()
        return line

    return Case(what, names, refused)


def config(*names: str, **changes: Any) -> Case:
    shown = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in changes.items())
    return given(
        f"`config.json` with `{shown}`",
        *names,
        make=lambda heads: (heads / "config.json").write_text(json.dumps({**HEADS, **changes})),
    )


def config_file(what: str, content: str, *names: str) -> Case:
    return given(
        f"`config.json` {what}", "config.json", *names, make=lambda heads: (heads / "config.json").write_text(content)
    )


def weights(what: str, file: str, content: bytes | Callable[[Path], Any], *names: str) -> Case:
    def make(heads: Path) -> None:
        (heads / "model.safetensors").unlink()
        if callable(content):
            content(heads / file)
        else:
            (heads / file).write_bytes(content)

    return given(f"`{file}` {what}", file, *names, make=make)


def model(what: str, name: str, *names: str, make: Callable[[Path], Any] = lambda directory: None) -> Case:
    def refused(directory: Path) -> str:
        make(directory)
        return Models(directory).refusal({"model": name.format(directory)})

    return Case(what, names, refused)


HEADS_GIVEN = Section(
    "Heads",
    "The start ends with `ValueError:` and this line, before any weight is loaded.",
    (
        model("a directory that is not there", "{}/missing", "there is no directory", "ORGANISATION/NAME"),
        model("a name that is no repository's", "no heads here!", "there is no directory 'no heads here!'"),
        model("a file", "{}/file", "is a file", make=lambda directory: (directory / "file").touch()),
        model(
            "an empty directory",
            "{}/empty",
            "empty has no config.json",
            make=lambda directory: (directory / "empty").mkdir(),
        ),
        model(
            "the target's directory",
            "{}/target",
            "has no num_heads",
            make=lambda directory: Models(directory).write("target", LLAMA),
        ),
        config("num_heads 0", "from 1 to 64", num_heads=0),
        config("num_heads -1", num_heads=-1),
        config("num_heads 'four'", num_heads="four"),
        config("num_heads True", num_heads=True),
        config("num_heads 1000000000", num_heads=10**9),
        config("medusa_num_heads 2.5", medusa_num_heads=2.5),
        config("num_hidden_layers -1", "from 1 to 64", num_hidden_layers=-1),
        config("num_hidden_layers 1000000000", num_hidden_layers=10**9),
        config("hidden_size 32, the target has 64", hidden_size=32),
        config("hidden_size -1", hidden_size=-1),
        config("vocab_size 95, the target has 96", vocab_size=95),
        config("vocab_size '96'", "an integer", vocab_size="96"),
        config("truncated_vocab_size 97, the target has 96 tokens", truncated_vocab_size=97),
        config("truncated_vocab_size -1", truncated_vocab_size=-1),
        config("logit_scale 0.0", "above 0", logit_scale=0.0),
        config("logit_scale -0.5", "above 0", logit_scale=-0.5),
        config("logit_scale '1.0'", logit_scale="1.0"),
        config("logit_scale True", logit_scale=True),
        config("original_lm_head 'yes'", "true or false", original_lm_head="yes"),
        config("quantization_config", "unquantised", quantization_config={"quant_method": "awq"}),
        config("sequential_path_rank 0", "from 1 to", sequential_path_rank=0),
        config("sequential_path_rank 'parent'", "an integer", sequential_path_rank="parent"),
        config("hydra_num_heads 4", "Hydra heads", "vllm-medusa train --path-rank", hydra_num_heads=4),
        config("medusa_tree: ", "'/etc/passwd'", "only the option may name a file", medusa_tree="/etc/passwd"),
        config("medusa_tree 7", medusa_tree=7),
        config("medusa_accuracies 'high'", "calibrate the heads again", medusa_accuracies="high"),
        config("accuracies", "calibrate the heads again", medusa_accuracies=[[0.5], [0.3, 0.2]]),
        config("accuracies", "calibrate the heads again", medusa_accuracies=[[1.5]]),
        config("accuracies", "calibrate the heads again", medusa_accuracies=[0.5, 0.5]),
        config("accuracies", "calibrate the heads again", medusa_accuracies=[[None]]),
        config("medusa_temperatures 1.5", "for each head", "calibrate the heads again", medusa_temperatures=1.5),
        config("medusa_temperatures", "for each head", medusa_temperatures=[1.5, 1.2]),
        config("medusa_temperatures", "above 0", medusa_temperatures=[1.5, 1.2, 0.0, 1.1]),
        config("medusa_temperatures", "at most 100", medusa_temperatures=[1.5, 1.2, 1e9, 1.1]),
        config("medusa_lookup_weights 0.5", "for each head", medusa_lookup_weights=0.5),
        config("medusa_lookup_weights", "for each head", medusa_lookup_weights=[[0.5]]),
        config("medusa_lookup_weights", "1 to 8 numbers", medusa_lookup_weights=[[0.5], [], [0.5], [0.5]]),
        config("medusa_lookup_weights", "less than 1", medusa_lookup_weights=[[0.5], [1.0], [0.5], [0.5]]),
        config("medusa_path_accuracies", "shares of paths", medusa_path_accuracies=[[0.5]]),
        config("medusa_path_accuracies", "shares of paths", medusa_path_accuracies={"0": 1.5}),
        config("medusa_path_accuracies", "calibrate the heads again", medusa_path_accuracies={"first": 0.5}),
        config("medusa_path_accuracies", "after its parent's", medusa_path_accuracies={"0": 0.5, "1,0": 0.2}),
        config("medusa_path_accuracies", "no larger", medusa_path_accuracies={"0": 0.5, "0,0": 0.6}),
        config_file("that is cut", '{"num_heads": 4, ', "is not JSON"),
        config_file("of 0 bytes", "", "is not JSON"),
        config_file("that holds `[]`", "[]", "holds [], not an object"),
        config_file("that holds `null`", "null", "holds None, not an object"),
        config_file("of lists in lists, 100,000 deep", DEEP, "nested too deeply"),
        given(
            "no weight file",
            "holds no weights of heads",
            "incomplete",
            make=lambda heads: (heads / "model.safetensors").unlink(),
        ),
        weights("of 0 bytes", "model.safetensors", b"", "incomplete or damaged"),
        weights("cut at 1,000 bytes", "model.safetensors", safetensors()[:1000], "incomplete or damaged"),
        weights("that is no safetensors file", "model.safetensors", b"x" * 5000, "incomplete or damaged"),
        weights(
            "that names a file which is not there",
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
            "names model-00001-of-00002.safetensors, which is not there",
            "incomplete",
        ),
        weights("that runs code when it is loaded", "medusa_lm_head.pt", malicious, "asks for", "system", "run code"),
        weights("that runs code when it is loaded", "pytorch_model.bin", malicious, "asks for", "system", "run code"),
        weights("of 0 bytes", "medusa_lm_head.pt", b"", "incomplete, damaged"),
        weights("that is a malformed pickle", "medusa_lm_head.pt", b"\x80\x02u.", "incomplete, damaged"),
    ),
)
