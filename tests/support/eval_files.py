"""A tiny saved model, question files and a chat endpoint on loopback, to test evaluations."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval"
WORDS = ["What is water?", "yes or no", "Say Paris.", "Is it wet, or is it not?", "maybe"]


def save_model(folder: Path, **changes: Any) -> str:
    """A tiny model with its tokenizer, saved."""
    tiny_model(**changes).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def save_pairs(path: Path, count: int = 9) -> str:
    tiny_pairs(count).to_json(path)
    return str(path)


def save_alpaca(path: Path, count: int = 5) -> str:
    rows = [{"instruction": WORDS[i % 5] * (1 + i // 5), "dataset": "koala"} for i in range(count)]
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def save_arena(path: Path, count: int = 3, **changes: Any) -> str:
    """Arena-Hard v2.0 questions; a change to None leaves that key out."""
    rows = [
        {"uid": f"u{count - i}", "category": "hard_prompt", "prompt": w}
        for i, w in enumerate(WORDS[:count])
    ]
    kept = [{k: v for k, v in (row | changes).items() if v is not None} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return str(path)


def real_rows(name: str) -> Any:
    """A sample file of a benchmark: a list, or the rows of its lines."""
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    text = gzip.decompress(path.read_bytes()).decode()
    return (
        json.loads(text)
        if ".json." in name
        else [json.loads(row) for row in text.split("\n") if row]
    )


def real_file(name: str) -> str:
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return str(path)


Reply = Callable[[dict[str, Any], int], tuple[int, bytes]]


@contextmanager
def chat_endpoint(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose answer to the n-th request is ``reply(body, n)``; its address and requests."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen)
                seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
            status, content = reply(body, number)
            with suppress(ConnectionError):  # a client may have given up
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text: str) -> bytes:
    """A chat completion of ``text``."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
