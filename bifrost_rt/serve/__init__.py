"""Images over HTTP: `bifrost-rt serve`, or one application of Ray Serve on many devices.

    gate -> app -> queue -> worker
    who      what   when      drawing

`pip install 'bifrost-rt[serve]'` brings what this package imports and the rest of the wheel does
not: FastAPI, uvicorn and Prometheus' client.
"""

from __future__ import annotations

import argparse
import importlib.util

from bifrost_rt.errors import BifrostError, RequestError, TextFileError
from bifrost_rt.files import read_text

NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def run(options: argparse.Namespace) -> int:
    """`bifrost-rt serve`. Returns when the server has stopped."""
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise BifrostError(
            f"serving needs {', '.join(missing)}, not installed here",
            hint="pip install 'bifrost-rt[serve]'",
        )
    from bifrost_rt.serve import server
    from bifrost_rt.serve.settings import Limits, Settings

    settings = Settings(
        host=options.host,
        port=options.port,
        token=None if options.token_file is None else read_token(options.token_file),
        allow_hosts=tuple(options.allow_host),
        cors_origins=tuple(options.cors_origin),
        max_images=options.max_images,
        max_prompt=options.max_prompt,
        max_steps=options.max_steps,
        max_body=options.max_body,
        max_image_body=options.max_image_body,
        fetch_hosts=tuple(options.fetch_host),
        grace=options.grace,
        limits=Limits(
            batch=options.max_batch,
            waiting=options.max_waiting,
            keep=options.keep,
            preview_every=options.preview_every or None,
        ),
    )
    return server.run(options.engines, options.backend, options.memory_budget, settings)


def read_token(path: str) -> str:
    """Return the token of a file.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        token = read_text(path).strip()
    except (OSError, TextFileError) as error:
        raise RequestError(f"{path}: cannot be read as a token: {error}") from None
    if not token.isascii():
        raise RequestError(f"{path}: cannot be read as a token: it is not ASCII")
    return token
