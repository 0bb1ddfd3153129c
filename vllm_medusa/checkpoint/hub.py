# SPDX-License-Identifier: Apache-2.0
"""Models and heads by name: a directory, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from vllm_medusa.checkpoint.format import CONFIG_FILE
from vllm_medusa.messages import shortened, shortened_message


def local_directory(name: str) -> Path:
    """Return the directory ``name``; if there is none, download the repository ``name``.

    Raises:
        ValueError: ``name`` is neither a directory nor a repository that can be downloaded.

    """
    require_name(name)
    path = Path(name)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name))
    except Exception as error:  # Network, permissions, a repository of another kind: each has its own errors.
        raise ValueError(
            f"{name} is neither a directory nor a repository that can be downloaded ({shortened_message(error)})"
        ) from None


def require_name(name: str) -> None:
    """Raise ``ValueError`` if ``name`` is no directory and cannot be a repository's name."""
    path = Path(name)
    if path.is_dir():
        return
    if path.exists():
        raise ValueError(f"{name} is a file; give the directory with this file and its {CONFIG_FILE}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"there is no directory {shortened(name, 200)}, and a repository's name is of the form ORGANISATION/NAME"
        ) from None
