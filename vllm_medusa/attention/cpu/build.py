# SPDX-License-Identifier: Apache-2.0
"""The fused op's library: built once for a machine, kept in torch's directory of extensions, loaded everywhere."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock

from vllm_medusa.files import replaced_directory
from vllm_medusa.messages import one_line, shortened_message

SOURCE = Path(__file__).with_name("tree_attention.cpp")
NAME = "vllm_medusa_tree_attention"
VECTOR_CAPABILITIES = ("AVX2", "AVX512")
"""Capabilities for which torch's vector headers have code of their own."""


class BuildError(RuntimeError):
    """The library is not there and cannot be built; the message says why, in one line."""


def load_library() -> float:
    """Register ``torch.ops.vllm_medusa.tree_attention``, and build its library first if there is none for this CPU.

    Processes that start together wait for the first one's build.

    Returns:
        How many seconds the build took; 0 where the library was there.

    Raises:
        BuildError: see there.

    """
    start = time.perf_counter()
    try:
        directory = build_directory()
        directory.parent.mkdir(parents=True, exist_ok=True)
        # The system releases this lock when its process ends, however that ends.
        with FileLock(directory.with_suffix(".lock")):
            if directory.exists():
                torch.ops.load_library(directory / f"{NAME}.so")
                return 0.0
            with replaced_directory(directory) as temporary:
                _build(temporary)
    except (ImportError, OSError, RuntimeError) as error:
        raise error if isinstance(error, BuildError) else BuildError(shortened_message(error)) from error
    return time.perf_counter() - start


def build_directory() -> Path:
    """Return where the library for this source, torch and CPU is kept; ``TORCH_EXTENSIONS_DIR`` names its parent."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    parts = (SOURCE.read_text(), torch.__version__, torch.backends.cpu.get_cpu_capability(), cpu_description())
    return Path(root) / f"{NAME}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def cpu_description(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return what the compiler's ``-march=native`` depends on: the CPU's model and capabilities."""
    try:
        first = info.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features")
    return "\n".join(line for line in first if line.split(":")[0].strip() in names)


def _build(directory: Path) -> None:
    """Build the library in a directory and load it."""
    from torch.utils import cpp_extension

    with _scripts_on_path():
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise BuildError(f"there is no C++ compiler {compiler!r}")
        if not cpp_extension.is_ninja_available():
            raise BuildError("there is no ninja, by which torch builds extensions")
        capability = torch.backends.cpu.get_cpu_capability()
        vectors = (
            [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
            if capability in VECTOR_CAPABILITIES
            else []
        )
        try:
            cpp_extension.load(
                NAME,
                [str(SOURCE)],
                extra_cflags=["-O3", "-march=native", "-fopenmp", *vectors],
                extra_ldflags=["-fopenmp"],
                build_directory=str(directory),
                is_python_module=False,
            )
        except RuntimeError as error:
            lines = str(error).splitlines()
            first = next((line for line in lines if "error:" in line), one_line(error)[:200])
            raise BuildError(f"{compiler} fails: {first.strip()}") from error


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Let the environment's own ninja be found, also where the environment is not activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before
