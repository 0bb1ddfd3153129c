"""Models and heads by their name: a directory, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from vllm_medusa.checkpoint.format import CONFIG_FILE


def local_directory(name: str) -> Path:
    """Return a directory as it is, and anything else fetched from the Hugging Face Hub.

    Raises:
        ValueError: there is no such directory, and no such repository that can be reached.

    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name} is a file; give the directory that holds it and its {CONFIG_FILE}")
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is neither a directory nor a repository that can be fetched ({reason})") from None
