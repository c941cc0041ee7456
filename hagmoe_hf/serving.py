"""An HTTP server for embeddings, as OpenAI's `/v1/embeddings`: texts of all waiting requests share forward passes.

One event loop takes requests, one thread encodes. While it encodes, texts queue; what has queued is the next batch, so
batches grow with the load and nobody waits for a timer. A request is accepted whole or refused whole, and an accepted one is
answered: with its vectors, with a 5xx, or, where the process was killed, with a closed connection.
"""

import asyncio
import base64
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from . import sentence
from .graphs import load_model_or_graph, split_name

try:
    import prometheus_client as prometheus
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from prometheus_client import multiprocess
    from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError("The server needs fastapi, uvicorn and prometheus_client: pip install hagmoe_hf[serve]") from error

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BODY_SECONDS = 30  # to send a request's body
DRAIN = 16  # times `request_bytes` that are read and thrown away, so that a client hears its 413 instead of a reset
_ENVIRONMENT = "HAGMOE_SERVE"  # how uvicorn's worker processes learn the settings


@dataclass(frozen=True)
class Settings:
    """What is served, and how much of it.

    Attributes:
        model: Folder or Hub id of a `SentenceTransformer`, or an exported graph in such a folder.
        name: What `model` in requests and answers says.
        dimensions: Shorter vectors that may be asked for; what the model was trained for with Matryoshka losses.
        batch_texts: Texts per forward pass, at most.
        request_bytes: Of a request's body, at most.
        texts: Of a request, at most.
        characters: Of a text, at most. A shorter text of too many tokens is cut, as `encode` does.
        waiting: Texts that are accepted and not answered yet, at most; nor does a request have more.

    Raises:
        ValueError: A limit under 1.
    """

    model: str
    name: str
    dimensions: tuple[int, ...] = ()
    batch_texts: int = 32
    request_bytes: int = 1_000_000
    texts: int = 256
    characters: int = 20_000
    waiting: int = 2048

    def __post_init__(self) -> None:
        for name in ("batch_texts", "request_bytes", "texts", "characters", "waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not possible; allowed: at least 1.")


class RefusedError(Exception):
    """A request that is not answered with vectors.

    Args:
        status: Of HTTP.
        code: A word for programs.
        message: A sentence for people.
    """

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code

    def response(self) -> JSONResponse:
        """In the shape of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        body = {"error": {"message": str(self), "type": kind, "code": self.code}}
        return JSONResponse(body, self.status, {"Retry-After": "1"} if self.status == 429 else None)


class EmbeddingRequest(BaseModel):
    """The body of `POST /v1/embeddings`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: list[str]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None  # OpenAI's clients may send it; nothing is done with it

    @field_validator("input", mode="before")
    @classmethod
    def texts(cls, value: Any) -> Any:
        """One text is a list of one; tokens of some other model's vocabulary cannot be encoded."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("is no text; allowed: a string or a list of strings (no arrays of tokens)")
        if not texts or not all(texts):
            raise ValueError("is empty; allowed: at least one text, none of them empty")
        return texts


class Batcher:
    """Texts of many requests, encoded together, in the order in which they came.

    Args:
        model: Used by one thread only.
        batch_texts: Texts per forward pass, at most.
        waiting: Texts that are accepted and not answered yet, at most.
        observe: Called with the size of each batch.
    """

    def __init__(self, model: "SentenceTransformer", batch_texts: int, waiting: int, observe: Any = lambda texts: None):
        self.model, self.batch_texts, self.limit, self.observe = model, batch_texts, waiting, observe
        self.waiting = 0
        self._queue: deque[tuple[str, asyncio.Future]] = deque()
        self._filled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    async def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """The vector (float32, (D,)) and the number of tokens of each text.

        Raises:
            RefusedError: 429, too many texts wait already; 500, the model has failed.
        """
        if self.waiting + len(texts) > self.limit:
            raise RefusedError(
                429,
                "queue_full",
                f"{self.waiting} texts are waiting, and this request has {len(texts)}; allowed: {self.limit}.",
            )
        loop = asyncio.get_running_loop()
        jobs = [(text, loop.create_future()) for text in texts]
        self.waiting += len(jobs)
        self._queue.extend(jobs)
        self._filled.set()
        try:
            return list(await asyncio.gather(*(future for _, future in jobs)))
        finally:
            self.waiting -= len(jobs)
            for _, future in jobs:  # where one has failed, or the client has gone, the others need not be encoded
                future.cancel()

    async def run(self) -> None:
        """Encode whatever waits, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            jobs = [self._queue.popleft() for _ in range(min(self.batch_texts, len(self._queue)))]
            if not self._queue:
                self._filled.clear()
            jobs = [(text, future) for text, future in jobs if not future.done()]  # its client may have gone
            if not jobs:
                continue
            self.observe(len(jobs))
            try:
                answers = await loop.run_in_executor(self._thread, self._forward, [text for text, _ in jobs])
            except Exception as error:  # whatever it was, those who wait must hear of it
                answers = [RefusedError(500, "encode_failed", f"The model has failed: {error!r}.")] * len(jobs)
            for (_, future), answer in zip(jobs, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, RefusedError):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def _forward(self, texts: list[str]) -> list[Any]:
        vectors_ND = self.model.encode(texts, batch_size=self.batch_texts, show_progress_bar=False)
        # Counted again, since `encode` does not tell; cheap beside the encoder
        tokens = self.model.tokenizer(texts, truncation=True, max_length=self.model.max_seq_length)["input_ids"]
        return [(vector, len(ids)) for vector, ids in zip(vectors_ND, tokens, strict=True)]


@dataclass(frozen=True)
class Metrics:
    """What `/metrics` shows; over all worker processes where there are several."""

    registry: prometheus.CollectorRegistry
    requests: prometheus.Counter
    texts: prometheus.Counter
    tokens: prometheus.Counter
    seconds: prometheus.Histogram
    batch: prometheus.Histogram
    waiting: prometheus.Gauge


def metrics() -> Metrics:
    """Metrics in a registry of their own."""
    registry = prometheus.CollectorRegistry()
    own: dict[str, Any] = {"registry": registry}
    seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
    return Metrics(
        registry,
        prometheus.Counter("hagmoe_requests", "Requests for embeddings, by status.", ["status"], **own),
        prometheus.Counter("hagmoe_texts", "Texts that were encoded.", **own),
        prometheus.Counter("hagmoe_tokens", "Tokens that were encoded.", **own),
        prometheus.Histogram(
            "hagmoe_request_seconds", "From a request's headers to its answer.", buckets=seconds, registry=registry
        ),
        prometheus.Histogram(
            "hagmoe_batch_texts", "Texts per forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        ),
        prometheus.Gauge(
            "hagmoe_waiting_texts", "Accepted, not answered yet.", multiprocess_mode="livesum", registry=registry
        ),
    )


def create_app(model: "SentenceTransformer", settings: Settings) -> FastAPI:
    """The application, for any ASGI server.

    Args:
        model: What answers; used by this application only.
        settings: Limits and names; `settings.model` is not read.

    Raises:
        ValueError: `settings.dimensions` names one that the model does not have.
    """
    dimension = cast(int, model.get_embedding_dimension())
    if not all(1 <= wanted <= dimension for wanted in settings.dimensions):
        raise ValueError(f"dimensions={list(settings.dimensions)} is not possible; allowed: 1 to {dimension}.")
    shown = metrics()
    batcher = Batcher(model, settings.batch_texts, settings.waiting, shown.batch.observe)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner = asyncio.create_task(batcher.run())
        yield  # the server ends this only when every accepted request is answered
        runner.cancel()

    app = FastAPI(title="hagmoe serve", lifespan=lifespan)
    schema = {"content": {"application/json": {"schema": EmbeddingRequest.model_json_schema()}}, "required": True}

    @app.post("/v1/embeddings", openapi_extra={"requestBody": schema})
    async def embeddings(request: Request) -> Response:
        """Vectors of one text or several, as OpenAI's endpoint of this name."""
        start = time.perf_counter()
        try:
            wanted = parse(await read_body(request, settings.request_bytes), settings, dimension)
            shown.waiting.inc(len(wanted.input))
            try:
                answers = await batcher.encode(wanted.input)
            finally:
                shown.waiting.dec(len(wanted.input))
            response: Response = JSONResponse(answer(wanted, answers, settings.name))
            shown.texts.inc(len(answers))
            shown.tokens.inc(sum(tokens for _, tokens in answers))
        except RefusedError as refusal:
            response = refusal.response()
        shown.requests.labels(str(response.status_code)).inc()
        shown.seconds.observe(time.perf_counter() - start)
        return response

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        """A path or method that does not exist, in the shape of all other errors."""
        message = (
            f"{request.method} {request.url.path}: {error.detail}; allowed: {', '.join(sorted(app.openapi()['paths']))}."
        )
        return RefusedError(error.status_code, "no_such_path", message).response()

    @app.get("/v1/models")
    async def models() -> dict:
        """The one model that is served."""
        return {"object": "list", "data": [{"id": settings.name, "object": "model", "owned_by": "hagmoe"}]}

    @app.get("/health")
    async def health() -> dict:
        """Alive: the event loop answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Ready for more: the model is loaded, and the queue is not full."""
        full = batcher.waiting >= settings.waiting
        return JSONResponse({"status": "queue full" if full else "ready"}, 503 if full else 200)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        registry = shown.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = prometheus.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return Response(prometheus.generate_latest(registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        RefusedError: 413, it has more than `most` bytes; 408, it takes too long; 400, the client has gone.
    """

    async def read() -> bytes:
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= most:
                body += chunk
            elif size > DRAIN * most:
                break
        if size > most:
            raise RefusedError(
                413, "body_too_large", f"The body has more than {most} bytes; allowed: {most}. Send fewer texts at once."
            )
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise RefusedError(408, "body_too_slow", f"The body took more than {BODY_SECONDS} s; allowed: less.") from None
    except ClientDisconnect:
        raise RefusedError(400, "client_gone", "The client has gone before its request was whole.") from None


def parse(body: bytes, settings: Settings, dimension: int) -> EmbeddingRequest:
    """A request that can be answered.

    Args:
        body: JSON.
        settings: Names and limits.
        dimension: Of the model's vectors.

    Raises:
        RefusedError: 400, no JSON; 422, a field is wrong; 404, another model; 413, too many texts, or too long a text.
    """
    try:
        wanted = EmbeddingRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise RefusedError(400, "no_json", f"The body is no JSON: {first['msg']}.") from None
        where = ".".join(map(str, first["loc"])) or "the body"
        raise RefusedError(422, "wrong_field", f"{where}: {first['msg'].removeprefix('Value error, ')}.") from None
    if wanted.model not in (None, settings.name):
        raise RefusedError(404, "model_not_found", f"model={wanted.model!r} is not served; allowed: {settings.name!r}.")
    if wanted.dimensions not in (None, dimension, *settings.dimensions):
        allowed = sorted({dimension, *settings.dimensions})
        raise RefusedError(422, "wrong_field", f"dimensions={wanted.dimensions} is not possible; allowed: {allowed}.")
    most = min(settings.texts, settings.waiting)
    if len(wanted.input) > most:
        raise RefusedError(413, "too_many_texts", f"input has {len(wanted.input)} texts; allowed: {most} a request.")
    longest = max(map(len, wanted.input))
    if longest > settings.characters:
        raise RefusedError(
            413, "text_too_long", f"input has a text of {longest} characters; allowed: {settings.characters}."
        )
    return wanted


def answer(wanted: EmbeddingRequest, encoded: Sequence[tuple[np.ndarray, int]], name: str) -> dict:
    """The body of the answer, as OpenAI's.

    Args:
        wanted: What was asked for.
        encoded: The vector (float32, (D,)) and the number of tokens of each text.
        name: Of the model.
    """
    vectors = [vector for vector, _ in encoded]
    if wanted.dimensions is not None and wanted.dimensions < len(vectors[0]):
        short = [vector[: wanted.dimensions] for vector in vectors]
        vectors = [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in short]  # as OpenAI's
    as_base64 = wanted.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(count for _, count in encoded)
    return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def serve(settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, workers: int = 1) -> None:
    """Serve until SIGTERM or SIGINT; then take no more requests, and answer those that were accepted.

    Args:
        settings: What, and how much.
        host: Address to listen at.
        port: Port to listen at.
        workers: Processes, each with the model; one that dies is replaced. With one, this process is the server.

    Raises:
        ValueError: `settings.model` is no SentenceTransformer.
        FileNotFoundError: It names a graph that is not there.
    """
    if not sentence.is_sentence_transformer_path(split_name(settings.model)[0]):
        raise ValueError(
            f"model={settings.model!r} is no SentenceTransformer; allowed: a folder or Hub id with a modules.json."
        )
    os.environ[_ENVIRONMENT] = json.dumps(asdict(settings))
    with tempfile.TemporaryDirectory() as folder:
        if workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # read by the workers, when they import prometheus_client
        uvicorn.run(
            f"{__name__}:app_from_environment",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            access_log=False,
            # How long the parent waits for a sign of life, also of a dead worker, before it replaces it: a worker that
            # imports torch is silent for longer than the default of 5 s
            timeout_worker_healthcheck=30,
        )


def app_from_environment() -> FastAPI:
    """The application of one worker process, made from what `serve` has left in the environment."""
    _forget_dead_workers()
    values = json.loads(os.environ[_ENVIRONMENT])
    settings = Settings(**{**values, "dimensions": tuple(values["dimensions"])})
    return create_app(load_model_or_graph(settings.model), settings)


def _forget_dead_workers() -> None:
    """Take what killed workers left in the gauges out of the sum."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for path in Path(folder).glob("gauge_livesum_*.db") if folder else ():
        pid = int(path.stem.removeprefix("gauge_livesum_"))
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid)
