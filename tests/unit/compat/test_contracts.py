# SPDX-License-Identifier: Apache-2.0
"""What takes the place of vLLM's objects has every attribute that vLLM's V2 runner reads of them."""

from __future__ import annotations

import ast

import pytest

from tests.unit.compat.test_symbols import source
from vllm_medusa.runner.v2.sampling import TreeVerifier
from vllm_medusa.runner.v2.speculator import MedusaSpeculator

READERS = ["v1/worker/gpu/*.py", "v1/worker/gpu/model_states/*.py", "v1/worker/gpu_worker.py"]

OF_DRAFT_MODELS = {
    "dcp_size",
    "draft_attn_layer_names",
    "load_model",
    "model",
    "observe_verification",
    "pcp_manager",
    "prepare_watermarking",
    "set_attn",
    "set_eplb_state",
}
"""Read where the speculator is vLLM's ``DraftModelSpeculator``, or with features that it alone has (a watermark,
expert load balancing of the draft, context parallelism)."""

OF_ADAPTIVE_VERIFICATION = {"draft_token_confidence_probs"}
"""Read where the config enables vLLM's adaptive verification, which Medusa's does not."""


def attributes_read(name: str) -> set[str]:
    """What vLLM reads of variables and attributes of this name."""
    found = set()
    for pattern in READERS:
        for path in source().glob(pattern):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    match node.value:
                        case ast.Name(id=owner) | ast.Attribute(attr=owner):
                            if owner == name:
                                found.add(node.attr)
    return found


@pytest.mark.parametrize(
    ("name", "ours", "unread"),
    [
        ("speculator", MedusaSpeculator, OF_DRAFT_MODELS | OF_ADAPTIVE_VERIFICATION),
        ("rejection_sampler", TreeVerifier, set()),
    ],
)
def test_what_vllm_reads_is_there(name: str, ours: type, unread: set[str]) -> None:
    read = attributes_read(name)
    assert read, f"nobody reads {name}; its name has changed"
    given = set(dir(ours)) | {"enable_adaptive_verification"}  # set by RejectionSampler's constructor
    assert read - given - unread == set()


def test_the_verifier_has_what_the_constructor_of_the_rejection_sampler_sets() -> None:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    assert issubclass(TreeVerifier, RejectionSampler)
