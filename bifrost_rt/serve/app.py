"""The routes: OpenAI's image and chat APIs, jobs with progress, probes, figures, and the page."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from bifrost_rt import __version__, chat, chat_params, images, request, thinking, vision
from bifrost_rt.chat_params import ChatParameters
from bifrost_rt.errors import RequestError
from bifrost_rt.manifest import Manifest
from bifrost_rt.params import OPTIONS
from bifrost_rt.serve import answers, conversation, forms, schema
from bifrost_rt.serve.errors import CHAT, FORMS, RESPONSES, error_type, fault, handle
from bifrost_rt.serve.fetching import Fetcher
from bifrost_rt.serve.job_queue import JobQueue
from bifrost_rt.serve.jobs import Answer, Job, Work
from bifrost_rt.serve.metrics import MEDIA_TYPE
from bifrost_rt.serve.middleware import Gate
from bifrost_rt.serve.settings import Settings

EDITS, VARIATIONS, EDIT_JOBS, VARIATION_JOBS = FORMS
PAGE = Path(__file__).parent / "page"
# The page runs what comes from this server and shows images that it was sent; nothing else.
READERS = 2  # conversations whose images are unpacked at once
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"


class _Refused(Exception):
    """A request that was understood and cannot be served."""

    def __init__(self, answer: JSONResponse) -> None:
        self.answer = answer


def create_app(job_queue: JobQueue, manifest: Manifest, settings: Settings) -> FastAPI:
    """Create the application, which closes the queue when it is shut down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(job_queue.close, settings.grace)
        readers.shutdown(cancel_futures=True)

    readers = ThreadPoolExecutor(READERS, "reader")
    fetch = Fetcher(settings.fetch_hosts, settings.max_image_body)

    app = FastAPI(
        title="bifrost-rt",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        responses=RESPONSES,
        # what has no type is read as JSON; `middleware.py` refuses the pages that could abuse it
        strict_content_type=False,
    )
    app.add_middleware(Gate, settings=settings, metrics=job_queue.metrics)
    handle(app)

    @app.exception_handler(_Refused)
    async def refused(http: Request, error: _Refused) -> JSONResponse:
        return error.answer

    def submitted(body: schema.ImageRequest, previews: bool) -> Job:
        job = _job(body, previews, manifest, settings)
        job_queue.submit(job)
        return job

    async def known(job_id: str) -> Job:
        job = job_queue.get(job_id)
        if job is None:
            message = f"no such job; the last {job_queue.limits.keep} are remembered"
            raise _Refused(fault(404, message, code="not_found"))
        return job

    of_path = Depends(known)

    @app.post("/v1/images/generations", response_model_exclude_none=True)
    async def generations(body: schema.ImageRequest, http: Request) -> schema.ImageResponse:
        """Draw, and answer with the images. Who hangs up cancels."""
        return await images_of(submitted(body, previews=False), body, http)

    async def images_of(job: Job, body: schema.ImageRequest, http: Request) -> schema.ImageResponse:
        try:
            await _unless_gone(job.wait(), http)
        finally:
            job_queue.cancel(job)  # without effect on a finished job
        by_url = body.response_format == "url"
        if not by_url:
            job_queue.forget(job)
        _raise_failure(job, "the job was cancelled")
        base = str(http.base_url).rstrip("/")
        return schema.ImageResponse(
            created=int(job.created),
            data=[
                schema.ImageFile(url=base + _place(job, i), revised_prompt=_revised(job))
                if by_url
                else schema.ImageFile(
                    b64_json=base64.b64encode(file).decode(), revised_prompt=_revised(job)
                )
                for i, file in enumerate(job.files)
            ],
            output_format=body.output_format or "png",
            size=_size(manifest),
            seed=job.request.parameters.seed,
            warnings=job.warnings,
        )

    async def with_image(http: Request, previews: bool) -> tuple[schema.ImageRequest, Job]:
        body, files = await forms.read(http, FORMS[http.url.path], settings.max_body)

        def read() -> Job:
            wanted = previews and bool(getattr(body, "previews", False))
            return _job(body, wanted, manifest, settings, _sources(body, files, manifest))

        job = await asyncio.get_running_loop().run_in_executor(readers, read)
        job_queue.submit(job)
        return body, job

    def form(path: str, mask: bool) -> dict[str, Any]:
        return {"openapi_extra": forms.document(FORMS[path], mask)}

    @app.post(EDITS, response_model_exclude_none=True, **form(EDITS, mask=True))
    async def edits(http: Request) -> schema.ImageResponse:
        """Draw a part of an image anew, and answer with the images. Who hangs up cancels."""
        body, job = await with_image(http, previews=False)
        return await images_of(job, body, http)

    @app.post(VARIATIONS, response_model_exclude_none=True, **form(VARIATIONS, mask=False))
    async def variations(http: Request) -> schema.ImageResponse:
        """Draw an image again, and answer with the images. Who hangs up cancels."""
        body, job = await with_image(http, previews=False)
        return await images_of(job, body, http)

    async def started(http: Request, answer: Response) -> schema.JobResponse:
        _, job = await with_image(http, previews=True)
        answer.headers["Location"] = f"/v1/jobs/{job.id}"
        return _described(job, job_queue)

    @app.post(EDIT_JOBS, status_code=202, **form(EDIT_JOBS, mask=True))
    async def start_edit(http: Request, answer: Response) -> schema.JobResponse:
        """Draw a part of an image anew, and answer at once."""
        return await started(http, answer)

    @app.post(VARIATION_JOBS, status_code=202, **form(VARIATION_JOBS, mask=False))
    async def start_variation(http: Request, answer: Response) -> schema.JobResponse:
        """Draw an image again, and answer at once."""
        return await started(http, answer)

    @app.post(CHAT, response_model=schema.ChatCompletion)
    async def completions(body: schema.ChatRequest, http: Request) -> Response:
        """Answer a conversation in words, whole or as a stream. Who hangs up cancels."""

        def read() -> Answer:
            return _answer(body, manifest, settings, fetch)

        answer = await asyncio.get_running_loop().run_in_executor(readers, read)
        job_queue.submit_answer(answer)
        streamed = False
        try:
            await _unless_gone(answer.begun() if body.stream else answer.wait(), http)
            _raise_failure(answer, answers.CANCELLED.message)
            if body.stream:
                asked = body.stream_options or schema.StreamOptions()
                events = answers.stream(answer, manifest.name, asked.include_usage)
                streamed = True
                return _Stream(events, lambda: job_queue.cancel_answer(answer))
            if answer.result is None:  # its client has hung up
                message = answers.CANCELLED.message
                raise _Refused(fault(499, message, code=answers.CANCELLED.code))
            return JSONResponse(answers.whole(answer, manifest.name).model_dump())
        finally:
            if not streamed:
                job_queue.cancel_answer(answer)  # without effect on a finished one

    @app.post("/v1/jobs", status_code=202)
    async def start(body: schema.JobRequest, answer: Response) -> schema.JobResponse:
        """Draw, and answer at once."""
        job = submitted(body, body.previews or False)
        answer.headers["Location"] = f"/v1/jobs/{job.id}"
        return _described(job, job_queue)

    @app.get("/v1/jobs/{job_id}")
    async def state(job: Job = of_path) -> schema.JobResponse:
        """Say how far a job is."""
        return _described(job, job_queue)

    @app.delete("/v1/jobs/{job_id}")
    async def cancel(job: Job = of_path) -> schema.JobResponse:
        """End a job. Without effect on a finished one."""
        job_queue.cancel(job)
        return _described(job, job_queue)

    @app.get("/v1/jobs/{job_id}/events", response_class=EventSourceResponse)
    async def events(job: Job = of_path) -> AsyncIterator[ServerSentEvent]:
        """Stream a job as it changes: `progress` and `preview`, and at last its state's own
        name."""
        shown = None
        async for _ in job.watch():
            preview = job.preview
            if preview is not None and preview != shown:
                shown = preview
                data = {"step": preview[0], "webp": base64.b64encode(preview[1]).decode()}
                yield ServerSentEvent(event="preview", data=data)
            name = job.state if job.finished else "progress"
            yield ServerSentEvent(event=name, data=_described(job, job_queue))

    @app.get("/v1/jobs/{job_id}/images/{image}", response_class=Response)
    async def image_file(image: int, job: Job = of_path) -> Response:
        """One image's file."""
        if not 0 <= image < len(job.files):
            raise _Refused(fault(404, "no such image, or not yet", code="not_found"))
        media = f"image/{job.file_format.lower()}"
        return Response(job.files[image], media_type=media)

    @app.get("/v1/models")
    async def models() -> schema.ModelList:
        """Return the set that is served."""
        return schema.ModelList(data=[schema.Model(id=manifest.name)])

    @app.get("/v1/models/{model}")
    async def one_model(model: str) -> schema.Model:
        """Return the set that is served, by its name."""
        if model != manifest.name:
            raise _Refused(_no_such_model(manifest))
        return schema.Model(id=manifest.name)

    @app.get("/v1/about")
    async def about() -> schema.About:
        """Sizes, defaults and limits."""
        return _about(manifest, settings, job_queue)

    @app.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        """Answer that the process lives."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz", response_class=Response)
    async def readyz() -> Response:
        """Say whether it takes requests."""
        if job_queue.stopping:
            return Response("stopping\n", 503, media_type="text/plain")
        return Response("ready\n", media_type="text/plain")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(job_queue.metrics.text(), media_type=MEDIA_TYPE)

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


def _sources(
    body: schema.ImageRequest, files: Mapping[str, bytes], manifest: Manifest
) -> dict[str, bytes]:
    """Check the files of a form, and return the arguments of `Generator.run` that they are. What
    waits is the files, which are smaller than their pixels."""
    edits = isinstance(body, schema.EditRequest)
    param = "image"
    try:
        vision.facts(manifest)
        images.read(files["image"], "image")
        param = forms.MASK
        if not edits and param in files:
            raise RequestError("mask: a variation has none; /v1/images/edits takes one")
        if edits and param not in files:
            if not images.transparent(files["image"]):
                raise RequestError(
                    "mask: is missing, and the image has no transparent places",
                    hint="/v1/images/variations draws all of it again",
                )
            return {**files, param: files["image"]}
        if edits:
            images.painted(files[param])
        elif body.prompt is None:
            param = "prompt"
            chat.facts(manifest)
    except RequestError as error:
        raise _Refused(fault(400, str(error), param=param, code="invalid_value")) from None
    return dict(files)


def _job(
    body: schema.ImageRequest,
    previews: bool,
    manifest: Manifest,
    settings: Settings,
    sources: Mapping[str, bytes] | None = None,
) -> Job:
    """Return what is asked for, checked. `sources` are arguments of `Generator.run` that are
    images."""

    def refuse(param: str, message: str) -> None:
        raise _Refused(fault(400, f"{param}: {message}", param=param, code="invalid_value"))

    if body.model is not None and body.model != manifest.name:
        raise _Refused(_no_such_model(manifest))
    prompt: str | None = body.prompt  # a variation may have none
    if prompt is not None and not prompt.strip():
        refuse("prompt", "is empty")
    if prompt is not None and len(prompt) > settings.max_prompt:
        refuse("prompt", f"has {len(prompt)} characters, at most {settings.max_prompt}")
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
    if isinstance(body.think, str) and len(body.think) > settings.max_prompt:
        refuse("think", f"has {len(body.think)} characters, at most {settings.max_prompt}")
    try:
        think = thinking.instruction(manifest, body.think)
    except RequestError as error:
        raise _Refused(fault(400, str(error), param="think", code="invalid_value")) from None
    if prompt is None and think is not None:
        refuse("think", "needs a prompt to think of")
    # an image is looked at where there are engines; until then nothing of it is masked
    masked = None if sources is None else np.zeros(manifest.model.num_visual_tokens, bool)
    checked = request.check(
        manifest, prompt=prompt or "", output_type="np", think=think, masked=masked, **options
    )
    job = Job(checked, (body.output_format or "png").upper(), previews)
    if sources is not None:
        asked = {"prompt": prompt, "output_type": "np", "think": body.think, **options}
        job.arguments = {**asked, "seed": checked.parameters.seed, **sources}
    return job


def _answer(
    body: schema.ChatRequest, manifest: Manifest, settings: Settings, fetch: Fetcher
) -> Answer:
    """Return what is asked for, checked, with its images."""
    if body.model is not None and body.model != manifest.name:
        raise _Refused(_no_such_model(manifest))
    chat.facts(manifest)
    given = body.options()
    try:
        asked = ChatParameters.fill(given)
    except RequestError as error:
        param = next((n for n in chat_params.OPTIONS if error.message.startswith(n)), None)
        raise _Refused(fault(400, str(error), param=param, code="invalid_value")) from None
    try:
        turns = conversation.read(body.messages, manifest, fetch, settings.max_images)
    except RequestError as error:
        raise _Refused(fault(400, str(error), param="messages", code="invalid_value")) from None
    return Answer(turns, asked, warnings=asked.without_effect(given))


def _raise_failure(work: Work, cancelled: str) -> None:
    if work.failure:
        failure = work.failure
        raise _Refused(fault(failure.status, failure.message, code=failure.code))
    if work.state == "cancelled":
        raise _Refused(fault(499, cancelled, code="cancelled"))


class _Stream(StreamingResponse):
    """An answer as it comes. However this ends, before its first event or at its last, so does what
    makes it."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def _no_such_model(manifest: Manifest) -> JSONResponse:
    message = f"model: this server has {manifest.name!r}"
    return fault(404, message, param="model", code="model_not_found")


async def _unless_gone(wait: Coroutine[Any, Any, None], http: Request) -> None:
    """Return when it has come to what is waited for, or its client has hung up."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(wait), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _described(job: Job, job_queue: JobQueue) -> schema.JobResponse:
    error = None
    if job.failure:
        kind = error_type(job.failure.status)
        error = schema.Fault(message=job.failure.message, type=kind, code=job.failure.code)
    return schema.JobResponse(
        id=job.id,
        created=int(job.created),
        state=job.state,
        position=job_queue.position(job),
        stage=job.stage,
        step=job.step,
        steps=job.steps,
        thought=_revised(job) or job.thought,
        images=[_place(job, i) for i in range(len(job.files))],
        parameters=job.request.parameters.as_dict(),
        seconds=job.seconds,
        warnings=job.warnings,
        error=error,
    )


def _revised(job: Job) -> str | None:
    """Return what the MLLM thought of a job's prompt, and what is drawn then."""
    return job.request.thoughts[0].text if job.request.thoughts else None


def _place(job: Job, image: int) -> str:
    return f"/v1/jobs/{job.id}/images/{image}"


def _size(manifest: Manifest) -> str:
    return f"{manifest.model.image_width}x{manifest.model.image_height}"


def _why_not(facts: Callable[[Manifest], Any], manifest: Manifest) -> str | None:
    try:
        facts(manifest)
    except RequestError as error:
        return error.message
    return None


def _about(manifest: Manifest, settings: Settings, job_queue: JobQueue) -> schema.About:
    defaults = manifest.defaults
    return schema.About(
        model=manifest.name,
        size=_size(manifest),
        grid=math.isqrt(manifest.model.num_visual_tokens),
        decoding_steps=defaults.decoding_steps,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale if manifest.model.guidance_embeds else None,
        cfg_weight=defaults.cfg_weight,
        controlnet_conditioning_scale=defaults.controlnet_conditioning_scale,
        max_images=settings.max_images,
        max_prompt=settings.max_prompt,
        max_steps=settings.max_steps,
        no_previews=job_queue.no_previews,
        no_chat=_why_not(chat.facts, manifest),
        no_vision=_why_not(vision.facts, manifest),
    )
