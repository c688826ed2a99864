"""The queue without HTTP: what is drawn together, in which order, and what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bifrost_rt import (
    BudgetError,
    EngineSetError,
    Generator,
    NumericsError,
    dims,
    manifest,
    memory_plan,
    request,
)
from bifrost_rt import messages as conversation
from bifrost_rt.backends.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from bifrost_rt.chat import ChatResult, OnText
from bifrost_rt.chat_params import ChatParameters
from bifrost_rt.manifest import EngineSpec, Range
from bifrost_rt.messages import Turn
from bifrost_rt.pipeline import Output
from bifrost_rt.serve.job_queue import FullError, JobQueue, StoppingError
from bifrost_rt.serve.jobs import Answer, Job
from bifrost_rt.serve.metrics import Metrics
from bifrost_rt.serve.settings import Limits
from bifrost_rt.serve.worker import Local, OnStep
from tests.patience import until
from tests.serve.conftest import FEW, pixels


class Watched(Local):
    """The real worker; it waits for `go`, notes what it is asked, and raises what it is told."""

    def __init__(self, generator: Generator) -> None:
        super().__init__(generator)
        self.go = threading.Event()
        self.asked: list[request.Request] = []  # in all calls
        self.together: list[int] = []  # requests in each call
        self.order: list[Any] = []  # requests and turns, as they were taken
        self.tokens = 0  # of all answers
        self.raises: Callable[[request.Request], Exception | None] = lambda _: None

    def paint(
        self, requests: Sequence[request.Request], on_step: OnStep, preview_every: int | None
    ) -> list[Output]:
        self.go.wait()
        self.asked += requests
        self.together.append(len(requests))
        self.order += requests
        if error := next(filter(None, map(self.raises, requests)), None):
            raise error
        return super().paint(requests, on_step, preview_every)

    def answer(
        self, turns: Sequence[Turn], parameters: ChatParameters, on_text: OnText
    ) -> ChatResult:
        self.go.wait()

        def heard(piece: str) -> None:
            self.tokens += 1
            on_text(piece)

        self.order.append(turns)
        return super().answer(turns, parameters, heard)

    def close(self) -> None:
        """The generator is the session's."""


@pytest.fixture
def worker(generator: Generator) -> Watched:
    return Watched(generator)


@pytest.fixture
def job_queue(worker: Watched) -> Iterator[JobQueue]:
    opened = JobQueue([worker], Limits(batch=4, waiting=6, keep=8), Metrics())
    yield opened
    worker.go.set()
    opened.close(grace=30)


@pytest.fixture
def job(generator: Generator) -> Callable[..., Job]:
    def make(prompt: str = "a cow", seed: int = 0, n: int = 1, **changes: Any) -> Job:
        given = {**FEW, "output_type": "np", **changes}
        checked = request.check(
            generator.manifest, prompt=prompt, seed=seed, num_images_per_prompt=n, **given
        )
        return Job(checked)

    return make


def question(words: str = "hello", tokens: int = 2) -> Answer:
    turns = conversation.read([{"role": "user", "content": words}])
    asked = ChatParameters.fill({"max_new_tokens": tokens, "temperature": 0.0})
    return Answer(turns, asked)


def finished(*jobs: Job | Answer) -> list[str]:
    until(lambda: all(job.finished for job in jobs))
    return [job.state for job in jobs]


def test_waiting_jobs_are_drawn_together_and_get_their_own_images(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job], generator: Generator
) -> None:
    first = job("first")
    job_queue.submit(first)  # the worker has it, and waits
    while first.state == "queued":
        time.sleep(0.005)
    jobs = [
        job("a cow", seed=1),
        job("a dog", seed=2, n=2),
        job("other", seed=3, num_inference_steps=2),
        job("a photo of four purple suitcases below a tiny white refrigerator", seed=1),
        job("no room in that batch", seed=4),
    ]
    for one in jobs:
        job_queue.submit(one)
    assert [job_queue.position(one) for one in jobs] == [0, 1, 2, 3, 4]
    worker.go.set()
    assert finished(first, *jobs) == ["done"] * 6
    assert [asked.images for asked in worker.asked] == [1, 4, 1, 1]
    for one in jobs:
        expected = generator.draw(one.request).images
        assert expected is not None
        found = np.stack([pixels(file) for file in one.files])
        # another batch size rounds differently in float32, so a value between two may fall apart
        assert int(np.abs(found.astype(int) - expected).max()) <= 1


def test_a_batch_ends_when_nobody_wants_it(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job]
) -> None:
    first = job("first")
    long = {"num_inference_steps": 2000, "decoding_steps": 1}
    batch = [job("a", **long), job("b", **long)]
    for one in (first, *batch):
        job_queue.submit(one)
    worker.go.set()
    finished(first)
    while batch[0].step < 3:
        time.sleep(0.005)
    job_queue.cancel(batch[0])
    assert batch[0].state == "cancelled"
    step = batch[1].step
    while batch[1].step < step + 3:  # the other goes on
        time.sleep(0.005)
    job_queue.cancel(batch[1])
    after = job("after")
    job_queue.submit(after)
    assert finished(after) == ["done"]
    assert batch[1].step < 2000
    assert not batch[0].files


def test_answers_and_drawings_take_turns(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job], generator: Generator
) -> None:
    first = job("first")
    job_queue.submit(first)
    while first.state == "queued":
        time.sleep(0.005)
    early, late = job("a", seed=1), job("b", num_inference_steps=2)
    answers = [question("one"), question("two")]
    job_queue.submit(early)
    job_queue.submit_answer(answers[0])
    job_queue.submit(late)
    job_queue.submit_answer(answers[1])
    assert (job_queue.waiting_images(), job_queue.waiting_answers()) == (2, 2)
    worker.go.set()
    assert finished(first, early, late, *answers) == ["done"] * 5
    expected = [first.request, early.request, answers[0].turns, late.request, answers[1].turns]
    assert len(worker.order) == 5
    for found, one in zip(worker.order, expected, strict=True):
        prompts = getattr(one, "prompts", None)
        assert getattr(found, "prompts", None) == prompts if prompts else found is one
    assert answers[0].result is not None
    assert "".join(answers[0].pieces) == answers[0].result.text
    told = generator.answer(answers[0].turns, answers[0].parameters, lambda piece: None)
    assert told.text == answers[0].result.text


def test_an_answer_ends_when_nobody_wants_it(job_queue: JobQueue, worker: Watched) -> None:
    worker.go.set()
    long, waits = question(tokens=4000), question()
    job_queue.submit_answer(long)
    until(lambda: long.pieces)
    job_queue.submit_answer(waits)
    job_queue.cancel_answer(long)
    assert finished(waits) == ["done"]
    assert long.state == "cancelled"
    assert worker.tokens < 3000


def test_a_queue_full_of_answers_and_grace(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job]
) -> None:
    running = question(tokens=4000)
    job_queue.submit_answer(running)
    while running.state == "queued":
        time.sleep(0.005)
    waiting = [question() for _ in range(4)]
    for one in waiting:
        job_queue.submit_answer(one)
    job_queue.submit(job(n=2))
    with pytest.raises(FullError, match="2 images and 4 answers are waiting"):
        job_queue.submit_answer(question())
    job_queue.cancel_answer(waiting[0])
    job_queue.submit_answer(question())
    worker.go.set()
    until(lambda: running.pieces)
    job_queue.close(grace=0)
    assert running.state == "cancelled"
    assert finished(*waiting) == ["cancelled", "failed", "failed", "failed"]
    assert waiting[1].failure is not None
    assert waiting[1].failure.status == 503
    with pytest.raises(StoppingError):
        job_queue.submit_answer(question())


def test_grace_has_an_end(job_queue: JobQueue, worker: Watched, job: Callable[..., Job]) -> None:
    worker.go.set()
    long = job(num_inference_steps=2000, decoding_steps=1)
    job_queue.submit(long)
    until(lambda: long.step >= 3)
    job_queue.close(grace=0)
    assert long.state == "cancelled"
    assert long.step < 2000


def test_a_full_queue_and_a_stopped_one(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job]
) -> None:
    running = job()
    job_queue.submit(running)
    while running.state == "queued":
        time.sleep(0.005)
    waiting = [job(n=3), job(n=3)]
    for one in waiting:
        job_queue.submit(one)
    with pytest.raises(FullError, match="6 images are waiting") as raised:
        job_queue.submit(job())
    assert raised.value.retry_after >= 1
    job_queue.cancel(waiting[0])
    job_queue.submit(job())
    job_queue.stop()
    with pytest.raises(StoppingError):
        job_queue.submit(job())
    worker.go.set()
    assert finished(running, waiting[1]) == ["done", "failed"]
    assert waiting[1].failure is not None
    assert waiting[1].failure.status == 503


def test_what_does_not_fit_together_is_drawn_alone(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job]
) -> None:
    worker.raises = lambda asked: BudgetError("too large") if asked.images > 1 else None
    jobs = [job(seed=1), job(seed=2), job(seed=3), job(seed=4, n=2)]
    for one in jobs:
        job_queue.submit(one)
    worker.go.set()
    assert finished(*jobs) == ["done", "done", "done", "failed"]
    assert jobs[3].failure is not None
    assert (jobs[3].failure.status, jobs[3].failure.message) == (400, "too large")


def test_one_whose_values_overflow_takes_no_other_with_it(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    def overflow(asked: request.Request) -> Exception | None:
        bad = "bad" in asked.prompts
        return NumericsError("engine `t5_text`: prompt_embeds are not finite") if bad else None

    worker.raises = overflow
    first, jobs = job("first"), [job("good"), job("bad"), job("fine")]
    for one in (first, *jobs):
        job_queue.submit(one)
    worker.go.set()
    assert finished(first, *jobs) == ["done", "done", "failed", "done"]
    failure = jobs[1].failure
    assert failure is not None
    assert (failure.status, failure.code) == (500, "not_finite")
    assert failure.message.startswith("engine `t5_text`")
    assert "prompt_embeds are not finite" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_set_that_changed_is_said_to_the_client_and_the_log(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    worker.raises = lambda _: EngineSetError("denoise.data: the set changed after it was opened")
    one = job()
    job_queue.submit(one)
    worker.go.set()
    assert finished(one) == ["failed"]
    assert one.failure is not None
    assert (one.failure.status, one.failure.code) == (500, None)
    assert "the set changed" in one.failure.message
    assert "the set changed" in caplog.text


def test_an_accident_fails_one_batch_and_says_nothing_of_itself(
    job_queue: JobQueue, worker: Watched, job: Callable[..., Job], caplog: pytest.LogCaptureFixture
) -> None:
    accident = ZeroDivisionError("secret")
    worker.raises = lambda asked: accident if asked.prompts == ("bad",) else None
    bad, good = job("bad"), job("good", num_inference_steps=2)
    for one in (bad, good):
        job_queue.submit(one)
    worker.go.set()
    assert finished(bad, good) == ["failed", "done"]
    assert bad.failure is not None
    assert "secret" not in bad.failure.message
    assert "ZeroDivisionError: secret" in caplog.text


class Opened(OnnxRuntime):
    """onnxruntime, with a record of every engine that is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OnnxRuntimeEngine:
        self.names.append(spec.name)
        return super().open(folder, spec, dimensions)


@pytest.fixture
def scarce(alpha_set: Path) -> Iterator[tuple[JobQueue, Watched, Opened]]:
    """A queue whose worker has half of the memory that the open engines hold."""
    backend = Opened()
    facts = manifest.read(alpha_set)
    order = dims.drawing(facts.engines)
    needs = memory_plan.needs(facts, order, memory_plan.sizes(facts), backend.weights_in_memory)
    budget = sum(need.resident for need in needs) // 2
    with Generator(alpha_set, backend=backend, memory_budget=budget) as generator:
        worker = Watched(generator)
        job_queue = JobQueue([worker], Limits(batch=2, waiting=20, keep=20), Metrics())
        yield job_queue, worker, backend
        worker.go.set()
        job_queue.close(grace=30)


def various(job: Callable[..., Job]) -> list[Job]:
    """Eight jobs; the first two alone share their settings."""
    same = [job("a cow", seed=1), job("a dog", seed=2)]
    return [*same, *(job("a cow", seed=i, num_inference_steps=i) for i in range(3, 9))]


def test_where_engines_leave_a_queue_is_drawn_together(
    scarce: tuple[JobQueue, Watched, Opened], generator: Generator, job: Callable[..., Job]
) -> None:
    job_queue, worker, backend = scarce
    first, waiting = job("first", num_inference_steps=2), various(job)
    job_queue.submit(first)
    until(lambda: first.state == "running")
    for one in waiting:
        job_queue.submit(one)
    worker.go.set()
    assert set(finished(first, *waiting)) == {"done"}
    assert worker.together == [1, 7]
    # of the two runs, none opened an engine twice
    assert max(backend.names.count(name) for name in backend.names) <= 2
    for one in waiting:
        alone = generator.draw(one.request).images
        assert alone is not None
        apart = np.abs(pixels(one.files[0]).astype(int) - alone[0]).max()
        assert apart <= (1 if one in waiting[:2] else 0)  # a batch of two rounds differently
        assert one.step == one.request.parameters.num_inference_steps


def test_an_accident_in_a_joint_run_takes_no_other_job_with_it(
    scarce: tuple[JobQueue, Watched, Opened], job: Callable[..., Job]
) -> None:
    job_queue, worker, _ = scarce
    first, waiting = job("first", num_inference_steps=2), various(job)
    waiting.append(job("bad", num_inference_steps=9))
    worker.raises = lambda asked: ZeroDivisionError() if asked.prompts == ("bad",) else None
    for one in (first, *waiting):
        job_queue.submit(one)
        until(lambda: first.state == "running")
    worker.go.set()
    assert finished(first, *waiting) == [*["done"] * 9, "failed"]
    assert worker.together[:2] == [1, 8]
    failure = waiting[-1].failure
    assert failure is not None
    assert failure.status == 500


def test_a_job_of_a_joint_run_that_nobody_wants_is_dropped(
    scarce: tuple[JobQueue, Watched, Opened], job: Callable[..., Job]
) -> None:
    job_queue, worker, _ = scarce
    first, waiting = job("first", num_inference_steps=2), various(job)
    for one in (first, *waiting):
        job_queue.submit(one)
        until(lambda: first.state == "running")
    worker.go.set()
    until(lambda: worker.together == [1, 7])
    job_queue.cancel(waiting[3])
    states = finished(first, *waiting)
    assert states[4] == "cancelled"
    assert {*states[:4], *states[5:]} == {"done"}
