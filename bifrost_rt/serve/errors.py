"""Errors in the shape that OpenAI's clients read. No trace and nothing of the request's own values
goes back, except names of fields."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException

from bifrost_rt.errors import RequestError
from bifrost_rt.serialization import nearest
from bifrost_rt.serve.forms import PartError
from bifrost_rt.serve.job_queue import STOPPING, FullError, StoppingError
from bifrost_rt.serve.schema import (
    ChatRequest,
    EditJobRequest,
    EditRequest,
    Fault,
    FaultResponse,
    ImageRequest,
    JobRequest,
    VariationJobRequest,
    VariationRequest,
)

log = logging.getLogger("bifrost_rt.serve")

# status -> what OpenAI calls errors of this kind
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# said in FastAPI's routes, so that the document of the API names them
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultResponse, "description": description}
    for status, description in {
        400: "not a request, or a field that cannot be what it is; `param` names it",
        401: "no bearer token where the server asks for one, or a wrong one",
        403: "a Host header or an origin that the server does not answer to; it is started with "
        "--allow-host and --cors-origin for others than this machine's own",
        404: "no such model, job, image or path",
        405: "a method that the path does not have",
        413: "more bytes than the server reads",
        429: "the queue is full; Retry-After says when to come back",
        500: "drawing or answering failed",
        503: "the server is shutting down",
    }.items()
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
    """Return an error as a response."""
    body = FaultResponse(
        error=Fault(message=message, type=error_type(status), param=param, code=code)
    )
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(body.model_dump(), status, headers=headers)


def unexpected(method: str, path: str, error: Exception) -> JSONResponse:
    """Return the answer to a request that broke something; the log gets the trace."""
    log.error("%s %s failed", method, path, exc_info=error)
    return fault(500, "internal error; the server's log says more")


# what requests to a path are; to all others, jobs, whose fields are those of all that is drawn
CHAT = "/v1/chat/completions"
# path -> what the form there is, which has an image
FORMS: dict[str, type[ImageRequest]] = {
    "/v1/images/edits": EditRequest,
    "/v1/images/variations": VariationRequest,
    "/v1/jobs/edits": EditJobRequest,
    "/v1/jobs/variations": VariationJobRequest,
}
_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    CHAT: (ChatRequest, "messages"),
    **{path: (model, "a prompt") for path, model in FORMS.items()},
}


def _invalid(first: Any, path: str) -> JSONResponse:
    """Return what the validation of a request found first, in words for who wrote the request."""
    place, *names = first["loc"]  # body, path or query, and the field
    fields, needed = _BODIES.get(path, (JobRequest, "a prompt"))
    field = ".".join(map(str, names)).encode("ascii", "backslashreplace").decode()[:80]
    if first["type"] == "json_invalid":
        return fault(400, "the body is not JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        near = nearest(field, fields.model_fields) if len(names) == 1 else ""
        message = f"unknown field {field!r}{near}"
        return fault(400, message, param=field, code="unknown_parameter")
    if place == "body" and not field:
        if isinstance(first["input"], bytes):
            message, code = "the Content-Type must be application/json", "invalid_content_type"
        else:
            message, code = f"the body must be a JSON object with {needed}", "invalid_json"
        return fault(400, message, code=code)
    message = f"{field}: {first['msg']}"
    if first["type"] in ("literal_error", "too_long"):
        expected = first["ctx"].get("expected", "empty").replace("False", "false")
        message = f"{field}: must be {expected}"
        if names[0] in fields.model_fields and (about := fields.model_fields[names[0]].description):
            message += f" ({about})"
    return fault(400, message, param=field, code="invalid_value")


def handle(app: FastAPI) -> None:
    """Have the app answer every error in this shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error.errors()[0], request.url.path)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return fault(400, str(error), code="invalid_value")

    @app.exception_handler(PartError)
    async def bad_part(request: Request, error: PartError) -> JSONResponse:
        code = "invalid_content_type" if error.param is None else "invalid_value"
        return fault(400, str(error), param=error.param, code=code)

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
