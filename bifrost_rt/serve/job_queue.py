"""Waiting jobs and conversations, and the workers that draw and answer them. No HTTP in here.

Every worker has a thread. It takes the job that has waited longest, and with it the next ones that
share its settings, as many as a batch may hold: their images come out of one run and are those
that each would have got alone. Where a worker's engines leave for others, it takes several such
batches, so that each engine is loaded once for all of them. A conversation is answered by itself,
when nothing has waited longer.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt import notes
from bifrost_rt import request as requests
from bifrost_rt.chat import ChatResult
from bifrost_rt.errors import BifrostError, BudgetError, NumericsError, RequestError
from bifrost_rt.pipeline import TOGETHER, Output
from bifrost_rt.result import Result
from bifrost_rt.serve.jobs import Answer, Failure, Job, Stage, State
from bifrost_rt.serve.metrics import Metrics
from bifrost_rt.serve.settings import Limits
from bifrost_rt.serve.worker import Said, Worker

log = logging.getLogger("bifrost_rt.serve")
# How much the newest image counts in the estimate behind Retry-After.
NEWEST = 0.2
INTERNAL = "internal error; the server's log says more"
STOPPING = Failure("the server is shutting down; try again", 503)


class FullError(BifrostError):
    """Too many images and answers wait. `retry_after` is in whole seconds."""

    def __init__(self, images: int, answers: int, retry_after: int) -> None:
        counts = {"images": images, "answers": answers}
        waiting = " and ".join(f"{n} {name}" for name, n in counts.items() if n)
        super().__init__(f"{waiting} are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class StoppingError(BifrostError):
    """The server takes nothing new."""

    def __init__(self) -> None:
        super().__init__(STOPPING.message)


class _AccidentError(Exception):
    """A run of several batches has failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class _CancelledError(Exception):
    """Nobody wants what this run makes any more."""


class JobQueue:
    """Takes jobs, and has them drawn. Every method may be called from any thread.

    Attributes:
        no_previews: why jobs cannot be seen becoming, or None where they can.
    """

    def __init__(self, workers: Sequence[Worker], limits: Limits, metrics: Metrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self.stopping = False
        self.no_previews = next((why for p in workers if (why := p.no_previews())), None)
        if limits.preview_every is None:
            self.no_previews = "the server was started without previews"
        self._workers = workers
        self._changed = threading.Condition()
        self._waiting: list[Job | Answer] = []
        self._running: set[str] = set()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._answers: set[Answer] = set()
        self._seconds_each = 1.0  # of an image or an answer
        metrics.watch(self.waiting_images, self.waiting_answers, lambda: len(self._running))
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"worker-{i}", daemon=True)
            for i, worker in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            FullError: no room for its images.
            StoppingError: the server is shutting down.
        """
        with self._changed:
            if self.stopping:
                raise StoppingError
            self._refuse_full(job.request.images)
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify()

    def submit_answer(self, answer: Answer) -> None:
        """Put a conversation at the end of the queue, where it counts as one image.

        Raises:
            FullError: no room for it.
            StoppingError: the server is shutting down.
        """
        with self._changed:
            if self.stopping:
                raise StoppingError
            self._refuse_full(1)
            self._answers.add(answer)
            self._waiting.append(answer)
            self._changed.notify()

    def cancel_answer(self, answer: Answer) -> None:
        """End an answer; one that runs ends at its next token."""
        self._end(answer, "cancelled")

    def get(self, job_id: str) -> Job | None:
        """Return the job, as long as it is remembered."""
        return self._jobs.get(job_id)

    def position(self, job: Job) -> int | None:
        """Say how many jobs are before it; None where it does not wait."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else None

    def cancel(self, job: Job) -> None:
        """End a job. One that runs alone ends at its next step; in a batch the others go on, and
        its images are dropped."""
        self._finish(job, "cancelled")

    def forget(self, job: Job) -> None:
        """Let go of a finished job's images."""
        with self._changed:
            self._jobs.pop(job.id, None)

    def waiting_images(self) -> int:
        """Images in the queue."""
        return sum(work.request.images for work in self._waiting if isinstance(work, Job))

    def waiting_answers(self) -> int:
        """Conversations in the queue."""
        return sum(isinstance(work, Answer) for work in self._waiting)

    def stop(self) -> None:
        """Take nothing new; what waits fails, what runs is finished."""
        with self._changed:
            self.stopping = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for job in waiting:
            if isinstance(job, Job):
                self._finish(job, "failed", STOPPING)
            else:
                self._end(job, "failed", STOPPING)

    def close(self, grace: float) -> None:
        """Stop, wait for what runs, and free the workers.

        Args:
            grace: seconds after which what still runs is cancelled.
        """
        self.stop()
        until = time.monotonic() + grace
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        for job in list(self._jobs.values()):
            self.cancel(job)
        for answer in list(self._answers):
            self.cancel_answer(answer)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()

    def _refuse_full(self, more: int) -> None:
        images, answers = self.waiting_images(), self.waiting_answers()
        waiting = images + answers
        if waiting and waiting + more > self.limits.waiting:
            seconds = math.ceil(waiting * self._seconds_each / len(self._workers))
            raise FullError(images, answers, max(1, seconds))

    def _took(self, seconds_each: float) -> None:
        self._seconds_each += NEWEST * (seconds_each - self._seconds_each)

    def _work(self, worker: Worker) -> None:
        together = TOGETHER if worker.reloads() else 1
        while batches := self._next_batches(together):
            if isinstance(batches, Answer):
                self._answer(worker, batches)
                continue
            try:
                self._draw(worker, batches)
            except (BudgetError, NumericsError, _AccidentError) as error:
                if len(batches) == len(batches[0]) == 1:
                    self._refuse(batches[0][0], error)
                    continue
                # together they are too large, or one spoils the run of all; alone each is told so
                for job in itertools.chain(*batches):
                    if not job.finished:
                        self._draw_alone(worker, job)

    def _next_batches(self, together: int) -> list[list[Job]] | Answer:
        """Wait for work: a conversation, or at most so many batches, whose settings differ. Empty
        when there will be none."""
        with self._changed:
            while not self._waiting:
                if self.stopping:
                    return []
                self._changed.wait()
            if isinstance(first := self._waiting[0], Answer):
                del self._waiting[0]
                first.state = "running"
                self._running.add(first.id)
                return first
            batches: list[list[Job]] = []
            while len(batches) < together and self._waiting and isinstance(self._waiting[0], Job):
                batches.append(self._take_batch())
        for batch in batches:
            for job in batch:
                job.changed()
            self.metrics.batch(sum(job.request.images for job in batch))
        return batches

    def _take_batch(self) -> list[Job]:
        """Take the job that has waited longest, and those that can be drawn in one run with it."""
        first, *others = [work for work in self._waiting if isinstance(work, Job)]
        batch, total = [first], first.request.images
        for job in others:
            images = job.request.images
            same = job.request.settings == batch[0].request.settings
            same = same and first.arguments is None and job.arguments is None
            if same and total + images <= self.limits.batch:
                batch.append(job)
                total += images
        self._waiting = [job for job in self._waiting if job not in batch]
        for job in batch:
            job.state = "running"
            self._running.add(job.id)
        return batch

    def _answer(self, worker: Worker, answer: Answer) -> None:
        answer.changed()
        began = time.monotonic()

        def on_text(piece: str) -> None:
            if answer.finished:
                raise _CancelledError
            if piece:
                if answer.first_token is None:
                    answer.first_token = time.time()
                answer.pieces.append(piece)
                answer.changed()

        try:
            result = worker.answer(answer.turns, answer.parameters, on_text)
        except _CancelledError:
            return
        except (BudgetError, RequestError) as error:
            self._end(answer, "failed", Failure(str(error), 400, "invalid_value"))
        except BifrostError as error:
            log.error("%s", error)
            code = "not_finite" if isinstance(error, NumericsError) else None
            self._end(answer, "failed", Failure(str(error), 500, code))
        except Exception:  # a client never sees the trace, and the next one gets its chance
            log.exception("answering failed")
            self._end(answer, "failed", Failure(INTERNAL, 500))
        else:
            self._took(time.monotonic() - began)
            for name, seconds in result.timings.items():
                if name not in ("per_token", "total"):
                    self.metrics.stage(name, seconds)
            self._end(answer, "done", result=result)

    def _end(
        self,
        answer: Answer,
        state: State,
        failure: Failure | None = None,
        result: ChatResult | None = None,
    ) -> None:
        """Note the end of an answer; the first counts."""
        with self._changed:
            if answer.finished:
                return
            if answer in self._waiting:
                self._waiting.remove(answer)
            self._running.discard(answer.id)
            self._answers.discard(answer)
            answer.failure, answer.result = failure, result
            answer.state = state
        self.metrics.spoken(answer)
        answer.changed()

    def _draw_alone(self, worker: Worker, job: Job) -> None:
        try:
            self._draw(worker, [[job]])
        except (BudgetError, NumericsError, _AccidentError) as error:
            self._refuse(job, error)

    def _refuse(self, job: Job, error: BudgetError | NumericsError | _AccidentError) -> None:
        if isinstance(error, BudgetError):
            self._finish(job, "failed", Failure(str(error), 400))
        elif isinstance(error, NumericsError):
            log.error("%s", error)
            self._finish(job, "failed", Failure(str(error), 500, "not_finite"))
        else:
            self._finish(job, "failed", error.failure)

    def _draw(self, worker: Worker, batches: list[list[Job]]) -> None:
        """Draw the jobs of every batch in one run of its own, and the runs together.

        Raises:
            BudgetError: they do not fit into the memory budget.
            NumericsError: there is no image of one of them.
            _AccidentError: anything else happened to one of several batches.
        """
        jobs = list(itertools.chain(*batches))
        wanted = self.no_previews is None and any(job.previews for job in jobs)
        every = self.limits.preview_every if wanted else None
        began = time.monotonic()

        def on_step(which: int, *step: Any) -> None:
            if all(job.finished for job in jobs):
                raise _CancelledError
            self._step(batches[which], *step)

        try:
            for job in jobs:
                if job.arguments is not None and not job.finished:
                    job.request, job.arguments = worker.look(job.arguments), None
            if all(job.finished for job in jobs):
                return
            merged = [requests.merge([job.request for job in batch]) for batch in batches]
            outs = worker.paint(merged, on_step, every)
            for batch, whole, out in zip(batches, merged, outs, strict=True):
                self._deliver(batch, whole, out)
        except _CancelledError:
            return
        except (BudgetError, NumericsError):
            raise
        except RequestError as error:
            self._fail(batches, Failure(str(error), 400))
        except BifrostError as error:
            log.error("%s", error)
            self._fail(batches, Failure(str(error), 500))
        except Exception:  # a client never sees the trace, and the next job gets its chance
            log.exception("drawing failed")
            self._fail(batches, Failure(INTERNAL, 500))
        else:
            each = (time.monotonic() - began) / sum(whole.images for whole in merged)
            self._took(each)

    def _step(
        self,
        batch: list[Job],
        stage: Stage,
        step: int,
        preview: NDArray[np.uint8] | None,
        said: Said | None,
    ) -> None:
        first = 0
        for job in batch:
            others = said is not None and said[0] not in job.request.prompts
            if not job.finished and not others:
                if said is not None:
                    job.thought = said[1]
                if preview is not None and job.previews:
                    job.preview = (step, _webp(preview[first]))
                job.stage, job.step = stage, step
                job.changed()
            first += job.request.images

    def _deliver(self, batch: list[Job], merged: requests.Request, out: Output) -> None:
        assert out.images is not None
        for name, seconds in out.timings.items():
            self.metrics.stage(name, seconds)
        merged = merged.thought(out.thoughts)
        first = 0
        for job in batch:
            job.request = job.request.thought(out.thoughts)
            part = slice(first, first + job.request.images)
            first = part.stop
            if job.finished:
                continue
            job.warnings = [
                str(note) for note in notes.of_part(out.notes, merged, job.request, part)
            ]
            result = Result(
                out.images[part],
                out.tokens[part],
                out.latents[part],
                out.timings,
                job.request.parameters.seed,
                job.request.as_dict(),
                thoughts=job.request.thoughts,
            )
            files = [result.encode(i, job.file_format) for i in range(job.request.images)]
            self._finish(job, "done", files=files, seconds=out.timings)

    def _fail(self, batches: list[list[Job]], failure: Failure) -> None:
        """End the jobs of one batch. Where there are several, nobody knows whose fault it was.

        Raises:
            _AccidentError: there are several.
        """
        if len(batches) > 1:
            raise _AccidentError(failure)
        for job in batches[0]:
            self._finish(job, "failed", failure)

    def _finish(
        self,
        job: Job,
        state: State,
        failure: Failure | None = None,
        files: Sequence[bytes] = (),
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Note the end of a job; the first counts."""
        with self._changed:
            if job.finished:
                return
            if job in self._waiting:
                self._waiting.remove(job)
            self._running.discard(job.id)
            job.failure, job.preview = failure, None
            job.files, job.seconds = list(files), dict(seconds or {})
            job.state = state
            over = [known for known in self._jobs.values() if known.finished]
            for known in over[: max(0, len(over) - self.limits.keep)]:
                del self._jobs[known.id]
        self.metrics.finished(job)
        job.changed()


def _webp(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="WEBP", quality=80)
    return file.getvalue()
