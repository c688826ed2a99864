"""Errors in the shape that OpenAI's clients read. No trace and nothing of the request's own values
goes back, except names of fields."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from bifrost_rt.errors import RequestError
from bifrost_rt.serve.schema import Fault, FaultResponse
from bifrost_rt.serve.studio import STOPPING, FullError, StoppingError

log = logging.getLogger("bifrost_rt.serve")

# status -> what OpenAI calls errors of this kind
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# said in FastAPI's routes, so that the document of the API names them
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultResponse} for status in (400, 401, 403, 404, 413, 415, 429, 500, 503)
}


def error_type(status: int) -> str:
    """OpenAI's word for errors of a status."""
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def fault(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
) -> JSONResponse:
    """An error as a response."""
    body = FaultResponse(
        error=Fault(message=message, type=error_type(status), param=param, code=code)
    )
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(body.model_dump(), status, headers=headers)


def handle(app: FastAPI) -> None:
    """Have the app answer every error in this shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        field = field.encode("ascii", "backslashreplace").decode()[:80]
        if first["type"] == "extra_forbidden":
            return fault(400, f"unknown field {field!r}", param=field, code="unknown_parameter")
        if first["type"] == "json_invalid":
            return fault(400, "the body is not JSON", code="invalid_json")
        where = f"{field}: " if field else ""
        return fault(400, f"{where}{first['msg']}", param=field or None, code="invalid_value")

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return fault(400, str(error), code="invalid_value")

    @app.exception_handler(FullError)
    async def full(request: Request, error: FullError) -> JSONResponse:
        return fault(429, str(error), code="queue_full", retry_after=error.retry_after)

    @app.exception_handler(StoppingError)
    async def stopping(request: Request, error: StoppingError) -> JSONResponse:
        return fault(STOPPING.status, STOPPING.message, code="stopping", retry_after=5)

    @app.exception_handler(AnyHTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        answer = fault(error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return fault(500, "internal error; the server's log says more")
