"""Forms with files, as OpenAI's image API takes them: parts -> a checked request and images."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile

from bifrost_rt.errors import RequestError

FORM = "multipart/form-data"
MOST_FIELDS = 100
# OpenAI's clients send a list of images under the second name.
IMAGE_NAMES = ("image", "image[]")
MASK = "mask"

Body = TypeVar("Body", bound=BaseModel)


class PartError(RequestError):
    """A part of a form cannot be what it is. `param` is its name, None for the whole form."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param


async def read(http: Request, model: type[Body], most: int) -> tuple[Body, dict[str, bytes]]:
    """Read a form, whose fields are those of a request, and its files `image` and `mask`.

    Args:
        most: bytes of a field.

    Raises:
        PartError: no form, no image, or a part that is twice there or of the wrong kind.
        RequestValidationError: a field that is unknown, missing, or cannot be what it is.
        HTTPException: the form is broken.
    """
    if not http.headers.get("content-type", "").lower().startswith(FORM):
        raise PartError(None, f"the Content-Type must be {FORM}")
    async with http.form(max_files=3, max_fields=MOST_FIELDS, max_part_size=most) as form:
        files = await _files(form)
        fields = {name: _text(form, name) for name in form if name not in (*IMAGE_NAMES, MASK)}
    typed = {name: _typed(model, name, text) for name, text in fields.items()}
    try:
        return model.model_validate(typed), files
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(found) from None


def document(model: type[BaseModel], mask: bool) -> dict[str, Any]:
    """Say in OpenAPI what a form holds."""
    schema = model.model_json_schema()
    file = {"type": "string", "format": "binary"}
    properties = {"image": file, **({MASK: file} if mask else {}), **schema["properties"]}
    required = ["image", *schema.get("required", ())]
    form = {**schema, "properties": properties, "required": required}
    return {"requestBody": {"required": True, "content": {FORM: {"schema": form}}}}


async def _files(form: FormData) -> dict[str, bytes]:
    images = [part for name in IMAGE_NAMES for part in form.getlist(name)]
    if not images:
        raise PartError("image", "image: is missing; send it as a file")
    if len(images) > 1:
        raise PartError("image", f"image: {len(images)} are given, one is edited at a time")
    masks = form.getlist(MASK)
    if len(masks) > 1:
        raise PartError(MASK, f"mask: {len(masks)} are given, expected one")
    found = {"image": images[0], **({MASK: masks[0]} if masks else {})}
    files = {}
    for name, part in found.items():
        if not isinstance(part, UploadFile):
            raise PartError(name, f"{name}: must be a file, this is a field of text")
        files[name] = await part.read()
    return files


def _text(form: FormData, name: str) -> str:
    values = form.getlist(name)
    shown = name.encode("ascii", "backslashreplace").decode()[:80]
    if len(values) > 1:
        raise PartError(shown, f"{shown}: is given {len(values)} times")
    if not isinstance(values[0], str):
        raise PartError(shown, f"{shown}: must be text, this is a file")
    return values[0]


def _typed(model: type[BaseModel], name: str, text: str) -> Any:
    """Return what a field's text stands for: forms have no numbers, and no true or false."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, (bool, int, float)):
        return text
    choices = (value, text) if isinstance(value, bool) else (text, value)
    return next((one for one in choices if _fits(model, name, one)), value)


def _fits(model: type[BaseModel], name: str, value: Any) -> bool:
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return all(one["loc"][:1] != (name,) for one in error.errors())
    return True
