"""An endpoint that answers as a language model's would, on this machine."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Answers with `answer(request)`: a text, or (status, headers, body), or None to hang up; keeps count."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any], key: str = "") -> None:
        self.answer, self.key = answer, key
        self.bodies: list[bytes] = []
        self.paid: Counter[bytes] = Counter()
        self.keys: set[str] = set()
        self.now, self.most, self.lock, self.released = 0, 0, threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with server.lock:
                    server.now += 1
                    server.most = max(server.most, server.now)
                    server.bodies.append(body)
                    server.keys.add(self.headers.get("Authorization", ""))
                try:
                    given = server.reply(self.path, self.headers.get("Authorization", ""), body)
                finally:
                    with server.lock:
                        server.now -= 1
                if given is None:
                    self.close_connection = True
                    return
                status, headers, content = given
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # whoever hung up

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def reply(self, path: str, key: str, body: bytes) -> Any:
        if path != "/v1/chat/completions":
            return 404, {}, b"no such place"
        if self.key and key != f"Bearer {self.key}":
            return 401, {}, f"wrong key {key}".encode()
        said = self.answer(json.loads(body))
        if not isinstance(said, str):
            return said
        with self.lock:
            self.paid[body] += 1
        message = {
            "choices": [{"message": {"content": said}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(message).encode()


def n_texts(request: dict[str, Any]) -> int:
    """Texts in a question that asks for a list; 0 where an explanation is asked for."""
    if "JSON object" in request["messages"][0]["content"]:
        return 0
    return len(request["messages"][1]["content"].splitlines()) - 1


def always(value: int, explanation: str = "numbers") -> Callable[[dict[str, Any]], str]:
    """Answers that are the same, whatever is asked: an explanation, or `value` for every text."""

    def answer(request: dict[str, Any]) -> str:
        n = n_texts(request)
        return json.dumps([value] * n) if n else json.dumps({"explanation": explanation})

    return answer
