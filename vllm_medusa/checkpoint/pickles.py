# SPDX-License-Identifier: Apache-2.0
"""Read pickles of tensors from strangers: no code is run, and whatever is wrong with one is refused."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

FORBIDDEN = re.compile(r"GLOBAL (?P<name>[\w.]+)")
"""How ``torch`` names what a pickle may not ask for."""


def unpickle(path: Path) -> Any:
    """Return a pickle's content on the CPU.

    Raises:
        ValueError: it holds something else than tensors and plain containers, or is damaged.
        OSError: the file cannot be read.

    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # A malformed pickle can raise anything.
        if asked := FORBIDDEN.search(str(error)):
            raise ValueError(
                f"{path} asks for {asked['name']} to be loaded, which could run code and is never done; "
                "save its state_dict alone, as safetensors"
            ) from None
        raise ValueError(
            f"{path} is not a readable file of tensors, it is incomplete, damaged or of another kind "
            f"({type(error).__name__}); download it again, or save its state_dict alone"
        ) from None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor stores each of its elements, unlike sparse, meta and broadcast ones.

    A small file can hold a broadcast tensor that fills all memory when it is copied.
    """
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()
