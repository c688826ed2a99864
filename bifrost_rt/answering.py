"""The MLLM's answer to a conversation: the prompt in pieces, then token by token.

A step is one call on memory that was bound beforehand; the engine itself chooses the token and
hands it to the next step. Where steps are only queued, as on a GPU, several are, before their
tokens are read.

The keys and values of the last conversation stay. What the next one begins with in common, the same
ids and the same images, is not computed again.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import dims, memory_plan, text_inputs
from bifrost_rt.backends.base import Buffer
from bifrost_rt.engines import Engines, Loop
from bifrost_rt.errors import RequestError
from bifrost_rt.manifest import SetSpec
from bifrost_rt.text_inputs import NAME, Arrays

LEAST_CACHE, LEAST_ANSWER = 256, 64  # sizes of buffers are powers of two from these
LEAST_ROWS = 32  # of a prompt, for compiled engines
QUEUED = 8  # steps before their tokens are read, where a device works through a queue
# Random numbers stay below 1 after they are multiplied in float32.
BELOW_ONE = np.float32(1 - 2**-20)

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, with the names and the order of transformers.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: 0 takes all.
        top_p: 1 takes all.
        seed: of the random numbers; equal seeds give equal answers on one backend.

    Raises:
        RequestError: a value that cannot be served.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("temperature", 0 <= self.temperature <= 100, "a number from 0 to 100"),
            ("top_k", 0 <= self.top_k <= dims.CANDIDATES, f"0 to {dims.CANDIDATES}, 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
        ):
            if not good:  # nor is NaN
                raise RequestError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Conversation:
    """A prompt of S tokens, of which I are an image's.

    Attributes:
        ids: int64 [S], in the chat template, with one placeholder for every image token.
        positions: int64 [3, S], of M-RoPE: time, height, width.
        image_tokens: float32 [I, D], of all images one behind the other.
        image_places: int64 [I], the rows that they take the places of, rising.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    image_tokens: NDArray[np.float32] | None = None
    image_places: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        images = 0 if self.image_tokens is None else len(self.image_tokens)
        if images != len(self.image_places):
            raise ValueError(f"{images} image tokens for {len(self.image_places)} places")
        if self.positions.shape != (3, len(self.ids)):
            raise ValueError(f"positions {self.positions.shape} for {len(self.ids)} ids")


@dataclass
class _Kept:
    """A cache, and what its rows were computed from.

    Attributes:
        buffers: input of the engine -> keys or values of its layer, [1, kv_heads, C, head_dim].
        other: what the engine writes, the same buffers where it works in place.
        capacity: C.
        ids, positions, images: of the rows that are there; of images a hash of the token, else 0.
    """

    buffers: dict[str, Buffer]
    other: dict[str, Buffer]
    capacity: int
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    images: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        held = {id(b): b for b in (*self.buffers.values(), *self.other.values())}.values()
        return sum(math.prod(buffer.shape) * buffer.dtype.itemsize for buffer in held)

    def common(self, asked: Conversation, images: NDArray[np.int64]) -> int:
        """Say how many rows a conversation begins with that are here; never all of it, because its
        last row gives the first token."""
        most = min(len(self.ids), len(asked.ids) - 1)
        same = (
            (self.ids[:most] == asked.ids[:most])
            & (self.images[:most] == images[:most])
            & (self.positions[:, :most] == asked.positions[:, :most]).all(0)
        )
        return most if same.all() else int(np.argmin(same))


class Answering:
    """Answers with a set's engine, one at a time.

    Args:
        reuse: whether the last conversation's keys and values stay for the next one.
    """

    def __init__(self, engines: Engines, manifest: SetSpec, *, reuse: bool = True) -> None:
        self._engines, self._manifest, self._reuse = engines, manifest, reuse
        self._kept: _Kept | None = None

    @property
    def context(self) -> int:
        """Tokens of the longest conversation, its answer among them."""
        most = self._manifest.dimensions[dims.CACHE_TOKENS].max
        assert most is not None
        return most

    def sizes(self, prompt_tokens: int, max_new_tokens: int) -> memory_plan.Sizes:
        """Return what a conversation makes of the symbols of the engine's inputs and outputs."""
        new = min(prompt_tokens, self._chunk)
        capacity, steps = self._capacity(prompt_tokens, max_new_tokens)
        found = dims.of_run(
            text_tokens=prompt_tokens,
            steps=1,
            new_tokens=new,
            cache_tokens=capacity,
            image_tokens=new,
            answer_tokens=_bucket(steps, LEAST_ANSWER, self.context),
        )
        return lambda engine: found

    def answer(
        self,
        asked: Conversation,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        timings: dict[str, float],
        on_piece: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Begin to answer; tokens are computed as they are taken from what this returns. The engine
        is free again when it has ended or was closed.

        Args:
            stop_ids: tokens that end the answer and are not part of it.
            timings: gets the seconds of the engine, and of them those of `prefill` and `decode`.
            on_piece: called between two pieces of a long prompt. What it raises ends the answer;
                the pieces that were read stay for the next conversation.

        Raises:
            RequestError: the conversation leaves no room for an answer.
        """
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.check(len(asked.ids))
        stops = frozenset(stop_ids)
        return Answer(self, asked, sampling, max_new_tokens, stops, timings, on_piece)

    def check(self, tokens: int) -> None:
        """Refuse a conversation of so many tokens where there is no room for an answer.

        Raises:
            RequestError: it is empty or too long.
        """
        if not tokens:
            raise RequestError("the conversation is empty")
        if tokens >= self.context:
            raise RequestError(
                f"the conversation has {tokens} tokens, its answer's not counted; it may have "
                f"{self.context - 1}",
                hint="leave out old turns, or give smaller images",
            )

    def forget(self) -> None:
        """Give up the memory of the last conversation."""
        self._kept = None
        self._engines.keep_beside(0, self.forget)

    @property
    def _chunk(self) -> int:
        most = self._manifest.dimensions[dims.NEW_TOKENS].max
        assert most is not None
        return most

    def _capacity(self, prompt_tokens: int, max_new_tokens: int) -> tuple[int, int]:
        """Rows of the cache, and steps that there is room for."""
        steps = min(max_new_tokens, self.context - prompt_tokens)
        return _bucket(prompt_tokens + steps, LEAST_CACHE, self.context), steps

    def _cache(self, asked: Conversation, images: NDArray[np.int64], capacity: int) -> _Kept:
        """Return a cache of at least that capacity, whose rows are those that the conversation
        begins with."""
        kept, self._kept = self._kept, None
        self._engines.keep_beside(0, self.forget)  # it is among the engine's tensors meanwhile
        common = 0 if kept is None else kept.common(asked, images)
        if kept is None or kept.capacity < capacity:
            kept = self._larger(kept if common else None, common, capacity)
        kept.ids, kept.images = kept.ids[:common], kept.images[:common]
        kept.positions = kept.positions[:, :common]
        return kept

    def _larger(self, kept: _Kept | None, rows: int, capacity: int) -> _Kept:
        backend = self._engines.backend

        def uploaded(arrays: Arrays) -> dict[str, Buffer]:
            made = {name: backend.empty(array.shape, array.dtype) for name, array in arrays.items()}
            for name, array in arrays.items():
                backend.write(made[name], array)
            return made

        arrays = text_inputs.empty_cache(self._engines.spec(NAME), capacity)
        other = None if backend.writes_in_place else uploaded(arrays)
        if kept is not None:
            for name, array in arrays.items():
                array[:, :, :rows] = backend.download(kept.buffers[name])[:, :, :rows]
        buffers = uploaded(arrays)
        none = np.zeros(0, np.int64)
        ids, positions, images = none, np.zeros((3, 0), np.int64), none
        if kept is not None:
            ids, positions, images = kept.ids, kept.positions, kept.images
        return _Kept(buffers, other or buffers, capacity, ids, positions, images)

    def _keep(self, cache: _Kept) -> None:
        if self._reuse:
            self._kept = cache
            self._engines.keep_beside(cache.nbytes, self.forget)


class Answer(Iterator[int]):
    """The tokens of an answer, as they are computed.

    Attributes:
        finish_reason: "stop" at a stop token, "length" at the limit or the end of the context; None
            before.
        cached_tokens: of the prompt, those whose keys and values were there already.
    """

    def __init__(
        self,
        owner: Answering,
        asked: Conversation,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        timings: dict[str, float],
        on_piece: Callable[[], None],
    ) -> None:
        self._on_piece = on_piece
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self._owner, self._asked, self._sampling = owner, asked, sampling
        self._limit, self._stop_ids, self._timings = max_new_tokens, stop_ids, timings
        self._tokens: Generator[int, None, None] = self._run()

    def __next__(self) -> int:
        return next(self._tokens)

    def close(self) -> None:
        """End it before its end; what was computed stays for the next conversation."""
        self._tokens.close()

    def _run(self) -> Generator[int, None, None]:
        owner, asked, timings = self._owner, self._asked, self._timings
        images = _hashes(asked)
        capacity, steps = owner._capacity(len(asked.ids), self._limit)
        cache = owner._cache(asked, images, capacity)
        self.cached_tokens = len(cache.ids)
        fed: list[int] = []
        try:
            start = time.perf_counter()
            state = self._read_prompt(cache, images, steps)
            timings["prefill"] = timings.get("prefill", 0.0) + time.perf_counter() - start
            yield from self._steps(cache, state, steps, fed)
        finally:
            end = int(asked.positions.max()) + 1
            answer = np.arange(end, end + len(fed))
            cache.ids = np.concatenate([cache.ids, np.array(fed, np.int64)])
            cache.images = np.concatenate([cache.images, np.zeros(len(fed), np.int64)])
            cache.positions = np.concatenate([cache.positions, np.tile(answer, (3, 1))], axis=1)
            owner._keep(cache)

    def _read_prompt(self, cache: _Kept, images: NDArray[np.int64], steps: int) -> Arrays:
        """Put the prompt into the cache, and choose the first token.

        Returns:
            The engine's inputs for the second, apart from the cache.
        """
        engines, asked, sampling = self._owner._engines, self._asked, self._sampling
        spec, chunk = engines.spec(NAME), self._owner._chunk
        room = _bucket(steps, LEAST_ANSWER, self._owner.context)
        random = np.random.Generator(np.random.Philox(sampling.seed))
        fixed: Arrays = {
            "uniform": random.random((1, room), np.float32) * BELOW_ONE,
            "temperature": np.array([sampling.temperature], np.float32),
            "top_k": np.array([sampling.top_k], np.int64),
            "top_p": np.array([sampling.top_p], np.float32),
            "repetition_penalty": np.array([sampling.repetition_penalty], np.float32),
        }
        at, found = len(cache.ids), None
        while found is None or at < len(asked.ids):
            upto = min(at + chunk, len(asked.ids))
            width = upto - at
            if spec.compiled is not None:  # kernels are compiled for every new number of rows
                width = min(_bucket(width, LEAST_ROWS, chunk), cache.capacity - at)
            state = text_inputs.state(spec, asked.ids, at, room)
            given = engines.put(NAME, **fixed, **state, **self._rows(at, upto, width))
            into = text_inputs.written(spec, cache.other)
            found = engines.run(NAME, {**given, **cache.buffers}, self._timings, into=into)
            cache.buffers, cache.other = cache.other, cache.buffers
            cache.ids, cache.images = asked.ids[:upto], images[:upto]
            cache.positions = asked.positions[:, :upto]
            at = upto
            if at < len(asked.ids):
                self._on_piece()
        down = engines.backend.download
        return {
            **fixed,
            **self._rows(0, 1, 1),
            "seen": state["seen"],
            **{
                into: down(found[out]).copy()
                for out, into in spec.next_inputs.items()
                if into != "seen" and into not in cache.buffers
            },
        }

    def _rows(self, at: int, upto: int, width: int) -> Arrays:
        """Return the rows of the prompt from `at` to `upto`."""
        asked, model = self._asked, self._owner._manifest.model
        first, last = np.searchsorted(asked.image_places, (at, upto))
        images = {
            int(asked.image_places[i]) - at: asked.image_tokens[i]
            for i in range(first, last)
            if asked.image_tokens is not None
        }
        ids, positions = asked.ids[at:upto], asked.positions[:, at:upto]
        return text_inputs.rows(ids, positions, images, width, model.hidden_size)

    def _steps(self, cache: _Kept, state: Arrays, steps: int, fed: list[int]) -> Iterator[int]:
        """Args:
        fed: gets the tokens whose keys and values are in the cache.
        """
        engines = self._owner._engines
        tokens = [int(state["input_ids"][0, 0])]
        loop: Loop | None = None
        for n in range(steps):
            if n == len(tokens):
                if loop is None:
                    loop = self._loop(cache, state)
                start = time.perf_counter()
                waits = isinstance(loop["answer"], np.ndarray)
                upto = n + 1 if waits else min(n + QUEUED, steps)
                for _ in range(n, upto):
                    loop.step()
                    cache.buffers, cache.other = cache.other, cache.buffers
                tokens = engines.backend.download(loop["answer"])[0, :upto].tolist()
                self._timings["decode"] = (
                    self._timings.get("decode", 0.0) + time.perf_counter() - start
                )
                fed[:] = tokens[: upto - 1]
            if tokens[n] in self._stop_ids:
                self.finish_reason = "stop"
                return
            yield tokens[n]
        self.finish_reason = "length"

    def _loop(self, cache: _Kept, state: Arrays) -> Loop:
        engines = self._owner._engines
        into = text_inputs.written(engines.spec(NAME), cache.other)
        given = engines.put(NAME, **state)
        return engines.loop(NAME, {**given, **cache.buffers}, self._timings, into=into)


def _bucket(size: int, least: int, most: int) -> int:
    return min(max(least, 1 << math.ceil(math.log2(size))), most)


def _hashes(asked: Conversation) -> NDArray[np.int64]:
    """Of every row that is an image's, what tells its token from others; 0 of the others."""
    found = np.zeros(len(asked.ids), np.int64)
    if asked.image_tokens is not None:
        for place, token in zip(asked.image_places, asked.image_tokens, strict=True):
            digest = hashlib.blake2b(np.ascontiguousarray(token).tobytes(), digest_size=8).digest()
            found[place] = int.from_bytes(digest, "little", signed=True)
    return found
