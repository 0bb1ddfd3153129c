# SPDX-License-Identifier: Apache-2.0
"""The options of a single request: ``SamplingParams.extra_args`` offline, ``vllm_xargs`` of a request to the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from vllm_medusa.config import AcceptanceName, MedusaSpeculativeConfig
from vllm_medusa.messages import shortened

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

PREFIX = "medusa_"
"""What the names of our options begin with. All other extra arguments are somebody else's."""

OPTIONS = ("medusa_acceptance", "medusa_max_nodes")

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy to vLLM's samplers (``_SAMPLING_EPS``)."""


@dataclass(frozen=True)
class RequestOptions:
    """What one request asks of Medusa.

    Attributes:
        is_typical: whether drafted tokens are kept by ``MedusaSpeculativeConfig.typical`` too, not by draws alone.
        max_nodes: most nodes of its drafts, of which the first ones stay; 0 decodes plainly, None is no limit.

    """

    is_typical: bool
    max_nodes: int | None

    @classmethod
    def of(cls, params: SamplingParams | None, engine: MedusaSpeculativeConfig) -> RequestOptions:
        """Read a request's options; what it does not say is the engine's.

        A greedy request is exact: with one token left to its distribution every rule is.

        Raises:
            ValueError: an option is unknown or has a wrong value, or the request asks for what typical acceptance
                cannot do; one line that names the option, its value and what is allowed.

        """
        if params is None:
            return cls(engine.medusa_acceptance == "typical", None)
        given: Mapping[str, Any] = params.extra_args or {}
        for name in given:
            if name.startswith(PREFIX) and name not in OPTIONS:
                raise ValueError(
                    f"{shortened(name)} is no option of a request; the options of method 'medusa' are {list(OPTIONS)}"
                )
        acceptance = given.get("medusa_acceptance", engine.medusa_acceptance)
        if acceptance not in get_args(AcceptanceName):
            raise ValueError(
                f"medusa_acceptance is {shortened(acceptance)}; give one of {list(get_args(AcceptanceName))}"
            )
        max_nodes = given.get("medusa_max_nodes")
        if max_nodes is not None and (type(max_nodes) is not int or max_nodes < 0):
            raise ValueError(
                f"medusa_max_nodes is {shortened(max_nodes)}; give an integer of at least 0, where 0 is no speculation"
            )
        if params.temperature < GREEDY_BELOW:
            acceptance = "exact"
        if acceptance == "typical" and params.thinking_token_budget is not None:
            raise ValueError(
                f"thinking_token_budget is {params.thinking_token_budget}, which medusa_acceptance 'typical' cannot "
                "count; leave it out, or give medusa_acceptance 'exact'"
            )
        return cls(acceptance == "typical", max_nodes)


def check_request(params: SamplingParams, engine: MedusaSpeculativeConfig) -> None:
    """Refuse a request's wrong options at its admission (see ``RequestOptions.of``)."""
    RequestOptions.of(params, engine)
