"""The routes: OpenAI's image API, jobs with progress, probes, figures, and the page."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from bifrost_rt import __version__, request
from bifrost_rt.manifest import Manifest
from bifrost_rt.params import OPTIONS
from bifrost_rt.serve import schema
from bifrost_rt.serve.faults import RESPONSES, error_type, fault, handle
from bifrost_rt.serve.gate import Gate
from bifrost_rt.serve.jobs import Job
from bifrost_rt.serve.metrics import MEDIA_TYPE
from bifrost_rt.serve.settings import Settings
from bifrost_rt.serve.studio import Studio

PAGE = Path(__file__).parent / "page"
# The page runs what comes from this server and shows pictures that it was sent; nothing else.
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"


class _Refused(Exception):
    """A request that was understood and cannot be served."""

    def __init__(self, answer: JSONResponse) -> None:
        self.answer = answer


def create_app(studio: Studio, manifest: Manifest, settings: Settings) -> FastAPI:
    """The application. Closes the studio when it is shut down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(studio.close, settings.grace)

    app = FastAPI(
        title="bifrost-rt",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        responses=RESPONSES,
        # what has no type is read as JSON; `gate.py` refuses the pages that could abuse it
        strict_content_type=False,
    )
    app.add_middleware(Gate, settings=settings, metrics=studio.metrics)
    handle(app)

    @app.exception_handler(_Refused)
    async def refused(http: Request, error: _Refused) -> JSONResponse:
        return error.answer

    def submitted(body: schema.ImageRequest, previews: bool) -> Job:
        job = _job(body, previews, manifest, settings)
        studio.submit(job)
        return job

    async def known(job_id: str) -> Job:
        job = studio.get(job_id)
        if job is None:
            message = f"no such job; the last {studio.limits.keep} are remembered"
            raise _Refused(fault(404, message, code="not_found"))
        return job

    of_path = Depends(known)

    @app.post("/v1/images/generations", response_model_exclude_none=True)
    async def generations(body: schema.ImageRequest, http: Request) -> schema.ImageResponse:
        """Draw, and answer with the pictures. Who hangs up cancels."""
        job = submitted(body, previews=False)
        try:
            await _finished_or_gone(job, http)
        finally:
            studio.cancel(job)  # without effect on a finished job
        by_url = body.response_format == "url"
        if not by_url:
            studio.forget(job)
        if job.failure:
            failure = job.failure
            raise _Refused(fault(failure.status, failure.message, code=failure.code))
        if job.state == "cancelled":
            raise _Refused(fault(499, "the job was cancelled", code="cancelled"))
        base = str(http.base_url).rstrip("/")
        return schema.ImageResponse(
            created=int(job.created),
            data=[
                schema.Picture(url=base + _place(job, i))
                if by_url
                else schema.Picture(b64_json=base64.b64encode(picture).decode())
                for i, picture in enumerate(job.pictures)
            ],
            output_format=body.output_format or "png",
            size=_size(manifest),
            seed=job.request.parameters.seed,
            warnings=job.warnings,
        )

    @app.post("/v1/jobs", status_code=202)
    async def start(body: schema.JobRequest, answer: Response) -> schema.JobResponse:
        """Draw, and answer at once."""
        job = submitted(body, body.previews or False)
        answer.headers["Location"] = f"/v1/jobs/{job.id}"
        return _described(job, studio)

    @app.get("/v1/jobs/{job_id}")
    async def state(job: Job = of_path) -> schema.JobResponse:
        """How far a job is."""
        return _described(job, studio)

    @app.delete("/v1/jobs/{job_id}")
    async def cancel(job: Job = of_path) -> schema.JobResponse:
        """End a job. Without effect on a finished one."""
        studio.cancel(job)
        return _described(job, studio)

    @app.get("/v1/jobs/{job_id}/events", response_class=EventSourceResponse)
    async def events(job: Job = of_path) -> AsyncIterator[ServerSentEvent]:
        """A job as it changes: `progress` and `preview`, and at last its state's own name."""
        shown = None
        async for _ in job.watch():
            preview = job.preview
            if preview is not None and preview != shown:
                shown = preview
                data = {"step": preview[0], "webp": base64.b64encode(preview[1]).decode()}
                yield ServerSentEvent(event="preview", data=data)
            name = job.state if job.finished else "progress"
            yield ServerSentEvent(event=name, data=_described(job, studio))

    @app.get("/v1/jobs/{job_id}/images/{image}", response_class=Response)
    async def picture(image: int, job: Job = of_path) -> Response:
        """One picture's file."""
        if not 0 <= image < len(job.pictures):
            raise _Refused(fault(404, "no such picture, or not yet", code="not_found"))
        media = f"image/{job.file_format.lower()}"
        return Response(job.pictures[image], media_type=media)

    @app.get("/v1/models")
    async def models() -> schema.ModelList:
        """The set that is served."""
        return schema.ModelList(data=[schema.Model(id=manifest.name)])

    @app.get("/v1/models/{model}")
    async def one_model(model: str) -> schema.Model:
        """The set that is served, by its name."""
        if model != manifest.name:
            raise _Refused(_no_such_model(manifest))
        return schema.Model(id=manifest.name)

    @app.get("/v1/about")
    async def about() -> schema.About:
        """Sizes, defaults and limits."""
        return _about(manifest, settings, studio)

    @app.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        """The process answers."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz", response_class=Response)
    async def readyz() -> Response:
        """Whether it takes requests."""
        if studio.stopping:
            return Response("stopping\n", 503, media_type="text/plain")
        return Response("ready\n", media_type="text/plain")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(studio.metrics.text(), media_type=MEDIA_TYPE)

    _serve_page(app)
    return app


def _serve_page(app: FastAPI) -> None:
    # three names, so that no path of a client's is ever joined to a folder
    def serve(path: str, name: str, kind: str) -> None:
        content = (PAGE / name).read_bytes()
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind, headers=headers)

    serve("/", "page.html", "text/html")
    serve("/page.css", "page.css", "text/css")
    serve("/page.js", "page.js", "text/javascript")


def _job(body: schema.ImageRequest, previews: bool, manifest: Manifest, settings: Settings) -> Job:
    def refuse(param: str, message: str) -> None:
        raise _Refused(fault(400, f"{param}: {message}", param=param, code="invalid_value"))

    if body.model is not None and body.model != manifest.name:
        raise _Refused(_no_such_model(manifest))
    if not body.prompt.strip():
        refuse("prompt", "is empty")
    if len(body.prompt) > settings.max_prompt:
        refuse("prompt", f"has {len(body.prompt)} characters, at most {settings.max_prompt}")
    options = body.options()
    for name, largest in (
        ("num_images_per_prompt", settings.max_images),
        ("num_inference_steps", settings.max_steps),
        ("decoding_steps", max(settings.max_steps, manifest.model.num_visual_tokens)),
    ):
        if options[name] is not None and options[name] > largest:
            refuse(OPTIONS[name].api_name, f"is at most {largest} here")
    if body.size not in (None, "auto", _size(manifest)):
        refuse("size", f"must be {_size(manifest)!r}, the only one of this set, or 'auto'")
    checked = request.check(manifest, prompt=body.prompt, output_type="np", **options)
    return Job(checked, (body.output_format or "png").upper(), previews)


def _no_such_model(manifest: Manifest) -> JSONResponse:
    message = f"model: this server has {manifest.name!r}"
    return fault(404, message, param="model", code="model_not_found")


async def _finished_or_gone(job: Job, http: Request) -> None:
    """Return when the job is finished, or its client has hung up."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(job.wait()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _described(job: Job, studio: Studio) -> schema.JobResponse:
    error = None
    if job.failure:
        kind = error_type(job.failure.status)
        error = schema.Fault(message=job.failure.message, type=kind, code=job.failure.code)
    return schema.JobResponse(
        id=job.id,
        created=int(job.created),
        state=job.state,
        position=studio.position(job),
        stage=job.stage,
        step=job.step,
        steps=job.steps,
        images=[_place(job, i) for i in range(len(job.pictures))],
        parameters=job.request.parameters.as_dict(),
        seconds=job.seconds,
        warnings=job.warnings,
        error=error,
    )


def _place(job: Job, image: int) -> str:
    return f"/v1/jobs/{job.id}/images/{image}"


def _size(manifest: Manifest) -> str:
    return f"{manifest.model.image_width}x{manifest.model.image_height}"


def _about(manifest: Manifest, settings: Settings, studio: Studio) -> schema.About:
    defaults = manifest.defaults
    return schema.About(
        model=manifest.name,
        size=_size(manifest),
        decoding_steps=defaults.decoding_steps,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale if manifest.model.guidance_embeds else None,
        cfg_weight=defaults.cfg_weight,
        controlnet_conditioning_scale=defaults.controlnet_conditioning_scale,
        max_images=settings.max_images,
        max_prompt=settings.max_prompt,
        max_steps=settings.max_steps,
        no_previews=studio.no_previews,
    )
