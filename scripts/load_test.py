"""The HTTP server under load, and with a worker killed; every vector is checked against plain `encode`.

    python scripts/load_test.py docs/results/load-test.json --requests 10000 --clients 32

Upcycles all-MiniLM-L6-v2, moves its experts apart (freshly upcycled ones are equal), and starts `hagmoe serve` on loopback.
Clients send real texts of 1 to 400 words, alone and in lists, as floats and base64; one request in ten is broken in one of
the ways of `BROKEN`, and has one right answer. Then a burst at a server with a short queue, which must refuse with 429 what
it cannot hold; then two workers, of which one is killed with kill -9, twice: each request must end, right or with an error.
"""

import argparse
import base64
import http.client
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from export_check import move_apart
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text

LARGEST_DIFFERENCE = 1e-5
TIMEOUT = 300  # seconds; a request that takes longer counts as hanging
MAX_BYTES, MAX_TEXTS, MAX_CHARACTERS = 100_000, 16, 4000
BROKEN: dict[str, tuple[Callable[[str], bytes], int]] = {
    "no JSON": (lambda text: b'{"input": "' + text.encode(), 400),
    "not UTF-8": (lambda text: b'{"input": "\xff\xfe"}', 400),
    "no input": (lambda text: b"{}", 422),
    "empty list": (lambda text: b'{"input": []}', 422),
    "empty text": (lambda text: b'{"input": ["a", ""]}', 422),
    "array of tokens": (lambda text: b'{"input": [101, 2023, 102]}', 422),
    "a number": (lambda text: b'{"input": 7}', 422),
    "unknown format": (lambda text: json.dumps({"input": text, "encoding_format": "int3"}).encode(), 422),
    "unknown field": (lambda text: json.dumps({"inputs": text, "input": text}).encode(), 422),
    "impossible dimensions": (lambda text: json.dumps({"input": text, "dimensions": 99999}).encode(), 422),
    "another model": (lambda text: json.dumps({"input": text, "model": "gpt"}).encode(), 404),
    "too many texts": (lambda text: json.dumps({"input": ["a"] * (MAX_TEXTS + 1)}).encode(), 413),
    "too long a text": (lambda text: json.dumps({"input": "a" * (MAX_CHARACTERS + 1)}).encode(), 413),
    "too large a body": (lambda text: json.dumps({"input": "a" * (MAX_BYTES + 1)}).encode(), 413),
}


@dataclass(frozen=True)
class Ask:
    """One request: its body, and what must come back."""

    body: bytes
    status: int
    texts: tuple[int, ...] = ()  # places in the list of texts
    kind: str = "good"


@dataclass(frozen=True)
class Outcome:
    """What came back: a status, or 0 and the name of the exception."""

    ask: Ask
    status: int
    seconds: float
    difference: float = 0.0
    error: str = ""


def some_texts(count: int, seed: int) -> list[str]:
    """Real texts of 1 to 400 words, most of them short."""
    words = " ".join(read_corpus()[0]).split()
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        length = min(400, int(np.exp(draw.uniform(0, np.log(40)))) + (300 if draw.random() < 0.01 else 0))
        start = draw.randrange(len(words) - length)
        texts.append(" ".join(words[start : start + length])[:MAX_CHARACTERS])
    return texts


def asks(texts: list[str], count: int, seed: int) -> list[Ask]:
    """`count` requests, one in ten broken."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        if draw.random() < 0.1:
            kind = draw.choice(sorted(BROKEN))
            body, status = BROKEN[kind]
            made.append(Ask(body(draw.choice(texts)), status, kind=kind))
            continue
        size = draw.choice((1, 1, 1, 1, 1, 1, 2, 4))
        chosen = tuple(draw.randrange(len(texts)) for _ in range(size))
        given = [texts[place] for place in chosen]
        body = {"input": given[0] if size == 1 and draw.random() < 0.5 else given, "model": "mixture"}
        if draw.random() < 0.5:
            body["encoding_format"] = "base64"
        made.append(Ask(json.dumps(body).encode(), 200, chosen))
    return made


@contextmanager
def server(model: Path, port: int, *options: str) -> Iterator[subprocess.Popen]:
    """`hagmoe serve` as a process of its own, ready; ended with SIGTERM, which it must obey."""
    program = "from hagmoe_hf.cli.main import main; main()"
    command = [sys.executable, "-c", program, "serve", str(model), "--port", str(port), "--name", "mixture", *options]
    limits = ["--max-bytes", str(MAX_BYTES), "--max-texts", str(MAX_TEXTS), "--max-characters", str(MAX_CHARACTERS)]
    process = subprocess.Popen([*command, *limits], start_new_session=True)
    try:
        while get(port, "/ready")[0] != 200:
            if process.poll() is not None:
                raise RuntimeError("the server has ended")
            time.sleep(0.2)
        yield process
        process.terminate()
        process.wait(TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


class Client:
    """Sends requests, one connection per thread, and checks what comes back."""

    def __init__(self, port: int, expected: np.ndarray):
        self.port, self.expected, self.local = port, expected, threading.local()

    def send(self, ask: Ask) -> Outcome:
        """One request; a broken connection is an outcome, and the next request opens a new one."""
        connection = getattr(self.local, "connection", None)
        if connection is None:
            connection = self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        start = time.perf_counter()
        try:
            connection.request("POST", "/v1/embeddings", ask.body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.local.connection = None
            return Outcome(ask, 0, time.perf_counter() - start, error=type(error).__name__)
        seconds = time.perf_counter() - start
        if response.status != 200:
            message = body["error"]["message"]
            assert "allowed: " in message or response.status in (400, 422), message
            return Outcome(ask, response.status, seconds)
        vectors = [decoded(entry["embedding"]) for entry in sorted(body["data"], key=lambda entry: entry["index"])]
        difference = np.abs(np.stack(vectors) - self.expected[list(ask.texts)]).max() if ask.texts else np.inf
        return Outcome(ask, 200, seconds, float(difference))


def decoded(embedding: str | list[float]) -> np.ndarray:
    """A vector out of either format."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.array(embedding, dtype=np.float32)


def send_all(client: Client, requests: list[Ask], clients: int, desc: str) -> tuple[list[Outcome], float]:
    """All requests over `clients` threads; outcomes, and the seconds it took."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        outcomes = list(tqdm(pool.map(client.send, requests), total=len(requests), desc=desc, unit=" requests"))
    return outcomes, time.perf_counter() - start


def summary(outcomes: list[Outcome], seconds: float) -> dict:
    """Figures of one phase."""
    good = [outcome for outcome in outcomes if outcome.status == 200]
    times = np.array([outcome.seconds for outcome in good])
    return {
        "requests": len(outcomes),
        "statuses": {str(status): count for status, count in sorted(Counter(o.status for o in outcomes).items())},
        "connection_errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "texts_answered": sum(len(outcome.ask.texts) for outcome in good),
        "seconds": seconds,
        "requests_per_second": len(outcomes) / seconds,
        "texts_per_second": sum(len(outcome.ask.texts) for outcome in good) / seconds,
        "p50_seconds": float(np.quantile(times, 0.5)),
        "p95_seconds": float(np.quantile(times, 0.95)),
        "largest_difference_from_encode": max(outcome.difference for outcome in good),
        "wrong_vectors": sum(outcome.difference > LARGEST_DIFFERENCE for outcome in good),
    }


def load(model: Path, expected: np.ndarray, requests: list[Ask], clients: int, port: int) -> dict:
    """Good and broken requests, mixed; each must have the status that its kind deserves."""
    with server(model, port) as process:
        outcomes, seconds = send_all(Client(port, expected), requests, clients, "load")
        metrics = get(port, "/metrics")[1].decode()
        ready = get(port, "/ready")[0]
    return summary(outcomes, seconds) | {
        "broken": {kind: sum(ask.kind == kind for ask in requests) for kind in sorted(BROKEN)},
        "unexpected_statuses": sum(outcome.status != outcome.ask.status for outcome in outcomes),
        "ready_afterwards": ready == 200,
        "metrics": [line for line in metrics.splitlines() if line.startswith(("hagmoe_requests_total", "hagmoe_waiting"))],
        "exit_status": process.returncode,
    }


def burst(model: Path, expected: np.ndarray, requests: list[Ask], clients: int, port: int) -> dict:
    """More at once than a short queue holds: 200 or 429, nothing else."""
    with server(model, port, "--max-waiting", "8") as process:
        outcomes, seconds = send_all(Client(port, expected), requests, clients, "burst")
    unexpected = sum(outcome.status not in (200, 429) for outcome in outcomes)
    return summary(outcomes, seconds) | {"unexpected_statuses": unexpected, "exit_status": process.returncode}


def killed(model: Path, expected: np.ndarray, requests: list[Ask], clients: int, port: int) -> dict:
    """Two workers, one killed at a third of the requests and one at two thirds; then as many again, undisturbed."""
    with server(model, port, "--workers", "2") as process:
        client, third = Client(port, expected), len(requests) // 3
        sent, guard, kills = 0, threading.Lock(), []

        def send(ask: Ask) -> Outcome:
            nonlocal sent
            with guard:
                sent += 1
                if sent in (third, 2 * third):
                    victim = workers(process.pid)[-1]
                    os.kill(victim, signal.SIGKILL)
                    kills.append(victim)
            return client.send(ask)

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            outcomes = list(tqdm(pool.map(send, requests), total=len(requests), desc="killed", unit=" requests"))
        seconds = time.perf_counter() - start
        while len(workers(process.pid)) < 2 and time.perf_counter() - start < TIMEOUT:
            time.sleep(0.5)
        alive = len(workers(process.pid))
        again, _ = send_all(Client(port, expected), requests[:third], clients, "afterwards")
    return summary(outcomes, seconds) | {
        "kills": len(kills),
        "hanging": sum(outcome.error == "TimeoutError" for outcome in outcomes),
        "unexpected_statuses": sum(outcome.status not in (0, 200) and outcome.status < 500 for outcome in outcomes),
        "workers_afterwards": alive,
        "statuses_afterwards": {str(status): count for status, count in Counter(o.status for o in again).items()},
        "wrong_vectors_afterwards": sum(outcome.difference > LARGEST_DIFFERENCE for outcome in again),
        "exit_status": process.returncode,
    }


def workers(pid: int) -> list[int]:
    """The processes of a server that answer requests."""
    children = psutil.Process(pid).children()
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child.pid for child in alive if "spawn_main" in " ".join(child.cmdline())]


def kept(file: Path, phase: Callable[..., dict], *arguments) -> dict:
    """What a phase found; once it has ended, it is not run again in this folder."""
    if not file.exists():
        write_text(file, json.dumps(phase(*arguments)))
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    """Run the three phases and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--texts", type=int, default=500, help="different texts")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--work", type=Path, default=Path("build/load"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = args.work / "mixture"
    if not model.is_dir():
        encoder = move_apart(upcycle(SentenceTransformer(str(parent_folder()), device="cpu")))
        encoder.save_pretrained(str(args.work / "partial"))
        (args.work / "partial").rename(model)
    texts = some_texts(args.texts, args.seed)
    expected = SentenceTransformer(str(model), device="cpu").encode(texts, show_progress_bar=True)
    mixed = asks(texts, args.requests, args.seed)
    good = [ask for ask in asks(texts, args.requests // 10, args.seed + 1) if ask.status == 200]
    phases = {
        "killed_worker": kept(args.work / "killed.json", killed, model, expected, good, args.clients, args.port),
        "burst": kept(args.work / "burst.json", burst, model, expected, good[::4], 2 * args.clients, args.port + 1),
        "load": kept(args.work / "load.json", load, model, expected, mixed, args.clients, args.port + 2),
    }
    words = [len(text.split()) for text in texts]
    result = {
        "command": shlex.join(["python", "scripts/load_test.py", *sys.argv[1:]]),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, shared with other work",
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "sentence-transformers", "fastapi", "uvicorn", "starlette")
        },
        "model": "all-MiniLM-L6-v2, upcycled, its experts moved apart by noise",
        "clients": args.clients,
        "words_of_a_text": {"median": float(np.median(words)), "most": max(words)},
        "bound": LARGEST_DIFFERENCE,
        **phases,
    }
    result["passed"] = (
        all(
            phase["wrong_vectors"] == phase["unexpected_statuses"] == 0 and phase["exit_status"] in (0, -15)
            for phase in phases.values()
        )
        and not phases["load"]["connection_errors"]
        and phases["killed_worker"]["hanging"] == phases["killed_worker"]["wrong_vectors_afterwards"] == 0
        and set(phases["killed_worker"]["statuses_afterwards"]) == {"200"}
    )
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
