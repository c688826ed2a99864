"""What Prometheus is told."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    generate_latest,
)

from bifrost_rt.serve.jobs import Answer, Job

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
_IMAGES = (1, 2, 4, 8, 16)


class Metrics:
    """One server's figures, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "bifrost_requests",
            "HTTP answers",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._jobs = Counter("bifrost_jobs", "Ended jobs", ["state"], registry=self._registry)
        self._images = Counter("bifrost_images", "Images drawn", registry=self._registry)
        self._job_seconds = Histogram(
            "bifrost_job_seconds",
            "From a request to its images, waiting included",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batch = Histogram(
            "bifrost_batch_images", "Images per run", buckets=_IMAGES, registry=self._registry
        )
        self._stages = Summary(
            "bifrost_stage_seconds",
            "Seconds of an engine, or of a part of an answer, per run",
            ["stage"],
            registry=self._registry,
        )
        self._answers = Counter(
            "bifrost_answers", "Ended answers", ["state"], registry=self._registry
        )
        self._prompt_tokens = Counter(
            "bifrost_prompt_tokens", "Tokens of conversations", registry=self._registry
        )
        self._cached_tokens = Counter(
            "bifrost_cached_prompt_tokens",
            "Of these, those that were not read again",
            registry=self._registry,
        )
        self._completion_tokens = Counter(
            "bifrost_completion_tokens", "Tokens of answers", registry=self._registry
        )
        self._first_token = Histogram(
            "bifrost_first_token_seconds",
            "From a request to the first token of its answer, waiting included",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._waiting = Gauge(
            "bifrost_waiting_images", "Images in the queue", registry=self._registry
        )
        self._waiting_answers = Gauge(
            "bifrost_waiting_answers", "Conversations in the queue", registry=self._registry
        )
        self._running = Gauge(
            "bifrost_running_jobs", "Jobs being drawn or answered", registry=self._registry
        )

    def watch(
        self, images: Callable[[], int], answers: Callable[[], int], running: Callable[[], int]
    ) -> None:
        """Read these numbers whenever the figures are asked for."""
        self._waiting.set_function(images)
        self._waiting_answers.set_function(answers)
        self._running.set_function(running)

    def answered(self, method: str, route: str, status: int) -> None:
        """One HTTP answer; `route` is the pattern, so that clients cannot make new series."""
        self._requests.labels(method, route, str(status)).inc()

    def batch(self, images: int) -> None:
        """Note that a run begins."""
        self._batch.observe(images)

    def stage(self, name: str, seconds: float) -> None:
        """Note an engine's share of a run."""
        self._stages.labels(name).observe(seconds)

    def finished(self, job: Job) -> None:
        """Note that a job ended."""
        self._jobs.labels(job.state).inc()
        if job.state == "done":
            self._images.inc(job.request.images)
            self._job_seconds.observe(time.time() - job.created)

    def spoken(self, answer: Answer) -> None:
        """Note that an answer ended."""
        self._answers.labels(answer.state).inc()
        if answer.first_token is not None:
            self._first_token.observe(answer.first_token - answer.created)
        if answer.result is not None:
            usage = answer.result.usage
            self._prompt_tokens.inc(usage.prompt_tokens)
            self._cached_tokens.inc(usage.cached_tokens)
            self._completion_tokens.inc(usage.completion_tokens)

    def text(self) -> bytes:
        """Everything, in Prometheus' format."""
        return generate_latest(self._registry)
