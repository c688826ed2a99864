"""Where the values of a module's tensors come from: read when they are asked for, one at a time.

A module on the meta device knows its shapes and nothing else. Each of its tensors has a source: a
key in a checkpoint's file, or what becomes of others. So a network of any size can be traced,
changed, quantized and written with one tensor in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bifrost_rt.backends.base import return_freed_memory

LARGE = 4 << 20  # bytes
ATTRIBUTE = "bifrost_sources"  # on a module: tensor's name in it -> Source


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory.

    Attributes:
        shape, dtype: of what `read` gives.
        identity: equal only for sources that give equal values, in this run and in others.
        read: the values; every call reads anew.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    identity: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def map(
        self,
        what: str,
        change: Callable[[Tensor], Tensor],
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> LazyTensor:
        """Return what `change` makes of the values.

        Args:
            what: names the change for `identity`, with everything that decides its result.
            shape, dtype: of the result; default: as before.
        """
        return join(
            what, [self], change, shape=self.shape if shape is None else shape,
            dtype=self.dtype if dtype is None else dtype,
        )  # fmt: skip

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """Return the same values in another type."""
        if dtype == self.dtype:
            return self
        return self.map(str(dtype), lambda values: values.to(dtype), dtype=dtype)


def join(
    what: str,
    sources: Sequence[LazyTensor],
    change: Callable[..., Tensor],
    *,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> LazyTensor:
    """Return what `change` makes of several sources' values, in their order."""

    def read() -> Tensor:
        result = change(*(source.read() for source in sources))
        assert tuple(result.shape) == tuple(shape), f"{what}: {tuple(result.shape)}, not {shape}"
        assert result.dtype == dtype, f"{what}: {result.dtype}, not {dtype}"
        return result

    identity = f"{what}({', '.join(source.identity for source in sources)})"
    return LazyTensor(tuple(shape), dtype, identity, read)


def held(tensor: Tensor) -> LazyTensor:
    """Return a tensor that is in memory, such as a table that was computed."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    identity = f"{tensor.dtype}{list(tensor.shape)}:{digest}"
    return LazyTensor(tuple(tensor.shape), tensor.dtype, identity, lambda: tensor.detach())


def get(owner: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of this very module."""
    found = owner._parameters[name] if name in owner._parameters else owner._buffers[name]
    assert found is not None
    return found


def put(owner: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of this very module."""
    if name in owner._parameters:
        owner._parameters[name] = value
    else:
        owner._buffers[name] = value


def place(owner: nn.Module, name: str, values: Tensor) -> Tensor:
    """Put values where a tensor of this very module stands; returns what stood there."""
    before = get(owner, name)
    put(owner, name, nn.Parameter(values, False) if isinstance(before, nn.Parameter) else values)
    return before


def attach(module: nn.Module, name: str, source: LazyTensor) -> None:
    """Let `source` give the values of a parameter or buffer of this very module, which goes to the
    meta device. Its dtype stays: the values are cast to it when they are read."""
    before = get(module, name)
    assert tuple(before.shape) == source.shape, f"{name}: {tuple(before.shape)}, {source.shape}"
    if not before.is_meta:
        place(module, name, before.detach().to("meta"))
    module.__dict__.setdefault(ATTRIBUTE, {})[name] = source


def of(module: nn.Module, name: str) -> LazyTensor:
    """Return the source of a parameter or buffer of this very module; a tensor that is in memory is
    its own."""
    found: LazyTensor | None = module.__dict__.get(ATTRIBUTE, {}).get(name)
    value = get(module, name)
    if not value.is_meta:
        return held(value)
    if found is None:
        raise KeyError(f"{name} is on the meta device and has no source")
    return found


def named(module: nn.Module) -> dict[str, LazyTensor]:
    """Every parameter and buffer below `module` that has values, by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: of(owner, name)
        for prefix, owner in module.named_modules()
        for name, tensor in _own(owner)
        if not tensor.is_meta or name in owner.__dict__.get(ATTRIBUTE, {})
    }


def lazy(owner: nn.Module) -> dict[str, LazyTensor]:
    """Return the tensors of this very module that have no values in memory."""
    attached: dict[str, LazyTensor] = owner.__dict__.get(ATTRIBUTE, {})
    return {name: attached[name] for name, t in _own(owner) if t.is_meta and name in attached}


def read(owner: nn.Module, name: str) -> Tensor:
    """Return the values of a tensor of this very module, in its dtype."""
    return of(owner, name).cast(get(owner, name).dtype).read()


def give_back(size: int) -> None:
    """Before a tensor of `size` bytes is read: hand freed memory back to the system, if it is worth
    it. What a layer leaves are holes in the allocator's heap, in which no large tensor fits."""
    if size > LARGE:
        return_freed_memory()


def load(module: nn.Module) -> None:
    """Read everything below `module` into memory. Tensors of equal sources become one."""
    found: dict[str, Tensor] = {}
    for owner in module.modules():
        for name, source in lazy(owner).items():
            if source.identity not in found:
                found[source.identity] = read(owner, name)
            place(owner, name, found[source.identity])


@contextlib.contextmanager
def on_meta(module: nn.Module) -> Iterator[None]:
    """For as long as the context lasts, everything below `module` is on the meta device."""
    moved: list[tuple[nn.Module, str, Tensor]] = []
    shared: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        for name, value in list(_own(owner)):
            if value.is_meta:
                continue
            moved.append((owner, name, value))
            if value in shared:
                put(owner, name, shared[value])
            else:
                place(owner, name, value.detach().to("meta"))
                shared[value] = get(owner, name)
    try:
        yield
    finally:
        for owner, name, value in moved:
            put(owner, name, value)


def _own(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (owner._parameters, owner._buffers):
        yield from ((name, t) for name, t in tensors.items() if t is not None)
