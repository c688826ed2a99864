"""One TensorRT engine: its contexts, its weights, and its steps as CUDA graphs.

A step of a loop is queued and not waited for; the host runs ahead until somebody reads a result.
Its work is recorded once and replayed, by the library where it can do that itself, else by
recording the stream. The first step of either context is run both ways: where the results are not
the same, or the library warns that it could not record, the steps are queued kernel by kernel, and
the backend keeps the reason.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bifrost_rt.backends.base import Buffer, check_bindings
from bifrost_rt.backends.cuda import DeviceBuffer
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import EngineSpec, Range

# TensorRT-RTX sets things up in a context's first run, records in the second, and replays then.
RUNS = 3


class BackendInfo(Protocol):
    """What an engine asks of the library and the device: `tensorrt.TensorRt`.

    Attributes:
        name: of the backend.
        graphs: whether the steps of loops are to be replayed.
        eager: engine -> why its steps are not.
    """

    name: str
    graphs: bool
    eager: dict[str, str]

    @property
    def library_graphs(self) -> bool:
        """Tell whether the library records and replays by itself."""
        ...

    def context(self, engine: Any, *, graph: bool) -> Any:
        """Make a context of an engine; `graph`: one in which the library replays."""
        ...

    def enqueue(self, context: Any) -> None:
        """Queue one run of a context."""
        ...

    def capturable(self, context: Any) -> bool:
        """Tell whether the library can record a context's runs."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` queues, and return what replays it."""
        ...

    def wait(self) -> None:
        """Wait for all that is queued."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceBuffer:
        """Allocate a buffer on the device."""
        ...

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy an array into a buffer of its size and type."""
        ...

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """Copy a buffer to the host, when what is queued is done."""
        ...

    def warnings(self) -> list[str]:
        """Take the warnings that the library has given since the last call."""
        ...

    def refused(self, what: str) -> BackendError:
        """Make the error of a call that the library refused."""
        ...

    def closed(self) -> None:
        """Note that an engine is closed."""
        ...


class NoContext(BackendError):
    """The library made no context; its log says why."""


@dataclass(frozen=True)
class Weights:
    """Addresses of the weights that the engine does not hold, and the memory they point into."""

    addresses: Mapping[str, int]
    memory: tuple[DeviceBuffer, ...] = ()


class TensorRtEngine:
    """A loop's two calls have a context each, so that nothing of a context changes from step to
    step. All contexts share one block of scratch memory, because they run in turn.

    Raises:
        NoContext: the library made none.
        BackendError: the GPU's memory is full.
    """

    def __init__(
        self,
        backend: BackendInfo,
        spec: EngineSpec,
        dimensions: Mapping[str, Range],
        engine: Any,
        weights: Weights,
    ) -> None:
        self.spec, self.backend = spec, backend
        self._dimensions, self._weights = dimensions, weights
        self._engine: Any = engine
        self._scratch: DeviceBuffer | None = backend.empty(
            (int(engine.device_memory_size_v2),), np.uint8
        )
        self._loop = bool(spec.state)
        self._graphs = self._loop and backend.graphs
        self._calls = 0
        self._slots = [_Slot(self._context())]

    def _context(self, *, graph: bool | None = None) -> Any:
        graph = self._graphs if graph is None else graph
        context = self.backend.context(self._engine, graph=graph)
        if context is None:
            raise NoContext("the library made no context")
        scratch = self._scratch
        assert scratch is not None
        context.set_device_memory(scratch.address, scratch.nbytes)
        for name, address in self._weights.addresses.items():
            if not context.set_tensor_address(name, address):
                raise self.backend.refused(f"engine `{self.spec.name}`, weight `{name}`")
        return context

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call on these buffers, which it keeps alive."""
        check_bindings(self.spec, self._dimensions, inputs, outputs)
        if self._engine is None:
            raise BackendError(f"engine `{self.spec.name}` is closed")
        given, made = (
            {name: on_device(f"engine `{self.spec.name}`, `{name}`", b) for name, b in side.items()}
            for side in (inputs, outputs)
        )
        if self._loop and len(self._slots) < 2:
            self._slots.append(_Slot(self._context()))
        call = Call(self, self._slots[self._calls % len(self._slots)], given, made)
        self._calls += 1
        return call.step if self._loop else call.run_and_wait

    def step(self, call: Call) -> None:
        """One step of a loop."""
        if self._graphs and not call.slot.checked:
            call.slot.checked = True
            if reason := self._check(call):
                self._give_up(call, reason)
        elif self._graphs and not self.backend.library_graphs:
            call.replay()
        else:
            call.run()

    def _check(self, call: Call) -> str | None:
        """Say why this context's steps cannot be replayed, or None: its outputs are then those of a
        replay. A step reads other buffers than it writes, so it can be run again."""
        own = self.backend.library_graphs
        self.backend.warnings()  # older ones are of something else
        try:
            if own:
                eager = Call(self, _Slot(self._context(graph=False)), call.inputs, call.outputs)
                eager.run()
            else:
                if not self.backend.capturable(call.slot.context):
                    return "the library says that it cannot be recorded"
                call.run()
            expected = call.read()
            same = True
            for _ in range(RUNS):
                call.wipe()
                call.run() if own else call.replay()
                same &= call.read() == expected
        except BackendError as error:
            return _with_warnings(error.message, self.backend.warnings())
        warnings = self.backend.warnings()
        if not same:
            return _with_warnings("its first replay differs from the eager run", warnings)
        if own and any(_of_graphs(warning) for warning in warnings):
            return _with_warnings("the library could not record it", warnings)
        return None

    def _give_up(self, call: Call, reason: str) -> None:
        self._graphs = False
        self.backend.eager[self.spec.name] = reason
        logging.getLogger(__name__).warning(
            "%s: %s: runs without a CUDA graph: %s", self.backend.name, self.spec.name, reason
        )
        for slot in self._slots:
            slot.renew(self._context())
        call.run()

    def close(self) -> None:
        """Drop the contexts and the engine with its weights."""
        if self._engine is None:
            return
        self.backend.wait()  # what was queued still uses them
        for slot in self._slots:
            slot.renew(None)
        self._engine = self._scratch = None
        self._weights = Weights({})
        self.backend.closed()


def _of_graphs(warning: str) -> bool:
    return re.search(r"(?i)graph|captur", warning) is not None


def _with_warnings(reason: str, warnings: list[str]) -> str:
    """Return the reason, and the first of what was logged beside it, of graphs if there is such."""
    if not warnings:
        return reason
    first = min(warnings, key=lambda warning: not _of_graphs(warning))
    return f"{reason} (the library warned: {' '.join(first.split())[:400]})"


class _Slot:
    """A context and the call whose shapes and addresses it has."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.checked = False  # whether a replay was compared
        self._owner: weakref.ref[Call] | None = None

    @property
    def owner(self) -> Call | None:
        """The call that was set last, if it is still there."""
        return None if self._owner is None else self._owner()

    def own(self, call: Call | None) -> None:
        """Note that the context is now this call's."""
        if (before := self.owner) is not None:
            before.forget()
        self._owner = None if call is None else weakref.ref(call)

    def renew(self, context: Any) -> None:
        """Take another context."""
        self.own(None)
        self.context = context


class Call:
    """An engine on fixed buffers."""

    def __init__(
        self,
        engine: TensorRtEngine,
        slot: _Slot,
        inputs: Mapping[str, DeviceBuffer],
        outputs: Mapping[str, DeviceBuffer],
    ) -> None:
        self.slot, self.inputs, self.outputs = slot, inputs, outputs
        self._engine, self._backend = engine, engine.backend
        self._warm = False
        self._graph: Callable[[], None] | None = None

    def run(self) -> None:
        """Queue the work, kernel by kernel."""
        self._set()
        self._backend.enqueue(self.slot.context)
        self._warm = True

    def run_and_wait(self) -> None:
        """Run it and wait: an error belongs to the engine that made it, and so does its time."""
        self.run()
        self._backend.wait()

    def step(self) -> None:
        """One step of a loop, in the way that its engine knows to be right."""
        self._engine.step(self)

    def replay(self) -> None:
        """Queue the recorded work; it is recorded after the library has run once on these shapes,
        because it sets things up in that run."""
        self._set()
        if not self._warm:
            self.run()
            return
        if self._graph is None:
            context = self.slot.context
            self._graph = self._backend.capture(lambda: self._backend.enqueue(context))
        self._graph()

    def _set(self) -> None:
        if self.slot.owner is self:
            return
        self.slot.own(None)
        context = self.slot.context
        if context is None:
            raise BackendError(f"engine `{self._engine.spec.name}` is closed")
        for name, buffer in {**self.inputs, **self.outputs}.items():
            shaped = name not in self.inputs or context.set_input_shape(name, buffer.shape)
            if not (shaped and context.set_tensor_address(name, buffer.address)):
                engine = self._engine.spec.name
                where = f"engine `{engine}`, `{name}` {buffer.dtype}{list(buffer.shape)}"
                raise self._backend.refused(where)
        self.slot.own(self)

    def forget(self) -> None:
        """Forget what was recorded: the context is another's now."""
        self._graph, self._warm = None, False

    def read(self) -> list[bytes]:
        """Return the outputs, bit by bit."""
        return [self._backend.download(buffer).tobytes() for buffer in self.outputs.values()]

    def wipe(self) -> None:
        """Overwrite the outputs, so that what is read next was written since."""
        for buffer in self.outputs.values():
            ones = np.full(buffer.nbytes, 0xFF, np.uint8)
            self._backend.write(buffer, ones.view(buffer.dtype).reshape(buffer.shape))


def on_device(what: str, buffer: Buffer) -> DeviceBuffer:
    """Return the buffer as one of the GPU's.

    Raises:
        BackendError: it is in host memory.
    """
    if not isinstance(buffer, DeviceBuffer):
        raise BackendError(f"{what}: is in host memory; upload it first")
    return buffer
