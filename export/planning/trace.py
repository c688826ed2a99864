"""One call of a stage's module on the meta device: its arithmetic, its memory and the weights it
meets, without a single value."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bifrost_rt import dims
from export.errors import CheckpointError
from export.stages import Stage


@dataclass(frozen=True)
class Trace:
    """What a call showed.

    Attributes:
        flops: a multiply-add counts two.
        scratch: most bytes alive at once between inputs and outputs. Attention runs in its plain
            form, with its scores in memory: an upper bound for backends that fuse it.
        weights: storages of the parameters and buffers that meet an input.
        folded: bytes of what is computed from weights alone and then meets an input; the exporter
            computes it beforehand and stores it in their place.
    """

    flops: int
    scratch: int
    weights: frozenset[int]
    folded: int


def run_without_values(stage: Stage, sizes: Mapping[str, int]) -> Trace:
    """Run `stage` once at `sizes`. Its module goes to the meta device and stays there.

    Raises:
        CheckpointError: its networks cannot be run at these sizes.
    """
    module = stage.module.to("meta")
    given = [
        torch.empty(
            dims.shape_at(spec.shape, sizes),
            dtype=getattr(torch, spec.dtype),
            device="meta",
        )
        for spec in stage.inputs
    ]
    weights = {storage_key(t) for t in (*module.parameters(), *module.buffers())}
    inputs = {storage_key(t) for t in given}
    watch = _Watch(weights, inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, watch:
        out = _called(stage, given)
    doors = weights | inputs | {storage_key(t) for t in tree_leaves(out)}
    del out
    return Trace(counter.get_total_flops(), watch.peak(doors), frozenset(watch.used), watch.folded)


def _called(stage: Stage, given: list[Tensor]) -> Any:
    try:
        return stage.module(*given)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
    ) as error:  # torch's, of shapes
        raise CheckpointError(
            f"{stage.name}: its networks do not run: {str(error).strip().splitlines()[0]}",
            hint="a value in their config.json, which the shapes of the weights do not show, is "
            "not the one that they were trained with",
        ) from error


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):
    """Follows where each result comes from, and when its memory comes and goes."""

    def __init__(self, weights: set[int], inputs: set[int]) -> None:
        super().__init__()
        self.used: set[int] = set()
        self.folded = 0
        self._weights = weights
        self._doors = weights | inputs
        self._from_inputs = set(inputs)
        self._from_weights: dict[int, int] = {}  # key -> number of the constant that it is
        self._constants = 0
        self._counted: set[int] = set()
        self._views: dict[int, int] = {}  # key -> tensors that share it
        # an address is used again as soon as its memory is freed: numbers are not
        self._numbers: dict[int, int] = {}
        self._events: list[tuple[int, int]] = []  # number, bytes; negative when it goes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        keys = {storage_key(t) for t in given}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            self._note(tensor)
        if keys & self._from_inputs:
            for tensor in given:
                self._meets_input(tensor)
            self._from_inputs |= {storage_key(t) for t in made}
        elif keys & (self._weights | self._from_weights.keys()):
            self._constants += 1
            constant = self._constants
            if function is torch.ops.aten.clone.default:  # the same constant, laid out anew
                constant = self._from_weights.get(storage_key(given[0]), constant)
            for tensor in made:
                if (key := storage_key(tensor)) not in self._weights:
                    self._from_weights.setdefault(key, constant)
        return result

    def _meets_input(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key in self._weights:
            self.used.add(key)
        elif key in self._from_weights and self._from_weights[key] not in self._counted:
            self._counted.add(self._from_weights[key])
            self.folded += tensor.untyped_storage().nbytes()

    def _note(self, tensor: Tensor) -> None:
        key, size = storage_key(tensor), tensor.untyped_storage().nbytes()
        if key in self._doors:
            return
        if key not in self._views:
            self._views[key] = 0
            self._numbers[key] = len(self._events)
            self._events.append((self._numbers[key], size))
        self._views[key] += 1
        weakref.finalize(tensor, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._views[key] -= 1
        if self._views[key] == 0:
            del self._views[key]
            self._from_inputs.discard(key)
            self._from_weights.pop(key, None)
            self._events.append((self._numbers.pop(key), -size))

    def peak(self, outputs: set[int]) -> int:
        """Most bytes alive at once, without those of the outputs, which are still alive."""
        doors = {self._numbers[key] for key in outputs & self._numbers.keys()}
        now = most = 0
        for number, size in self._events:
            if number not in doors:
                now += size
                most = max(most, now)
        return most
