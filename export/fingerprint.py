"""What decides a stage's trace, as one hash: the modules' classes and attributes, the shapes of
their tensors, this package's code and the library versions; no weight.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bifrost_rt
from export import lazy_tensors
from export.stages import Stage

LIBRARIES = ("torch", "transformers", "diffusers", "onnx", "onnx-ir", "onnxscript", "numpy")
# Of this package, what a trace is made by and of; a test holds that they import nothing else of it.
TRACED_BY = ("trace.py", "fingerprint.py", "initializers.py", "lazy_tensors.py", "model", "stages")
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_PRINTED = (torch.dtype, torch.device, torch.layout, torch.memory_format, Path)
# What every module has and no forward reads; its tensors and children are described on their own.
_MACHINERY = frozenset(vars(nn.Module())) - {"training"} | {lazy_tensors.ATTRIBUTE}


class UnknownValueError(Exception):
    """An attribute holds something whose state cannot be described."""


def of(stage: Stage, *more: Any) -> str | None:
    """Return the hash, or None where a module holds something that cannot be described: its trace
    is not kept then.

    Args:
        more: what else decides the trace.
    """
    describe = _Describe()
    try:
        facts = {
            "stage": [stage.name, [str(t) for t in (*stage.inputs, *stage.outputs)]],
            "names": [t.name for t in (*stage.inputs, *stage.outputs)],
            "module": describe(stage.module),
            "more": describe(more),
            "code": code_digest(),
            "classes": sorted(describe.files),
            **libraries(),
        }
    except UnknownValueError:
        return None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def libraries() -> dict[str, Any]:
    """Return the versions that decide what is built."""
    return {
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


@functools.cache
def code_digest() -> str:
    """Of the code that makes a trace."""
    here = Path(__file__).parent
    files = [
        path
        for name in TRACED_BY
        for path in (sorted((here / name).rglob("*.py")) or [here / name])
    ]
    # how tensors and their sizes are declared
    files += [Path(bifrost_rt.__file__).parent / name for name in ("dims.py", "manifest.py")]
    return digest_of(files, here.parent)


def digest_of(files: Iterable[Path], root: Path) -> str:
    """Of files below `root`, their names and their bytes."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class _Describe:
    """Values as JSON has them. An object that comes again is named by its number, so that tied
    tensors and shared modules are told from equal ones.

    Attributes:
        files: hashes of the files that define classes and functions outside the libraries.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # an object's number stays its own while it lives

    def __call__(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return [type(value).__name__, repr(value)]
        if isinstance(value, _PRINTED):
            return str(value)
        if isinstance(value, enum.Enum):
            return [*self._name(type(value)), value.name]
        if isinstance(value, types.FunctionType | type):
            return self._code(value)
        if isinstance(value, types.BuiltinFunctionType):
            return self._name(value)
        if id(value) in self._seen:
            return self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return [self._name(type(value)), [[self(k), self(v)] for k, v in value.items()]]
        if isinstance(value, list | tuple):
            return [self._name(type(value)), [self(item) for item in value]]
        if isinstance(value, set | frozenset):
            return [self._name(type(value)), sorted(json.dumps(self(item)) for item in value)]
        if isinstance(value, functools.partial):
            return ["partial", self([value.func, value.args, value.keywords])]
        if isinstance(value, types.MethodType):
            return ["method", self._code(value.__func__), self(value.__self__)]
        return self._object(value)

    def _object(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            state = {k: v for k, v in vars(value).items() if k not in _MACHINERY}
            tensors = {**value._parameters, **value._buffers}
            kinds = [sorted(value._parameters), sorted(value._buffers)]
            return [
                *[self._code(type(value)), kinds, self(state)],
                *[self(tensors), [[n, self(child)] for n, child in value._modules.items()]],
            ]
        if dataclasses.is_dataclass(value):
            state = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        elif hasattr(value, "__dict__"):
            state = vars(value)
        else:
            raise UnknownValueError(type(value).__name__)
        return [self._code(type(value)), self(state)]

    def _tensor(self, value: Tensor) -> Any:
        facts = [str(value.dtype), list(value.shape), isinstance(value, nn.Parameter)]
        # a table that the architecture decides is computed with; a weight is not
        table = not value.is_meta and not isinstance(value, nn.Parameter)
        return [*facts, lazy_tensors.held(value).identity if table else None]

    def _name(self, of: Any) -> list[str]:
        return [str(of.__module__), of.__qualname__]

    def _code(self, of: Any) -> Any:
        """Return a class or a function, with what its closure holds."""
        self._note_file(of)
        cells = [c.cell_contents for c in getattr(of, "__closure__", None) or ()]
        return [*self._name(of), self(cells)] if cells else self._name(of)

    def _note_file(self, of: Any) -> None:
        for one in getattr(of, "__mro__", (of,)):
            top = one.__module__.partition(".")[0]
            if top in LIBRARIES or top in ("builtins", "typing", "export", "abc"):
                continue  # their versions, or this package's code, are in the hash
            try:
                file = inspect.getsourcefile(one)
            except TypeError:
                file = None  # written in C
            if file is not None:
                self.files.add(digest_of([Path(file)], Path(file).parent))
