# SPDX-License-Identifier: Apache-2.0
"""Wrong options of a single request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from tests.unit.engine_configs import Models
from tests.unit.refusals.case import Case, Section, value_error
from vllm_medusa.config import medusa_config
from vllm_medusa.plugin import register


def request(extra: dict[str, Any], *names: str, given: str | None = None, **params: Any) -> Case:
    def refused(directory: Path) -> str:
        register()
        engine = medusa_config(Models(directory).configure({}))
        asked = SamplingParams(extra_args=extra, **params)
        return value_error(lambda: asked._validate_spec_decode(engine))

    return Case(given or f"`{json.dumps(extra)[1:-1]}`", names, refused)


REQUESTS = Section(
    "Options of a single request",
    "In `vllm_xargs` of a request to the server, which answers HTTP 400 with this line, or in "
    "`SamplingParams.extra_args`, where `generate` raises `ValueError`. Other requests go on.",
    (
        request({"medusa_acceptance": "eager"}, "medusa_acceptance is 'eager'", "['exact', 'typical']"),
        request({"medusa_acceptance": 1}, "medusa_acceptance is 1"),
        request({"medusa_acceptance": ["typical"]}, "medusa_acceptance is ['typical']"),
        request({"medusa_max_nodes": -1}, "medusa_max_nodes is -1", "at least 0"),
        request({"medusa_max_nodes": 2.5}, "medusa_max_nodes is 2.5", "integer"),
        request({"medusa_max_nodes": "4"}, "medusa_max_nodes is '4'", "integer"),
        request({"medusa_max_nodes": True}, "medusa_max_nodes is True", "integer"),
        request({"medusa_tree": "chain"}, "'medusa_tree' is no option of a request", "medusa_max_nodes"),
        request(
            {"medusa_acceptance": "typical"},
            "thinking_token_budget is 8",
            "medusa_acceptance 'exact'",
            given='`"medusa_acceptance": "typical"` with `thinking_token_budget` 8',
            thinking_token_budget=8,
        ),
    ),
)
