"""A real server process, real HTTP: right answers, refusals that say why, never a 5xx for bad input, a clean stop."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from flyweight.runtime import open_model


class Server:
    """A running `flyweight serve`."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.client = httpx.Client(base_url=url, timeout=30)

    def predict(self, body: Any, route: str = "/predict") -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(route, content=content)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(path: Path, *flags: str) -> Iterator[Server]:
    port = free_port()
    words = [sys.executable, "-m", "flyweight", "serve", str(path), "--port", str(port), *flags]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    ready = process.stderr.readline()
    try:
        assert ready == f"ready: http://127.0.0.1:{port} (stop with Ctrl-C)\n"
        yield Server(process, f"http://127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Server]:
    with serving(small, "--max-batch", "4", "--max-body", "20000") as running:
        yield running


def answers_of(path: Path, texts: list[Any]) -> list[Any]:
    with open_model(path) as session:
        return [session.predict([text])[0] for text in texts]


def same(found: Any, wanted: Any) -> bool:
    return [a["label"] for a in found] == [a["label"] for a in wanted] and np.allclose(
        [a["score"] for a in found], [a["score"] for a in wanted], atol=1e-6
    )


def test_one_text(server: Server, small: Path) -> None:
    reply = server.predict({"inputs": "a quiet film"})
    assert reply.status_code == 200
    assert same(reply.json(), answers_of(small, ["a quiet film"])[0])


def test_a_list_of_two_is_one_pair_as_in_tei(server: Server, small: Path) -> None:
    found = server.predict({"inputs": ["a quiet film", "the plot is thin"]}).json()
    assert same(found, answers_of(small, [("a quiet film", "the plot is thin")])[0])


def test_a_list_of_lists_is_a_batch(server: Server, small: Path) -> None:
    found = server.predict({"inputs": [["a quiet film"], ["a quiet film", "the plot is thin"]]}).json()
    wanted = answers_of(small, ["a quiet film", ("a quiet film", "the plot is thin")])
    assert len(found) == 2
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


def test_raw_scores_are_the_logits(server: Server) -> None:
    raw = server.predict({"inputs": "a quiet film", "raw_scores": True}).json()
    shares = server.predict({"inputs": "a quiet film"}).json()
    logits = np.array([a["score"] for a in raw])
    assert [a["label"] for a in raw] == [a["label"] for a in shares]
    assert np.allclose(np.exp(logits) / np.exp(logits).sum(), [a["score"] for a in shares], atol=1e-5)


def test_an_answer_does_not_depend_on_its_neighbours(server: Server) -> None:
    alone = server.predict({"inputs": [["one of the best comedies of the year"]]}).json()[0]
    among = server.predict({"inputs": [["bored"], ["one of the best comedies of the year"], ["film " * 30]]}).json()[1]
    assert alone == among


def test_long_text_is_refused_or_cut(server: Server) -> None:
    long = "film " * 100
    reply = server.predict({"inputs": long})
    assert (reply.status_code, reply.json()["error_type"]) == (413, "Validation")
    assert "at most 64 tokens" in reply.json()["error"]
    assert server.predict({"inputs": long, "truncate": True}).status_code == 200
    assert server.predict({"inputs": long}).status_code == 413  # cutting was for that request alone


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{bad", 422, "Validation"),
        (b"", 422, "Validation"),
        (b"null", 422, "Validation"),
        (b"[]", 422, "Validation"),
        (b'"text"', 422, "Validation"),
        (b"\xff\xfe", 422, "Validation"),
        (b"[" * 15_000, 422, "Validation"),
        (b'{"inputs":"\\ud800"}', 422, "Validation"),
        (b'{"inputs":' + b"[" * 500 + b"]" * 500 + b"}", 422, "Validation"),
        ({}, 422, "Validation"),
        ({"inputs": None}, 422, "Validation"),
        ({"inputs": 5}, 422, "Validation"),
        ({"inputs": {"a": "b"}}, 422, "Validation"),
        ({"inputs": [1, 2]}, 422, "Validation"),
        ({"inputs": ["a", 2]}, 422, "Validation"),
        ({"inputs": ["a", ["b"]]}, 422, "Validation"),
        ({"inputs": [["a"], []]}, 422, "Validation"),
        ({"inputs": [["a", "b", "c"]]}, 422, "Validation"),
        ({"inputs": ["a", "b", "c"]}, 422, "Validation"),
        ({"inputs": "a", "truncate": "yes"}, 422, "Validation"),
        ({"inputs": "a", "raw_scores": 1}, 422, "Validation"),
        ({"inputs": []}, 400, "Empty"),
        ({"inputs": ""}, 400, "Empty"),
        ({"inputs": [["a"], ["  "]]}, 400, "Empty"),
        ({"inputs": [["a"]] * 5}, 413, "Validation"),
        ({"inputs": "x" * 30_000}, 413, "Validation"),
    ],
)
def test_bad_requests_are_told_why(server: Server, body: Any, status: int, kind: str) -> None:
    reply = server.predict(body)
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error", "error_type"}
    assert reply.json()["error_type"] == kind


def test_unusual_texts_are_answered(server: Server) -> None:
    for text in ("\x00", "日本語のテキスト", "🙂" * 10, "\u202e\u0000a", "a\tb\nc"):
        assert server.predict({"inputs": text}).status_code == 200, repr(text)


def test_body_without_a_declared_length_is_bounded(server: Server) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 10_000
            yield b" " * 10_000

    try:
        status = server.client.post("/predict", content=endless()).status_code
    except httpx.TransportError:  # closed while we were still sending
        status = 413
    assert status == 413
    assert sent < 50_000_000
    assert server.predict({"inputs": "still there"}).status_code == 200


def test_compressed_body_is_refused(server: Server) -> None:
    reply = server.client.post("/predict", content=b"x", headers={"content-encoding": "gzip"})
    assert reply.status_code == 415


def test_other_routes(server: Server, small: Path) -> None:
    assert server.client.get("/health").status_code == 200
    info = server.client.get("/info").json()
    assert info["model_type"] == {
        "classifier": {"id2label": {"0": "negative", "1": "positive"}, "label2id": {"negative": 0, "positive": 1}}
    }
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == ("small", 64, 4)
    assert server.client.get("/nowhere").status_code == 404
    assert set(server.client.get("/nowhere").json()) == {"error", "error_type"}
    assert server.client.get("/predict").status_code == 405
    schema = server.client.get("/openapi.json").json()
    assert "/predict" in schema["paths"]
    assert "inputs" in json.dumps(schema["paths"]["/predict"]["post"]["requestBody"])


def test_no_page_loads_anything_from_elsewhere(server: Server) -> None:
    for route in ("/docs", "/openapi.json", "/info", "/redoc"):
        text = server.client.get(route, follow_redirects=True).text
        assert "http://" not in text
        assert "https://" not in text


def test_many_at_once(server: Server, small: Path) -> None:
    texts = [f"a film number {i}" for i in range(40)]
    wanted = answers_of(small, texts)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda text: server.predict({"inputs": text}), texts))
    assert [reply.status_code for reply in found] == [200] * 40
    assert all(same(reply.json(), want) for reply, want in zip(found, wanted, strict=True))


def test_too_many_at_once_are_told_to_come_back(small: Path) -> None:
    with serving(small, "--max-waiting", "1", "--max-batch", "1000") as server:
        busy = {"inputs": [["film " * 50]] * 1000}
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: server.predict(busy), range(4)))
    statuses = sorted(reply.status_code for reply in found)
    assert statuses[0] == 200
    assert statuses[-1] == 429
    refused = next(reply for reply in found if reply.status_code == 429)
    assert refused.json()["error_type"] == "Overloaded"
    assert refused.headers["retry-after"] == "1"


def test_embeddings(vectors: Path) -> None:
    with serving(vectors) as server:
        found = server.predict({"inputs": ["a quiet film", "the plot is thin"]}, "/embed").json()
        single = server.predict({"inputs": "a quiet film"}, "/embed").json()
        assert server.predict({"inputs": "a quiet film"}).status_code == 404
    assert np.allclose(found, answers_of(vectors, ["a quiet film", "the plot is thin"]), atol=1e-6)
    assert np.allclose(single, found[:1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_finishes_what_has_begun(small: Path, number: signal.Signals) -> None:
    with serving(small, "--max-batch", "4000") as server:
        replies: list[httpx.Response] = []
        long = threading.Thread(target=lambda: replies.append(server.predict({"inputs": [["film " * 40]] * 4000})))
        long.start()
        time.sleep(0.3)
        assert not replies, "the request was to be in progress"
        server.process.send_signal(number)
        long.join(60)
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""
        assert server.process.wait(30) == 0
        assert [reply.status_code for reply in replies] == [200]


def test_taken_port_and_port_zero(server: Server, small: Path) -> None:
    taken = server.url.rsplit(":", 1)[1]
    for port, words in ((taken, "to be free"), ("0", "from 1 to 65535"), ("70000", "from 1 to 65535")):
        done = subprocess.run(
            [sys.executable, "-m", "flyweight", "serve", str(small), "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert words in done.stderr


def test_nothing_heavy_is_loaded(small: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from flyweight.runtime import open_model
from flyweight.serve import server
from flyweight.serve.app import Limits, Service, create_app
service = Service(open_model(Path({str(small)!r})), "small", Limits())
create_app(service)
print(len(asyncio.run(service.answer([("a film", None)], False, False))))
service.close()
print(sorted({{"torch", "transformers", "datasets", "pandas", "accelerate", "safetensors"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[:2] == ["1", "[]"]


def test_damaged_artifact_is_not_served(small: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    file = broken / "onnx" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "flyweight", "serve", str(broken), "--port", str(free_port())],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "sha256 differs" in done.stderr
