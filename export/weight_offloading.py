"""Run a network that does not fit in memory: each layer's weights are read when it is called.

What fits in a byte budget is read once and stays, so a small network is read once and runs as any
other. Modules that read tensors of others without calling them (a block that asks its linear
layer for its dtype) find the shapes and dtypes of the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from export import lazy_tensors

# Bytes. Biases, norms and tables stay in any case: they are a thousandth of a network, and some
# modules read them outside of their owner's call.
SMALL = 1 << 20


def largest(module: nn.Module) -> int:
    """Return bytes of the largest tensor that has a source, in the type that its layer computes
    in."""
    return max(
        (
            lazy_tensors.get(owner, n).nbytes
            for owner in module.modules()
            for n in lazy_tensors.lazy(owner)
        ),
        default=0,
    )


@contextlib.contextmanager
def streamed(module: nn.Module, budget: int | None = None) -> Iterator[int]:
    """For as long as the context lasts, `module` can be called.

    Args:
        budget: bytes of weights that may stay in memory; None: all of them. A layer that is called
            takes its own on top.

    Yields:
        The bytes that stay.
    """
    kept: dict[str, Tensor] = {}
    placed: list[tuple[nn.Module, str, Tensor]] = []
    hooks: list[RemovableHandle] = []
    stay = 0
    try:
        for owner in module.modules():
            for name, source in lazy_tensors.lazy(owner).items():
                key, size = source.identity, lazy_tensors.get(owner, name).nbytes
                if key not in kept:
                    if not (size <= SMALL or budget is None or stay + size <= budget):
                        continue
                    kept[key] = lazy_tensors.read(owner, name)
                    stay += size
                placed.append((owner, name, lazy_tensors.place(owner, name, kept[key])))
            if lazy_tensors.lazy(owner):
                hooks += _read_when_called(owner)
        yield stay
    finally:
        for hook in hooks:
            hook.remove()
        for owner, name, before in placed:
            lazy_tensors.put(owner, name, before)


def _read_when_called(owner: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    here: list[tuple[str, Tensor]] = []

    def enter(*_: Any) -> None:
        for name in lazy_tensors.lazy(owner):
            lazy_tensors.give_back(lazy_tensors.get(owner, name).nbytes)
            here.append((name, lazy_tensors.place(owner, name, lazy_tensors.read(owner, name))))

    def leave(*_: Any) -> None:
        while here:
            lazy_tensors.put(owner, *here.pop())

    return (
        owner.register_forward_pre_hook(enter),
        owner.register_forward_hook(leave, always_call=True),
    )
