"""The web application: transformers' routes, our counters beside them, and every failure as OpenAI's clients show it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from hf_flash._version import __version__
from hf_flash.errors import ConfigError, HfFlashError
from hf_flash.runtime.counters import FlashStats
from hf_flash.serving.guard import failure
from hf_flash.serving.transformers_serving import Generations, OneModel, build_application

logger = logging.getLogger("hf_flash")


def make_application(
    models: OneModel, generations: Generations, read_stats: Callable[[], FlashStats], *, enable_cors: bool
) -> FastAPI:
    """Make the application that answers what the gate (serving/guard.py) lets through.

    Args:
        models, generations: from serving/transformers_serving.py.
        read_stats: returns the counters of the model.
        enable_cors: tell browsers that web pages from anywhere may call.
    """
    app = build_application(models, generations, enable_cors=enable_cors)
    _add_front_page(app, models)
    _add_counters(app, read_stats)
    _add_failures(app)
    return app


def _add_front_page(app: FastAPI, models: OneModel) -> None:
    """Say at `/` what this is."""

    @app.get("/")
    def front_page() -> JSONResponse:
        chat = ["/v1/chat/completions"] if models.chat_template() is not None else []
        return JSONResponse(
            {
                "server": f"hf_flash {__version__}: a language model with its weights on flash, for OpenAI's clients",
                "model": models.name,
                "base_url": "/v1",
                "answers": [*chat, "/v1/completions", "/v1/responses", "/v1/models"],
                "counters": ["/flash/stats", "/metrics"],
                "health": "/health",
            }
        )


def _add_counters(app: FastAPI, read_stats: Callable[[], FlashStats]) -> None:
    @app.get("/flash/stats")
    def flash_stats() -> JSONResponse:
        return JSONResponse(read_stats().to_dict())

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(prometheus(read_stats()), media_type="text/plain; version=0.0.4")


def _add_failures(app: FastAPI) -> None:
    """Answer every failure in OpenAI's form: 400 and the like for what the request got wrong, else 503 or 500."""

    @app.exception_handler(HTTPException)
    async def answer_refusal(_: Request, error: HTTPException) -> JSONResponse:
        return _failure(error.status_code, error.detail)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(TemplateError)
    @app.exception_handler(ValueError)
    async def answer_wrong_request(_: Request, error: Exception) -> JSONResponse:
        return _failure(400, error)

    @app.exception_handler(HfFlashError)
    async def answer_our_error(_: Request, error: HfFlashError) -> JSONResponse:
        if isinstance(error, ConfigError):
            return _failure(400, error)
        logger.error("hf_flash: %s", error)
        return _failure(503, error)

    @app.exception_handler(Exception)
    async def answer_other_error(_: Request, error: Exception) -> JSONResponse:
        return _failure(500, f"{type(error).__name__}: {error}")


def _failure(status: int, reason: object) -> JSONResponse:
    return JSONResponse(failure(status, reason), status_code=status)


def prometheus(found: FlashStats) -> str:
    """Write the numbers in `found` in Prometheus' text format: what only grows is a counter, the rest a gauge."""
    plain = found.to_dict()
    counters: dict[str, float] = plain.pop("counters")
    rows = [(f"hf_flash_{name}_total", "counter", value) for name, value in counters.items()]
    rows += [(f"hf_flash_{name}", "gauge", value) for name, value in plain.items() if isinstance(value, int | float)]
    return "".join(f"# TYPE {name} {kind}\n{name} {value}\n" for name, kind, value in rows)
