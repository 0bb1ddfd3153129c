# SPDX-License-Identifier: Apache-2.0
"""Models and heads by name: a directory, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from vllm_medusa.checkpoint.format import CONFIG_FILE


def local_directory(name: str) -> Path:
    """Return the directory ``name``; if there is none, download the repository ``name``.

    Raises:
        ValueError: ``name`` is neither a directory nor a repository that can be downloaded.

    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name} is a file; give the directory with this file and its {CONFIG_FILE}")
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is neither a directory nor a repository that can be downloaded ({reason})") from None
