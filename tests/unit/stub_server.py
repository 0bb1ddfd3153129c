# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server with prepared answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Script:
    """The status and body that the server returns for each path, and the bodies that it received."""

    answers: dict[str, tuple[int, Any]]
    requests: list[dict[str, Any]] = field(default_factory=list)


MODELS = {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "me"}]}
CHAT = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "tiny",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}
TEXT = CHAT | {"object": "text_completion", "choices": [{"index": 0, "text": " A", "finish_reason": "stop"}]}


@contextmanager
def serve(**answers: tuple[int, Any]) -> Iterator[tuple[str, Script]]:
    """Run a server; underscores in the names stand for slashes."""
    script = Script({f"/v1/{path.replace('_', '/')}": answer for path, answer in answers.items()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            script.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer()

        def _answer(self) -> None:
            status, body = script.answers[self.path]
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
