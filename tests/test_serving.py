import asyncio
import base64
import http.client
import json
import os
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

import numpy as np
import psutil
import pytest
from sentence_transformers import SentenceTransformer

pytest.importorskip("fastapi", reason="needs the server's libraries: pip install hagmoe_hf[serve]")
import uvicorn

from hagmoe_hf import serving
from hagmoe_hf.serving import RefusedError, Settings, create_app, parse

ROOT = Path(__file__).parents[1]
BOUND = 1e-5
SETTINGS = Settings("unused", "tiny", dimensions=(8,), request_bytes=2000, texts=4, characters=500, waiting=64)


@pytest.fixture(scope="module")
def model(tiny_parent) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_parent), device="cpu")


class Slow:
    """A model that takes its time, and fails on demand: the first number of a vector is the length of its text."""

    max_seq_length = 8

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.batches = seconds, []

    def get_embedding_dimension(self) -> int:
        return 16

    def encode(self, texts, **options) -> np.ndarray:
        self.batches.append(list(texts))
        time.sleep(self.seconds)
        if "fail" in texts:
            raise RuntimeError("out of memory")
        return np.array([[len(text)] + [0.0] * 15 for text in texts], dtype=np.float32)

    def tokenizer(self, texts, **options) -> dict:
        return {"input_ids": [[0] * len(text.split()) for text in texts]}


@contextmanager
def running(model, settings: Settings = SETTINGS) -> Iterator[tuple[int, uvicorn.Server]]:
    """The application in a thread of this process, on a free port."""
    server = uvicorn.Server(uvicorn.Config(create_app(model, settings), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int, method: str, path: str, body: bytes | dict | None = None) -> tuple[int, dict | str, dict]:
    """Status, body and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request(method, path, json.dumps(body).encode() if isinstance(body, dict) else body)
        response = connection.getresponse()
        text = response.read().decode()
        is_json = "json" in response.headers["content-type"]
        return response.status, json.loads(text) if is_json else text, dict(response.headers)
    finally:
        connection.close()


def embed(port: int, **body) -> tuple[int, dict | str, dict]:
    return ask(port, "POST", "/v1/embeddings", body)


def test_every_caller_gets_the_vectors_of_its_own_texts(model, corpus):
    """Requests share batches: a mix-up would hand one user another's vector, with status 200."""
    requests = [[text[:500] for text in corpus[start : start + 1 + start % 4]] for start in range(0, 120, 2)]
    expected = [model.encode(texts) for texts in requests]
    with running(model) as (port, _), ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda texts: embed(port, input=texts if len(texts) > 1 else texts[0]), requests))
    for (status, body, _), vectors in zip(answers, expected, strict=True):
        assert status == 200
        assert [entry["index"] for entry in body["data"]] == list(range(len(vectors)))
        got = np.array([entry["embedding"] for entry in body["data"]], dtype=np.float32)
        assert np.abs(got - vectors).max() <= BOUND


def test_the_answer_is_what_openais_client_reads(model):
    text = "free the disk space"
    vector = model.encode(text)
    with running(model) as (port, _):
        status, body, _ = embed(port, input=text, model="tiny", encoding_format="base64", user="me")
        short = embed(port, input=text, dimensions=8)[1]["data"][0]["embedding"]
        models = ask(port, "GET", "/v1/models")[1]
    assert status == 200
    assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", "tiny", "embedding")
    tokens = len(model.tokenizer(text)["input_ids"])
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    got = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), dtype="<f4")
    assert np.abs(got - vector).max() <= BOUND
    assert np.abs(np.array(short) - vector[:8] / np.linalg.norm(vector[:8])).max() <= BOUND
    assert [entry["id"] for entry in models["data"]] == ["tiny"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "The body is no JSON"),
        (b'{"input": "\xff"}', 400, "The body is no JSON"),
        (b'{"input": "\\ud800"}', 400, "The body is no JSON"),
        (b"[]", 422, "the body: "),
        (b"{}", 422, "input: Field required"),
        (b'{"input": []}', 422, "is empty; allowed: at least one text"),
        (b'{"input": ["a", ""]}', 422, "is empty; allowed: at least one text"),
        (b'{"input": [1, 2]}', 422, "no arrays of tokens"),
        (b'{"input": [[1, 2]]}', 422, "no arrays of tokens"),
        (b'{"input": null}', 422, "allowed: a string or a list of strings"),
        (b'{"input": "a", "encoding_format": "hex"}', 422, "encoding_format: Input should be 'float' or 'base64'"),
        (b'{"input": "a", "dimensions": 7}', 422, "dimensions=7 is not possible; allowed: [8, 32]"),
        (b'{"input": "a", "dimension": 8}', 422, "dimension: Extra inputs are not permitted"),
        (b'{"input": "a", "model": "gpt"}', 404, "model='gpt' is not served; allowed: 'tiny'"),
        (b'{"input": ["a", "a", "a", "a", "a"]}', 413, "input has 5 texts; allowed: 4"),
        (b'{"input": "' + b"a" * 501 + b'"}', 413, "input has a text of 501 characters; allowed: 500"),
    ],
)
def test_bad_input_is_refused_with_what_would_be_allowed(body, status, message):
    """A 500 for a typo wakes the operator instead of telling the caller."""
    with pytest.raises(RefusedError) as refusal:
        parse(body, SETTINGS, 32)
    assert refusal.value.status == status
    assert message in str(refusal.value)
    assert json.loads(refusal.value.response().body)["error"]["message"] == str(refusal.value)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2/embeddings", 404), ("GET", "/v1/embeddings", 405)])
def test_an_unknown_path_is_answered_in_the_shape_of_every_error(method, path, status):
    with running(Slow()) as (port, _):
        got, body, _ = ask(port, method, path)
    assert got == status
    assert path in body["error"]["message"]
    assert "allowed: /health, /metrics, /ready, /v1/embeddings, /v1/models" in body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "code"}


def test_a_body_over_the_limit_is_refused_while_it_comes_in():
    """With and without Content-Length: nobody may fill the memory."""
    with running(Slow()) as (port, _):
        assert ask(port, "POST", "/v1/embeddings", b'{"input": "' + b"a" * 20_000 + b'"}')[0] == 413
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/embeddings", iter([b'{"input": "', *[b"a" * 1000] * 3, b'"}']), encode_chunked=True)
        assert connection.getresponse().status in (411, 413)
        connection.close()
        assert embed(port, input="a")[0] == 200


def test_a_full_queue_refuses_and_loses_nothing():
    """Accepting more than can be done in time makes everyone wait for answers that nobody reads any more."""
    slow = Slow(seconds=0.2)
    with running(slow, Settings("", "tiny", waiting=4)) as (port, _), ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda size: embed(port, input="a" * size), range(1, 13)))
        assert ask(port, "GET", "/ready")[0] == 200
        assert embed(port, input=["a"] * 5)[0] == 413, "more than the queue can ever hold"
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 4
    for size, (status, body, headers) in enumerate(answers, start=1):
        if status == 200:
            assert body["data"][0]["embedding"][0] == size
        else:
            assert headers["retry-after"] == "1"
            assert "allowed: 4" in body["error"]["message"]


def test_what_waits_is_encoded_together():
    """One text at a time would waste most of the machine."""
    slow = Slow(seconds=0.2)
    with running(slow) as (port, _), ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda size: embed(port, input="a" * size), range(1, 13)))
    assert sum(map(len, slow.batches)) == 12
    assert len(slow.batches) <= 6


def test_a_failing_model_answers_500_and_the_server_goes_on():
    with running(Slow()) as (port, _):
        status, body, _ = embed(port, input="fail")
        assert status == 500
        assert "out of memory" in body["error"]["message"]
        assert embed(port, input="abc")[1]["data"][0]["embedding"][0] == 3


def test_a_shutdown_answers_what_was_accepted():
    """A deployment replaces servers all day; none of its users may notice."""
    with running(Slow(seconds=0.5)) as (port, server), ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(embed, port, input="a" * size) for size in range(1, 5)]
        while not ask(port, "GET", "/metrics")[1].count("hagmoe_waiting_texts 4.0"):
            time.sleep(0.01)
        server.should_exit = True
        assert [future.result()[0] for future in futures] == [200] * 4
    with pytest.raises(OSError, match="refused"):
        ask(port, "GET", "/health")


def test_a_client_that_goes_away_costs_no_one_else(model):
    with running(Slow(seconds=0.2)) as (port, _):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b'POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"input": "a')
        assert embed(port, input="abc")[0] == 200


def test_health_readiness_and_metrics_tell_what_happens():
    with running(Slow()) as (port, _):
        assert ask(port, "GET", "/health")[:2] == (200, {"status": "ok"})
        assert ask(port, "GET", "/ready")[:2] == (200, {"status": "ready"})
        embed(port, input=["a b", "c"])
        embed(port, input=[])
        shown = ask(port, "GET", "/metrics")[1]
    for line in (
        'hagmoe_requests_total{status="200"} 1.0',
        'hagmoe_requests_total{status="422"} 1.0',
        "hagmoe_texts_total 2.0",
        "hagmoe_tokens_total 3.0",
        "hagmoe_waiting_texts 0.0",
    ):
        assert line in shown


def test_a_cancelled_request_leaves_the_queue():
    """Its texts must neither be encoded nor hold their place for ever."""

    async def story() -> tuple[int, list]:
        slow = Slow(seconds=0.1)
        batcher = serving.Batcher(slow, 2, 8)
        runner = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.encode(["a"]))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(batcher.encode(["bb", "bb"]))
        await asyncio.sleep(0.02)
        second.cancel()
        third = await batcher.encode(["ccc"])
        await first
        runner.cancel()
        assert third[0][0][0] == 3
        return batcher.waiting, slow.batches

    waiting, batches = asyncio.run(story())
    assert waiting == 0
    assert "bb" not in [text for batch in batches for text in batch]


def test_a_failed_request_gives_its_places_back():
    """Texts nobody waits for any more would be encoded beside those of the next request, uncounted."""

    async def story() -> tuple[int, list]:
        slow = Slow(seconds=0.02)
        batcher = serving.Batcher(slow, 2, 8)
        runner = asyncio.create_task(batcher.run())
        with pytest.raises(serving.RefusedError):
            await batcher.encode(["fail", "x", *["yy"] * 6])
        await batcher.encode(["ccc"])
        runner.cancel()
        return batcher.waiting, slow.batches

    waiting, batches = asyncio.run(story())
    assert waiting == 0
    assert sum(batch.count("yy") for batch in batches) <= 2, "more than the batch that was next already"


@pytest.mark.parametrize("limit", ["batch_texts", "request_bytes", "texts", "characters", "waiting"])
def test_a_limit_that_lets_nothing_through_is_refused(limit):
    with pytest.raises(ValueError, match=f"{limit}=0 is not possible; allowed: at least 1"):
        Settings("", "tiny", **{limit: 0})


def test_dimensions_that_the_model_does_not_have_are_refused_at_the_start():
    with pytest.raises(ValueError, match=r"dimensions=\[17\] is not possible; allowed: 1 to 16"):
        create_app(Slow(), Settings("", "tiny", dimensions=(17,)))
    with pytest.raises(ValueError, match="is no SentenceTransformer"):
        serving.serve(Settings(str(ROOT), "x"))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_requests_end_in_an_error(tiny_parent, model, corpus):
    """Out of memory is a kill -9: whoever waited must hear of it, and the next must be served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from hagmoe_hf.cli.main import main; main()"
    command = [sys.executable, "-c", program, "serve", str(tiny_parent), "--port", str(port), "--workers", "2"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    texts = [text[:500] for text in corpus[:300]]
    expected = model.encode(texts)

    def workers() -> list[int]:
        children = psutil.Process(process.pid).children()
        alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return [child.pid for child in alive if "spawn_main" in " ".join(child.cmdline())]

    def send(place: int) -> str:
        if place == 150:
            os.kill(workers()[0], signal.SIGKILL)
        try:
            status, body, _ = embed(port, input=texts[place])
        except (OSError, http.client.HTTPException):
            return "broken"
        assert status == 200
        assert np.abs(np.array(body["data"][0]["embedding"]) - expected[place]).max() <= BOUND
        return "right"

    try:
        while process.poll() is None:
            try:
                ask(port, "GET", "/ready")
                break
            except OSError:
                time.sleep(0.2)
        with ThreadPoolExecutor(16) as pool:
            outcomes = list(pool.map(send, range(300)))
        assert outcomes.count("right") > 200
        while len(workers()) < 2:
            time.sleep(0.2)
        assert {send(place) for place in range(40)} == {"right"}
        process.terminate()
        assert process.wait() == 0
    finally:
        process.kill()
