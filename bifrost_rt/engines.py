"""The engines of one set: verified, opened and closed as the budget allows, run once or looped."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from bifrost_rt import dims, memory_plan
from bifrost_rt.backends.base import Backend, Buffer, Engine, output_shape, symbol_sizes
from bifrost_rt.buffer_pool import BufferPool
from bifrost_rt.errors import BifrostError, BudgetError
from bifrost_rt.formats import FULL, HALF
from bifrost_rt.manifest import EngineSpec, SetSpec
from bifrost_rt.memory_plan import Requirement, Sizes, Step
from bifrost_rt.opened import OpenedFiles, files_of
from bifrost_rt.prompt_cache import Outputs, PromptCache


class Engines:
    """All engines of a set on one backend.

    Where the backend allows it, engines are opened side by side, and the next one while the
    current one works, if there is room for both.

    Args:
        budget: bytes that engines and their tensors may take together. None opens everything now
            and keeps it.
        files: the set's files, compared whenever an engine comes back. None compares nothing.
        prompts: bytes for what text engines gave, for prompts that come again; part of the budget.

    Attributes:
        prompts: these outputs.

    Raises:
        BudgetError: not even one image can be drawn within the budget.
        EngineSetError: a file changed since it was verified.
    """

    def __init__(
        self,
        folder: Path,
        manifest: SetSpec,
        backend: Backend,
        budget: int | None = None,
        files: OpenedFiles | None = None,
        prompts: int = 0,
    ) -> None:
        self.prompts = PromptCache(prompts)
        self.backend = backend
        self.budget = budget
        self._folder, self._manifest = folder, manifest
        self._files = files
        self._used: set[str] = set()
        self._entered: set[str] = set()
        self._open: dict[str, Engine] = {}
        self._arriving: dict[str, Future[Engine]] = {}
        self._pool = ThreadPoolExecutor(os.cpu_count()) if backend.opens_in_threads else None
        self._buffer_pool = BufferPool(backend)
        self._resident: dict[str, int] = {}
        self._steps: dict[str, Step] = {}
        self._needs: dict[str, Requirement] = {}
        self._beside, self._leave_beside = 0, _nothing
        # an image to look at may never come, and takes as much memory as it has pixels
        order = dims.drawing(manifest.engines)
        if budget is None:
            self._enter_all(order)
            return
        self.begin(order, memory_plan.sizes(manifest))
        if memory_plan.everything_fits(tuple(self._steps.values())):
            self._enter_all(order)

    def begin(
        self,
        order: Sequence[str],
        at: Sizes,
        *,
        waiting: int = 1,
        without: Callable[[], Collection[str]] = tuple,
    ) -> bool:
        """Draw up the schedule of a run that uses the engines in this order, each once; or of
        several runs, of which each uses an engine before any uses the next.

        Args:
            at: engine -> a number for every symbol of its inputs and outputs.
            waiting: how many runs there are.
            without: gives the engines that need not run because their outputs are kept; asked when
                it is known how many may stay.

        Returns:
            Whether engines must leave for others.

        Raises:
            BudgetError: an engine cannot run within the budget.
            EngineSetError: the file of an engine in memory was overwritten.
        """
        self._used, self._entered = set(self._open), set()
        self.check_files()
        if self.budget is None:
            return False
        self.prompts.limit(self._room_for_prompts(self._required(order, at, waiting)))
        skipped = without()
        needs = self._required([name for name in order if name not in skipped], at, waiting)
        budget = self.budget - self.prompts.room
        if not self._room_beside(needs, budget):
            self._beside_leaves()
        budget -= self._beside
        try:
            steps = self._schedule(needs, budget)
        except BudgetError as error:
            raise BudgetError(error.message, hint=self._advice(needs, order)) from None
        self._needs = {need.engine: need for need in needs}
        self._steps = {step.engine: step for step in steps}
        # buffers that stay are all in memory at once
        all_tensors = sum(need.tensors for need in needs)
        resident = dict(self._resident)
        for need in needs:
            resident[need.engine] = max(need.resident, resident.get(need.engine, 0))
        self._buffer_pool.keep = sum(resident.values()) + all_tensors <= budget
        reloads = not memory_plan.everything_fits(steps)
        if waiting > 1 and reloads:
            self._buffer_pool.keep = False  # every run has buffers of its own
        if not self._buffer_pool.keep:
            self._buffer_pool.clear()
        return reloads

    def _required(self, order: Sequence[str], at: Sizes, waiting: int = 1) -> list[Requirement]:
        backend = self.backend
        weights, share = backend.weights_in_memory, backend.scratch_share
        return memory_plan.needs(self._manifest, order, at, weights, share, waiting)

    def _schedule(self, needs: Sequence[Requirement], budget: int) -> tuple[Step, ...]:
        return memory_plan.schedule(needs, budget, self._resident, prefetch=self._pool is not None)

    def _room_for_prompts(self, needs: Sequence[Requirement]) -> int:
        """Say how many bytes of text outputs may stay in this run: none where an engine would not
        fit or would leave for them alone."""
        assert self.budget is not None
        room = self.prompts.capacity
        try:
            steps = self._schedule(needs, self.budget - room)
        except BudgetError:
            return 0
        if memory_plan.everything_fits(steps):
            return room
        return 0 if memory_plan.everything_fits(self._schedule(needs, self.budget)) else room

    def keep_beside(self, size: int, leave: Callable[[], None]) -> None:
        """Count memory that stays between runs where there is room for it.

        Args:
            size: bytes; 0 when there is nothing any more.
            leave: called when a run needs the room: frees it.
        """
        self._beside, self._leave_beside = size, leave

    def _room_beside(self, needs: Sequence[Requirement], budget: int) -> bool:
        """Say whether a run finds everything that it uses in memory, with what is kept beside
        it."""
        resident = dict(self._resident) | {need.engine: need.resident for need in needs}
        tensors = max((need.tensors for need in needs), default=0)
        return sum(resident.values()) + tensors + self._beside <= budget

    def _beside_leaves(self) -> None:
        if self._beside:
            self._beside = 0
            self._leave_beside()

    def check_files(self) -> None:
        """Check that nobody has written to the files of the engines that this run has used: a
        library may have them mapped, and compute with what they hold now.

        Raises:
            EngineSetError: somebody has.
        """
        if self._files is not None:
            for name in self._used:
                self._files.untouched(files_of(self._manifest.engine(name)))

    def _advice(self, needs: Sequence[Requirement], order: Sequence[str]) -> str:
        assert self.budget is not None
        manifest, in_memory = self._manifest, self.backend.weights_in_memory

        def largest(in_memory: Callable[[EngineSpec, int], int]) -> int:
            share, one = self.backend.scratch_share, memory_plan.sizes(manifest)
            return max(n.total for n in memory_plan.needs(manifest, order, one, in_memory, share))

        def half(spec: EngineSpec, stored: int) -> int:
            stored = stored // 2 if spec.precision.weights == FULL.dtype else stored
            precision = dataclasses.replace(spec.precision, weights=HALF.dtype)
            return in_memory(dataclasses.replace(spec, precision=precision), stored)

        ways = []
        if largest(in_memory) <= self.budget:
            ways.append("draw one image at a time")
        elif largest(half) <= self.budget:
            ways.append(f"rebuild the set with `python -m export.build --precision {HALF.name}`")
        least = max(need.total for need in needs)
        return ", or ".join([*ways, f"give it at least {memory_plan.size_text(least, up=True)}"])

    def _enter_all(self, names: Sequence[str]) -> None:
        if self._pool is not None:
            for name in names:
                self._arrive(name)
        for name in names:
            self._enter(name)
        self._steps = {}

    def _enter(self, name: str) -> Engine:
        """Return the engine, opened; what the schedule wants gone has left before, and what it
        wants opened meanwhile has begun to."""
        step = None if name in self._entered else self._steps.get(name)
        self._entered.add(name)
        for leaving in step.evict if step else ():
            self._leave(leaving)
        if name not in self._open:
            self._resident.pop(name, None)  # counted again when it is there
            coming = self._arriving.pop(name, None)
            self._open[name] = self._opened(name) if coming is None else coming.result()
        self._count(name)
        self._used.add(name)
        for coming_next in step.prefetch if step else ():
            self._arrive(coming_next)
        return self._open[name]

    def _arrive(self, name: str) -> None:
        """Begin to open an engine in another thread; an error is raised where it is entered."""
        if name not in self._open and name not in self._arriving:
            assert self._pool is not None
            self._arriving[name] = self._pool.submit(self._opened, name)
            self._count(name)

    def _opened(self, name: str) -> Engine:
        spec = self._manifest.engine(name)
        if self._files is None:
            return self.backend.open(self._folder, spec, self._manifest.dimensions)
        self._files.same(files_of(spec))
        try:
            engine = self.backend.open(self._folder, spec, self._manifest.dimensions)
        except BifrostError:
            self._files.same(files_of(spec))  # the cause, where they changed meanwhile
            raise
        try:
            self._files.same(files_of(spec))
        except BifrostError:
            engine.close()
            raise
        return engine

    def _count(self, name: str) -> None:
        if name in self._needs:
            self._resident[name] = max(self._resident.get(name, 0), self._needs[name].resident)

    def _leave(self, name: str) -> None:
        self._resident.pop(name, None)
        if name in self._open:
            engine = self._open.pop(name)
            self._buffer_pool.forget(engine)
            engine.close()
        elif name in self._arriving:
            coming = self._arriving.pop(name)
            if coming.exception() is None:
                coming.result().close()

    def spec(self, name: str) -> EngineSpec:
        """Return what the engine `name` takes and gives."""
        return self._manifest.engine(name)

    def put(self, name: str, **arrays: NDArray[Any]) -> dict[str, Buffer]:
        """Host arrays as inputs of the engine `name`, in memory that the next run uses again."""
        return {
            tensor: self._buffer_pool.put(f"{name}.{tensor}", array)
            for tensor, array in arrays.items()
        }

    def put_kept(self, name: str, outputs: Outputs) -> dict[str, Buffer]:
        """Return outputs of the engine `name` that were kept, where it would have left them."""
        return {
            tensor: self._buffer_pool.put(f"{name}.{tensor}", array, lent=True)
            for tensor, array in outputs.items()
        }

    @property
    def resident(self) -> tuple[str, ...]:
        """The engines that are in memory now."""
        return tuple(self._open)

    @property
    def arriving(self) -> tuple[str, ...]:
        """The engines that are being opened for the engines to come."""
        return tuple(self._arriving)

    def run(
        self,
        name: str,
        inputs: Mapping[str, Buffer],
        timings: dict[str, float],
        into: Mapping[str, Buffer] | None = None,
    ) -> dict[str, Buffer]:
        """Run an engine once; adds its seconds to `timings[name]`. Its next run writes to the same
        buffers: copy what must outlive that.

        Args:
            into: buffers of the caller's for some of the outputs, such as the very ones of the
                inputs that the engine continues.
        """
        engine = self._enter(name)
        outputs = _outputs(self._buffer_pool, engine.spec, inputs, into or {})
        call = self._buffer_pool.bind(engine, inputs, outputs)
        start = time.perf_counter()
        call()
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
        return outputs

    def loop(
        self,
        name: str,
        inputs: Mapping[str, Buffer],
        timings: dict[str, float],
        into: Mapping[str, Buffer] | None = None,
    ) -> Loop:
        """Prepare an engine for repeated steps; `into` as in `run`."""
        return Loop(self.backend, self._enter(name), inputs, timings, self._buffer_pool, into)

    def close(self) -> None:
        """Close every engine."""
        self.prompts.limit(0)
        self._buffer_pool.clear()
        for name in (*self._arriving, *self._open):
            self._leave(name)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class Carried(Protocol):
    """What a loop hands from step to step, for who looks at it in between."""

    def copy(self, name: str) -> NDArray[Any]:
        """Return a host copy of a carried tensor, the caller's to keep."""

    def replace(self, name: str, array: NDArray[Any]) -> None:
        """Overwrite a carried tensor before the next step."""


class Loop:
    """An engine whose outputs become its inputs in the next step.

    Everything is bound before the first step: two calls that read and write two sets of buffers in
    turn. A step is one call, with no allocation, no copy and nothing to upload. State that a step
    continues, such as a K/V cache, is one buffer where the backend writes in place.
    """

    def __init__(
        self,
        backend: Backend,
        engine: Engine,
        inputs: Mapping[str, Buffer],
        timings: dict[str, float],
        buffer_pool: BufferPool | None = None,
        into: Mapping[str, Buffer] | None = None,
    ) -> None:
        buffer_pool = BufferPool(backend) if buffer_pool is None else buffer_pool
        state = engine.spec.state
        same = {
            s.output: inputs[s.input] for s in state if s.kind != "swap" and backend.writes_in_place
        }
        outputs = _outputs(buffer_pool, engine.spec, inputs, {**same, **(into or {})})
        ping = {s.input: inputs[s.input] for s in state}
        pong = {s.input: outputs[s.output] for s in state}
        fixed = {name: buffer for name, buffer in inputs.items() if name not in ping}
        beside = {n: b for n, b in outputs.items() if n not in engine.spec.next_inputs}
        self._backend = backend
        self._timings = timings
        self._name = engine.spec.name
        self._now, self._next = ping, pong
        self._call, self._other = (
            buffer_pool.bind(
                engine, {**fixed, **now}, {**beside, **{s.output: after[s.input] for s in state}}
            )
            for now, after in ((ping, pong), (pong, ping))
        )

    def step(self) -> None:
        """One step."""
        start = time.perf_counter()
        self._call()
        self._timings[self._name] = self._timings.get(self._name, 0.0) + time.perf_counter() - start
        self._call, self._other = self._other, self._call
        self._now, self._next = self._next, self._now

    def finish(self, name: str) -> Buffer:
        """Return the final buffer of a carried tensor, when it is there. The loop lets go of
        everything else, so that its engine can leave; it cannot be stepped again."""
        start = time.perf_counter()
        self._backend.wait()  # steps may only have been queued: their time belongs here
        self._timings[self._name] = self._timings.get(self._name, 0.0) + time.perf_counter() - start
        last = self._now[name]
        self._now, self._next = {}, {}
        self._call = self._other = _finished
        return last

    def __getitem__(self, name: str) -> Buffer:
        """Return the current buffer of a carried tensor. The step after the next overwrites it."""
        return self._now[name]

    def copy(self, name: str) -> NDArray[Any]:
        """Return a host copy of a carried tensor, the caller's to keep."""
        return self._backend.download(self._now[name]).copy()

    def replace(self, name: str, array: NDArray[Any]) -> None:
        """Overwrite a carried tensor before the next step."""
        self._backend.write(self._now[name], array)


def _nothing() -> None:
    pass


def _finished() -> None:
    raise AssertionError("a finished loop was stepped")


def _outputs(
    buffer_pool: BufferPool,
    spec: EngineSpec,
    inputs: Mapping[str, Buffer],
    into: Mapping[str, Buffer],
) -> dict[str, Buffer]:
    sizes = symbol_sizes(spec, inputs)
    return {
        t.name: into[t.name]
        if t.name in into
        else buffer_pool.empty(f"{spec.name}.{t.name}", output_shape(t, sizes), t.dtype)
        for t in spec.outputs
    }
