"""The routes over one opened artifact."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from flyweight import __version__, data
from flyweight.errors import DataError, FlyweightError
from flyweight.serve import requests
from flyweight.serve.requests import Refused, Text

if TYPE_CHECKING:
    from flyweight.runtime import Session

__all__ = ["Limits", "Service", "create_app"]

ROUTES = {"text-classification": "/predict", "embedding": "/embed"}


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait, may take. Refused beyond: 413 and 429."""

    body_bytes: int = 2_000_000
    batch: int = 32
    waiting: int = 256


class Service:
    """One artifact and the one thread that runs it: the engine and the tokenizer's state have a single user."""

    def __init__(self, session: Session, name: str, limits: Limits) -> None:
        self.session, self.name, self.limits = session, name, limits
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self.waiting = 0

    async def answer(self, texts: list[Text], truncate: bool, raw: bool) -> list[Any]:
        """Answers in order. Raises Refused when too much waits, or for a text that the model cannot take."""
        if self.waiting >= self.limits.waiting:
            raise Refused(429, "Overloaded", f"expected fewer than {self.limits.waiting} waiting requests; try later")
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, self._answer, texts, truncate, raw)
        except (Refused, FlyweightError):
            raise
        except Exception as error:  # only its class is told: the text of it might quote the client's
            raise Refused(500, "Backend", f"unexpected {type(error).__name__}") from None
        finally:
            self.waiting -= 1

    def _answer(self, texts: list[Text], truncate: bool, raw: bool) -> list[Any]:
        session = self.session
        encoder = session.encoder._replace(truncate=truncate or session.encoder.truncate)
        named = [(f"input {number}", text, pair) for number, (text, pair) in enumerate(texts)]
        try:
            examples = data.pack(encoder.encode(named), None)
        except DataError as error:
            raise Refused(413, "Validation", str(error).replace("--truncate", '"truncate": true')) from None
        # One by one: no work is spent on padding, and with dynamic int8 an answer would depend on its neighbours.
        outputs = session.outputs(examples, batch_size=1)
        labels = session.manifest.labels
        return _raw(outputs, labels) if raw else session.task.decode(outputs, labels)

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.session.close()


def _raw(outputs: Any, labels: tuple[str, ...] | None) -> list[Any]:
    """As `decode`, with logits for scores; vectors are raw anyway."""
    if labels is None:
        return [row.tolist() for row in outputs]
    order = np.argsort(-outputs, axis=-1, kind="stable")
    return [
        [{"label": labels[i], "score": float(row[i])} for i in best] for row, best in zip(outputs, order, strict=True)
    ]


def create_app(service: Service) -> FastAPI:
    """An ASGI app with the task's route, /health, /info and /openapi.json. It asks nothing of any other host."""
    # FastAPI's own /docs page would load scripts from a CDN.
    app = FastAPI(title="Flyweight", version=__version__, docs_url=None, redoc_url=None)
    manifest = service.session.manifest
    route = ROUTES[manifest.task]

    async def predict(request: Request) -> Response:
        asked = requests.read_request(await _body(request, service.limits.body_bytes))
        texts, many = asked.batch(pairs=manifest.task != "embedding")
        if not all(text.strip() for text, _ in texts):
            raise Refused(400, "Empty", "expected texts, got an empty one")
        if len(texts) > service.limits.batch:
            raise Refused(413, "Validation", f"expected at most {service.limits.batch} inputs, got {len(texts)}")
        answers = await service.answer(texts, asked.truncate, asked.raw_scores)
        # TEI answers /embed with a list of vectors even for a single text.
        return _json(answers if many or manifest.task == "embedding" else answers[0])

    async def health() -> Response:
        return Response(status_code=200)

    async def info() -> Response:
        return _json(_info(service))

    async def docs() -> Response:
        return RedirectResponse("/openapi.json")

    body = {"content": {"application/json": {"schema": requests.Request.model_json_schema()}}, "required": True}
    app.add_api_route(
        route, predict, methods=["POST"], summary=f"Answers ({manifest.task})", openapi_extra={"requestBody": body}
    )
    app.add_api_route("/health", health, methods=["GET"], summary="200 as long as requests are answered")
    app.add_api_route("/info", info, methods=["GET"], summary="The model and the limits")
    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(FlyweightError, _backend_error)
    return app


async def _body(request: Request, limit: int) -> bytes:
    """The body, never more than `limit` bytes of it in memory."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "Validation", "expected a body without compression; send it as it is")
    too_large = Refused(413, "Validation", f"expected at most {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > limit:
            raise too_large
    return bytes(found)


def _info(service: Service) -> dict[str, Any]:
    manifest = service.session.manifest
    labels = manifest.labels or ()
    return {
        "model_id": service.name,
        "model_sha": manifest.origin,
        "model_type": {
            "classifier": {
                "id2label": {str(i): label for i, label in enumerate(labels)},
                "label2id": {label: i for i, label in enumerate(labels)},
            }
        }
        if labels
        else {manifest.task: {}},
        "task": manifest.task,
        "max_input_length": manifest.max_length,
        "max_client_batch_size": service.limits.batch,
        "max_concurrent_requests": service.limits.waiting,
        "version": __version__,
    }


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


def _failure(status: int, kind: requests.ErrorType, text: str) -> Response:
    return JSONResponse({"error": text, "error_type": kind}, status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    answer = _failure(error.status, error.kind, error.text)
    if error.status == 429:
        answer.headers["retry-after"] = "1"
    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    """No such route, or a method that it does not take."""
    assert isinstance(error, HTTPException)
    return _failure(error.status_code, "Validation", f"{request.method} {request.url.path}: {error.detail}")


async def _backend_error(request: Request, error: Exception) -> Response:
    return _failure(424, "Backend", str(error))
