# SPDX-License-Identifier: Apache-2.0
"""Wrong values of ``--speculative-config``, and engines that Medusa cannot serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.unit.engine_configs import LLAMA, Models
from tests.unit.refusals.case import Case, Section, value_error
from vllm_medusa.config import medusa_config
from vllm_medusa.engine_checks import check_engine

MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 96,
}
MROPE = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
RSWA = {**LLAMA, "rswa_window": 128}


def option(options: dict[str, Any], *names: str, given: str | None = None) -> Case:
    return Case(
        given or f"`{json.dumps(options)[1:-1]}`", names, lambda directory: Models(directory).refusal(dict(options))
    )


def tree_file(content: str, *names: str, given: str | None = None) -> Case:
    def refused(directory: Path) -> str:
        path = directory / "tree.json"
        path.write_text(content)
        return Models(directory).refusal({"medusa_tree": str(path)})

    return Case(f"`medusa_tree` is a file that holds {given or f'`{content!r}`'}", ("medusa_tree: '", *names), refused)


def engine(given: str, *names: str, options: dict[str, Any] | None = None, **changes: Any) -> Case:
    return Case(given, names, lambda directory: Models(directory).refusal(dict(options or {}), **changes))


def checked(given: str, *names: str, **changes: Any) -> Case:
    """An engine whose configuration stands before it is refused as a whole."""

    def refused(directory: Path) -> str:
        config = Models(directory).configure({"medusa_tree": [2]}, **changes)
        options = medusa_config(config)
        assert options is not None
        return value_error(lambda: check_engine(config, options.tree))

    return Case(given, names, refused)


def no_model(directory: Path) -> str:
    return value_error(lambda: Models(directory).start({"method": "medusa"}))


OPTIONS = Section(
    "Options of `--speculative-config`",
    "The start ends with `ValueError:` and this line. A tree in the heads' `config.json` gets the same lines.",
    (
        Case("no `model`", ("'model' is missing",), no_model),
        option({"medusa_trees": "chain"}, "no option 'medusa_trees'; its options are ['code_revision', "),
        option({"prompt_lookup_max": 3}, "no option 'prompt_lookup_max'"),
        option({"rejection_sample_method": "block"}, "no option 'rejection_sample_method'"),
        option({"quantization": "fp8"}, "no option 'quantization'"),
        option({"draft_model_config": {}}, "no option 'draft_model_config'"),
        option({"draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size is 2", "target's ranks"),
        option({"num_speculative_tokens": 0}, "num_speculative_tokens is 0", "greater than 0"),
        option({"num_speculative_tokens": -4}, "num_speculative_tokens is -4", "greater than 0"),
        option({"num_speculative_tokens": "many"}, "num_speculative_tokens is 'many'", "integer"),
        option({"num_speculative_tokens": 1000}, "give trees of 1 to 155 nodes, not 1000"),
        option({"num_speculative_tokens": 10**12}, "1000000000000"),
        option({"medusa_top_k": 0}, "medusa_top_k is 0", "greater than or equal to 1"),
        option({"medusa_lookup": "often"}, "medusa_lookup is 'often'", "valid boolean"),
        option({"medusa_top_k": -1}, "medusa_top_k is -1", "greater than or equal to 1"),
        option({"medusa_min_probability": 1.5}, "medusa_min_probability is 1.5", "less than or equal to 1"),
        option({"medusa_min_probability": -0.1}, "medusa_min_probability is -0.1"),
        option({"medusa_min_probability": 0.2}, 'medusa_min_probability: 0.2 is for medusa_tree "dynamic"'),
        option(
            {"medusa_tree": "dynamic", "num_speculative_tokens": 9, "medusa_top_k": 1},
            "trees of at most 4 nodes, not 9",
        ),
        option(
            {"medusa_tree": "dynamic", "num_speculative_tokens": 900, "medusa_top_k": 96},
            "would weigh more than 16384 paths for 900 nodes",
        ),
        option({"medusa_tree": "dynamic", "num_speculative_tokens": 1025}, "1025 nodes", "give a tree of at most"),
        option({"medusa_budget": "some"}, "medusa_budget is 'some'", "give 'auto', 'off', or"),
        option({"medusa_budget": 0}, "medusa_budget is 0", "an integer of at least 1"),
        option({"medusa_budget": 2.5}, "medusa_budget is 2.5"),
        option({"medusa_budget": True}, "medusa_budget is True"),
        option({"medusa_budget": None}, "medusa_budget is None"),
        option({"medusa_acceptance": "eager"}, "medusa_acceptance is 'eager'", "'exact'", "'typical'"),
        option({"medusa_posterior_threshold": 1.5}, "medusa_posterior_threshold is 1.5", "less than or equal to 1"),
        option({"medusa_posterior_alpha": -0.3}, "medusa_posterior_alpha is -0.3", "greater than or equal to 0"),
        option({"medusa_tree": 3}, "medusa_tree: 3 is none of"),
        option({"medusa_tree": {"depth": 3}}, "medusa_tree: {'depth': 3} is none of"),
        option({"medusa_tree": "sparce"}, "medusa_tree: 'sparce' is none of", '"sparse", "dynamic", "chain"'),
        option({"medusa_tree": []}, "medusa_tree: the list of paths is empty"),
        option({"medusa_tree": [2, 0]}, "medusa_tree: [2, 0] is not a Cartesian product"),
        option({"medusa_tree": [-2]}, "medusa_tree: [-2] is not a Cartesian product"),
        option({"medusa_tree": [2.5]}, "medusa_tree: [2.5] is not a Cartesian product"),
        option({"medusa_tree": ["2"]}, "medusa_tree: ['2'] is not a Cartesian product"),
        option({"medusa_tree": [True]}, "medusa_tree: [True] is not a Cartesian product"),
        option({"medusa_tree": [2, [0]]}, "medusa_tree: [2, [0]] is not a Cartesian product"),
        option({"medusa_tree": [[0], 2]}, "medusa_tree: 2 is not a path"),
        option({"medusa_tree": [[]]}, "medusa_tree: [] is not a path"),
        option({"medusa_tree": [[0], [0]]}, "medusa_tree: path [0] is listed twice"),
        option({"medusa_tree": [[0], [1, 0]]}, "medusa_tree: path [1, 0] has no parent"),
        option({"medusa_tree": [[0], [0, -1]]}, "medusa_tree: [0, -1] is not a path"),
        option({"medusa_tree": [1, 1, 1, 1, 1]}, "path [0, 0, 0, 0, 0] is 5 deep, but there are 4 heads"),
        option({"medusa_tree": [[0], [96]]}, "medusa_tree: rank 96 is asked for, but the heads know 96 tokens"),
        option({"medusa_tree": [[0] * 5000]}, "has no parent", given='`"medusa_tree"`: a path of 5,000 ranks'),
        tree_file("{", "Expecting property name"),
        tree_file("3", "holds 3"),
        tree_file("null", "holds None"),
        tree_file('{"medusa_tree": 3}', "holds 3"),
        tree_file('"tree.json"', "holds 'tree.json'"),
        tree_file("\x00", "Expecting value"),
        tree_file("[" * 100_000, "nested too deeply", given="lists in lists, 100,000 deep"),
    ),
)

ENGINES = Section(
    "Engines and targets",
    "The start ends with `ValueError:` and this line, before any weight is loaded.",
    (
        engine("`--pipeline-parallel-size 2`", "does not support pipeline parallelism", pipeline_parallel_size=2),
        engine(
            "`--decode-context-parallel-size 2`",
            "does not support context parallelism",
            tensor_parallel_size=2,
            decode_context_parallel_size=2,
        ),
        engine("`--runner pooling`", "does not support pooling models", runner="pooling"),
        engine("`--enable-trace-replay`", "does not support trace replay", enable_trace_replay=True),
        engine("`--worker-cls package.Worker`", "worker_cls is 'package.Worker'", worker_cls="package.Worker"),
        engine("a target without attention", "attention-free models", target=MAMBA, max_model_len=128),
        engine(
            "a branching tree for a target with multi-dimensional rotary positions",
            "multi-dimensional rotary positions",
            'give medusa_tree "chain"',
            target=MROPE,
            options={"medusa_tree": [2]},
        ),
        engine(
            "a branching tree for a target with `rswa_window`",
            "a window that leaves the prompt visible (rswa_window)",
            'give medusa_tree "chain"',
            target=RSWA,
            options={"medusa_tree": [2]},
        ),
        checked("`--enable-lora`", "does not support LoRA adapters (enable_lora)", enable_lora=True),
        checked(
            "`--kv-cache-dtype fp8` with a branching tree, on a CPU",
            "quantised KV cache (kv_cache_dtype 'fp8",
            'give medusa_tree "chain"',
            kv_cache_dtype="fp8",
        ),
    ),
)
