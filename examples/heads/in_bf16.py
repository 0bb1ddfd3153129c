# SPDX-License-Identifier: Apache-2.0
"""Round heads to bf16, in which their target's weights are: python examples/heads/in_bf16.py HEADS OUTPUT."""

import json
import sys
from pathlib import Path

import torch

from vllm_medusa.checkpoint.format import CONFIG_FILE, read_spec, read_state, write_heads

heads, output = map(Path, sys.argv[1:])
spec = read_spec(heads)
state = {name: each.bfloat16() if each.is_floating_point() else each for name, each in read_state(heads).items()}
entries = json.loads((heads / CONFIG_FILE).read_text())
write_heads(output, spec, state, {key: entries[key] for key in entries.keys() - spec.to_config().keys()})
print(output, sum(tensor.numel() for tensor in state.values() if tensor.dtype is torch.bfloat16), "numbers in bf16")
