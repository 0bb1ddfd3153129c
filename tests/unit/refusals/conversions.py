# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that ``vllm-medusa convert`` refuses."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.unit.published import HIDDEN, VOCAB, write_medusa2, write_original, write_target
from tests.unit.refusals.case import Case, Section, value_error
from tests.unit.refusals.heads import DEEP, malicious, safetensors
from vllm_medusa.checkpoint.conversion import Layout, convert
from vllm_medusa.checkpoint.format import HeadsSpec

State = dict[str, torch.Tensor]


def source(what: str, *names: str, make: Callable[[Path], Any]) -> Case:
    """A checkpoint that ``make`` writes into a directory; nothing is left of its conversion."""

    def refused(directory: Path) -> str:
        (directory / "source").mkdir()
        make(directory / "source")
        line = value_error(lambda: convert(directory / "source", directory / "output", Layout.SERVED))
        assert not list(directory.glob("*output*")) + list(directory.glob(".*"))
        assert not (Path.cwd() / "was-run").exists()
        return line

    return Case(what, names, refused)


def heads_file(what: str, content: Any, *names: str) -> Case:
    def make(directory: Path) -> None:
        path = directory / "medusa_lm_head.pt"
        match content:
            case bytes():
                path.write_bytes(content)
            case _ if callable(content):
                content(path)
            case _:
                torch.save(content, path)

    return source(f"`medusa_lm_head.pt` {what}", "medusa_lm_head.pt", *names, make=make)


def index(what: str, content: Any, *names: str) -> Case:
    def write(directory: Path) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / "model.safetensors.index.json").write_text(text)

    return source(f"`model.safetensors.index.json` {what}", "model.safetensors.index.json", *names, make=write)


def named(file: str) -> dict[str, Any]:
    return {"weight_map": {"0.0.linear.weight": file}}


def served(what: str, change: Callable[[State], State], *names: str, **config: Any) -> Case:
    """Heads in the served layout with changed tensors."""

    def make(directory: Path) -> None:
        spec = HeadsSpec(HIDDEN, VOCAB, 2)
        state = change({name: torch.zeros(shape) for name, shape in spec.shapes().items()})
        (directory / "config.json").write_text(json.dumps(spec.to_config() | config))
        save_file(state, directory / "model.safetensors")

    return source(what, *names, make=make)


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def with_(**tensors: torch.Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def original(what: str, *names: str, change: Callable[[Path], Any]) -> Case:
    def make(directory: Path) -> None:
        write_original(directory)
        change(directory)

    return source(what, *names, make=make)


def linked(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    outside.write_bytes(safetensors())
    (directory / "linked.safetensors").symlink_to(outside)
    (directory / "model.safetensors.index.json").write_text(json.dumps(named("linked.safetensors")))


def whole_model_with_link(directory: Path) -> None:
    write_medusa2(directory)
    (directory.parent / "secret").write_text("secret")
    (directory / "notes.txt").symlink_to(directory.parent / "secret")


def no_target(directory: Path) -> str:
    write_original(directory / "source", with_lm_heads=False)
    return value_error(lambda: convert(directory / "source", directory / "output", Layout.SERVED))


def other_target(directory: Path) -> str:
    write_original(directory / "source")
    write_target(directory / "target", vocab_size=VOCAB + 1)
    return value_error(lambda: convert(directory / "source", directory / "output", Layout.SERVED, directory / "target"))


def broken_target(content: str) -> Callable[[Path], str]:
    def refused(directory: Path) -> str:
        write_original(directory / "source")
        (directory / "target").mkdir()
        (directory / "target" / "config.json").write_text(content)
        return value_error(
            lambda: convert(directory / "source", directory / "output", Layout.SERVED, directory / "target")
        )

    return refused


def output_in_use(directory: Path) -> str:
    write_original(directory / "source")
    return value_error(lambda: convert(directory / "source", directory / "source", Layout.SERVED))


CONVERSIONS = Section(
    "`vllm-medusa convert`",
    "The command prints `Error:` and this line, exits with 2 and writes nothing. `eval` says the same of its heads.",
    (
        source(
            "a directory without weights",
            "no known weight file",
            "it has hydra.pt",
            make=lambda directory: (directory / "hydra.pt").touch(),
        ),
        source(
            "published Hydra heads",
            "hydra_num_heads 4",
            "vllm-medusa train --path-rank",
            make=lambda directory: (directory / "config.json").write_text('{"hydra_num_heads": 4}'),
        ),
        index(
            "that names `../../../etc/passwd`",
            named("../../../etc/passwd"),
            "names '../../../etc/passwd'",
            "in its directory",
        ),
        index("that names `/etc/passwd`", named("/etc/passwd"), "names '/etc/passwd'"),
        index("that names `..`", named(".."), "names '..'"),
        index("that names `part/model.safetensors`", named("part/model.safetensors"), "names 'part/model.safetensors'"),
        index("that names `config.json`", named("config.json"), "names 'config.json'", ".safetensors, .bin, .pt"),
        index("that names a number", {"weight_map": {"0.0.linear.weight": 7}}, "names '7'"),
        source(
            "`model.safetensors.index.json` that names a link to a file elsewhere",
            "source/linked.safetensors is a link that leaves",
            make=linked,
        ),
        index(
            "that names a file which is not there",
            named("a.safetensors"),
            "names a.safetensors, which is not there",
            "incomplete",
        ),
        index("whose `weight_map` is a list", {"weight_map": ["a.safetensors"]}, "it has no weight_map of names"),
        index("without a `weight_map`", {}, "it has no weight_map of names"),
        index("that holds `[]`", [], "it has no weight_map of names"),
        index("of lists in lists, 100,000 deep", DEEP, "nested too deeply"),
        source(
            "a whole model with a file that links to a file elsewhere",
            "notes.txt is a link that leaves",
            make=whole_model_with_link,
        ),
        heads_file("that runs code when it is loaded", malicious, "asks for", "system", "run code"),
        heads_file(
            "that runs code, as a plain pickle",
            lambda path: path.write_bytes(pickle.dumps({"a": Path("/")}, 2)),
            "could run code",
        ),
        heads_file("that is a malformed pickle", b"\x80\x02u.", "(IndexError)"),
        heads_file("that is another malformed pickle", b"\x80\x02h\x05.", "(KeyError)"),
        heads_file("that is no pickle", b"no pickle", "incomplete, damaged or of another kind"),
        heads_file("of 0 bytes", b"", "incomplete, damaged or of another kind"),
        heads_file("that holds a list", [torch.zeros(1)], "holds a list, not a state_dict"),
        heads_file(
            "that holds a state_dict in a dict",
            {"state_dict": {"a": torch.zeros(1)}},
            "holds a dict under 'state_dict'",
        ),
        heads_file("whose names are numbers", {0: torch.zeros(1)}, "under 0, not a tensor under a name"),
        heads_file(
            "with a broadcast tensor of 4 TB",
            {"0.0.linear.weight": torch.zeros(1).expand(10**6, 10**6)},
            "(1000000, 1000000)",
            "does not store",
        ),
        heads_file("with a sparse tensor", {"0.0.linear.weight": torch.zeros(2, 2).to_sparse()}, "does not store"),
        source(
            "`medusa_lm_head.safetensors` of 0 bytes",
            "medusa_lm_head.safetensors",
            "incomplete or damaged",
            make=lambda directory: (directory / "medusa_lm_head.safetensors").touch(),
        ),
        source(
            "`model.safetensors` cut at 1,000 bytes",
            "model.safetensors",
            "incomplete or damaged",
            make=lambda directory: (directory / "model.safetensors").write_bytes(safetensors()[:1000]),
        ),
        original(
            "`config.json` that is cut",
            "source/config.json is not JSON",
            change=lambda directory: (directory / "config.json").write_text("{"),
        ),
        original(
            "`config.json` that holds `[]`",
            "source/config.json holds a list",
            change=lambda directory: (directory / "config.json").write_text("[]"),
        ),
        original(
            "`config.json` of lists in lists, 100,000 deep",
            "source/config.json",
            "nested too deeply",
            change=lambda directory: (directory / "config.json").write_text(DEEP),
        ),
        original(
            '`config.json` with "medusa_num_heads": "3"',
            "medusa_num_heads '3'",
            change=lambda directory: (directory / "config.json").write_text('{"medusa_num_heads": "3"}'),
        ),
        served(
            '`config.json` with "medusa_num_heads": 3 for two heads',
            dict,
            "config.json names 3 heads, but the weights hold 2",
            medusa_num_heads=3,
        ),
        served(
            "`config.json` with `quantization_config`",
            dict,
            "quantization_config",
            "unquantised",
            quantization_config={"bits": 4},
        ),
        served(
            "unknown tensors alone",
            lambda _: {f"hydra.{n}": torch.zeros(1) for n in range(9)},
            "in no known layout",
            "hydra.0, hydra.1, hydra.2 and 6 more",
        ),
        served("a `token_map` beside heads", with_(token_map=torch.zeros(4)), "beside heads it holds token_map"),
        served("a missing bias", without("blocks.1.layers.0.bias"), "the heads' weights lack blocks.1.layers.0.bias"),
        served("a missing LM head", without("lm_heads.1.weight"), "lack lm_heads.1.weight", original_lm_head=False),
        served(
            "no residual layers", lambda state: {"lm_heads.0.weight": state["lm_heads.0.weight"]}, "no residual layers"
        ),
        served(
            "an LM head of another number of layers",
            lambda state: state | {"2.3.weight": torch.zeros(1)},
            "2.3.weight is named",
            "after 3 layers, but there are 1",
        ),
        served(
            "heads in two layouts",
            lambda state: state | {"0.0.linear.bias": torch.zeros(HIDDEN)},
            "the same heads in two layouts: 0.0.linear.bias",
        ),
        served(
            "an LM head of another shape",
            with_(lm_heads__1__weight=torch.zeros(9, 9)),
            "lm_heads.1.weight must have shape (16, 8)",
        ),
        served(
            "an int8 LM head",
            with_(lm_heads__1__weight=torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)),
            "lm_heads.1.weight is of dtype int8",
            "unquantised",
        ),
        served(
            "an fp8 residual layer",
            with_(blocks__0__layers__0__weight=torch.zeros(HIDDEN, HIDDEN).to(torch.float8_e4m3fn)),
            "blocks.0.layers.0.weight is of dtype float8_e4m3fn",
        ),
        Case("heads without LM heads, and no `--target`", ("no LM heads of their own", "--target"), no_target),
        Case("`--target` of another vocabulary", ("the heads have vocab_size 16, the target", "has 17"), other_target),
        Case("`--target` whose `config.json` is cut", ("target holds no model",), broken_target("{")),
        Case("`--target` whose `config.json` holds `[]`", ("target holds no model",), broken_target("[]")),
        Case("`--target` whose `config.json` is nested 100,000 deep", ("target holds no model",), broken_target(DEEP)),
        Case("an output that is in use", ("source exists and is not empty",), output_in_use),
    ),
)
