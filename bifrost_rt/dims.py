"""The sizes that callers choose, each declared once, for the exporter and the runtime alike.

A dimension of a tensor is a number, the name of a `Dim`, or an expression of names such as
`past + 1` or `4*height*width`. Everything else is a number in the graph.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bifrost_rt.manifest import EngineSpec, Range

Size = int | str


@dataclass(frozen=True)
class Dim:
    """A size with a name.

    Attributes:
        run: its value in a run, as an expression of the arguments of `of_run`.
        min, max: inclusive. `max` is a number, an expression of the limits that `ranges` gets, or
            None where there is no limit.
        example: its value in the example inputs of a trace. All differ and none is 0 or 1, so that
            torch.export cannot mistake one symbol for another or for a constant.
        optimum: the end of its range at which a compiled engine is to be fastest.
        rows: how many rows of a batch it stands for, as an expression of sizes; None where scratch
            memory does not grow with it.
    """

    name: str
    run: str
    min: int
    max: Size | None
    example: int
    optimum: Literal["min", "max"]
    rows: str | None = None

    def limit(self, limits: Mapping[str, int | None]) -> int | None:
        """`max` as a number; None where there is none, or where its limits are not known."""
        if self.max is None or isinstance(self.max, int):
            return self.max
        known = {name: limits.get(name) for name in symbols(self.max)}
        numbers = {name: limit for name, limit in known.items() if limit is not None}
        return evaluate(self.max, numbers) if numbers.keys() == known.keys() else None


IMAGES, PROMPTS, TEXTS = "images", "prompts", "texts"
BRANCHES, TEXT_TOKENS, STEPS, REVEALED = "branches", "text_tokens", "steps", "revealed"
WINDOWS, VISION_TOKENS, SOURCES = "windows", "vision_tokens", "sources"
NEW_TOKENS, CACHE_TOKENS = "new_tokens", "cache_tokens"
IMAGE_TOKENS, ANSWER_TOKENS = "image_tokens", "answer_tokens"

CONTEXT = 4096  # tokens of the longest conversation, where the model takes so many
CHUNK = 512  # tokens of a long prompt that one call of the text engine reads
CANDIDATES = 1024  # tokens that top_k and top_p choose among, at most

# One image at a time, without guidance, is what an edge device does all day, and the release
# reveals one token in a step: there engines are to be fastest. Texts are the distinct texts that
# the MLLM reads, prompts the distinct prompts; with guidance there is one more text, the empty one,
# and a second branch. Steps are those of the loop that an engine belongs to, and `revealed` is the
# largest number of places that a decoding step reveals. The text engine reads new tokens behind
# those of its cache, some of them an image's, and chooses the answer's. Windows and vision tokens
# are those of one image that is looked at, sources the images whose pixels are kept.
DIMS = {
    dim.name: dim
    for dim in (
        Dim(IMAGES, "images", 1, "max_images", 3, "min", rows="images"),
        Dim(PROMPTS, "prompts", 1, "max_images", 4, "min", rows="prompts"),
        Dim(TEXTS, "prompts + guided", 1, "max_images + 1", 5, "min", rows="texts"),
        Dim(BRANCHES, "1 + guided", 1, 2, 2, "min", rows="branches*images"),
        Dim(TEXT_TOKENS, "text_tokens", 1, "mllm_max_length", 7, "max"),
        Dim(STEPS, "steps", 1, "max_steps", 6, "max"),
        Dim(NEW_TOKENS, "new_tokens", 1, "chunk", 8, "min"),
        Dim(CACHE_TOKENS, "cache_tokens", 1, "context", 13, "max"),
        Dim(IMAGE_TOKENS, "image_tokens", 1, "chunk", 9, "min"),
        Dim(ANSWER_TOKENS, "answer_tokens", 1, "context", 10, "max"),
        Dim(REVEALED, "revealed", 1, "num_visual_tokens", 11, "min"),
        Dim(WINDOWS, "windows", 1, "max_windows", 12, "max", rows="windows"),
        Dim(VISION_TOKENS, "vision_tokens", 1, "max_vision_tokens", 14, "max"),
        Dim(SOURCES, "sources", 1, "max_images", 15, "min", rows="sources"),
    )
}

# What `of_run` takes for the largest call of an answer.
ANSWERS: dict[str, Any] = {
    **{"new_tokens": CHUNK, "cache_tokens": CONTEXT},
    **{"image_tokens": CHUNK, "answer_tokens": CONTEXT},
}


def ranges(dims: Iterable[Dim] = DIMS.values(), **limits: int | None) -> dict[str, Range]:
    """Return the range of every size.

    Args:
        limits: `max_images`, `mllm_max_length`, `num_visual_tokens`, `max_steps`, `chunk`,
            `context`, `max_windows` and `max_vision_tokens`; None, or a limit that is not given: no
            limit.
    """
    return {dim.name: Range(dim.min, dim.limit(limits)) for dim in dims}


def of_run(
    *,
    text_tokens: int,
    steps: int,
    images: int = 1,
    prompts: int = 1,
    guided: bool = False,
    revealed: int = 1,
    windows: int = 1,
    vision_tokens: int = 1,
    sources: int = 1,
    new_tokens: int | None = None,
    cache_tokens: int | None = None,
    image_tokens: int = 1,
    answer_tokens: int = 1,
) -> dict[str, int]:
    """Return the value of every size in a run: one image without guidance where nothing else is
    said.

    Args:
        text_tokens: tokens of the longest text.
        steps: of the loop.
        guided: whether classifier-free guidance is on.
        revealed: most places that one decoding step reveals.
        windows, vision_tokens: of an image that is looked at.
        sources: images whose pixels are read.
        new_tokens, cache_tokens: of the text engine; default: `text_tokens`, as drawing reads a
            prompt.
        image_tokens, answer_tokens: of a conversation.
    """
    facts = {
        **{"images": images, "prompts": prompts, "guided": int(guided)},
        **{"text_tokens": text_tokens, "steps": steps, "revealed": revealed},
        **{"windows": windows, "vision_tokens": vision_tokens, "sources": sources},
        "new_tokens": text_tokens if new_tokens is None else new_tokens,
        "cache_tokens": text_tokens if cache_tokens is None else cache_tokens,
        **{"image_tokens": image_tokens, "answer_tokens": answer_tokens},
    }
    return {name: evaluate(dim.run, facts) for name, dim in DIMS.items()}


def shape_at(shape: Iterable[Size], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a tensor's shape with a number for every dimension.

    Raises:
        ValueError: `sizes` lacks a symbol of it.
    """
    return tuple(evaluate(dim, sizes) for dim in shape)


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """Return a number, the value of a symbol, or that of an expression.

    Raises:
        ValueError: not an expression of sums and products, or `sizes` lacks a symbol of it.
    """
    if isinstance(size, int):
        return size
    if size in sizes:
        return sizes[size]
    return _value(_parsed(size), sizes, size)


def symbols(size: Size) -> frozenset[str]:
    """Return the names in a dimension."""
    if isinstance(size, int):
        return frozenset()
    nodes = ast.walk(_parsed(size))
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name))


def used_by(spec: EngineSpec) -> frozenset[str]:
    """Return the names in the shapes of an engine's inputs and outputs."""
    shapes = (tensor.shape for tensor in (*spec.inputs, *spec.outputs))
    return frozenset[str]().union(*(symbols(size) for shape in shapes for size in shape))


def decodes(spec: EngineSpec) -> bool:
    """Say whether an engine belongs to the loop of decoding, because it reveals tokens; any other
    belongs to that of denoising."""
    return REVEALED in used_by(spec)


def looks(spec: EngineSpec) -> bool:
    """Say whether an engine belongs to looking at an image, because it reads its windows."""
    return WINDOWS in used_by(spec)


def reads_image(spec: EngineSpec) -> bool:
    """Say whether an engine reads an image that a user gives; drawing a prompt does not use it."""
    return bool({WINDOWS, SOURCES} & used_by(spec))


def reads_pieces(spec: EngineSpec) -> bool:
    """Say whether an engine reads a text piece by piece, behind a cache."""
    return {NEW_TOKENS, CACHE_TOKENS} <= used_by(spec)


def drawing(engines: Iterable[EngineSpec]) -> list[str]:
    """Return the names of those engines that draw, in their order."""
    return [spec.name for spec in engines if not reads_image(spec)]


def loops(spec: EngineSpec) -> bool:
    """Say whether an engine belongs to a loop of drawing: it carries something from step to step.
    The text engine does so in answers alone."""
    return bool(spec.state) and STEPS in used_by(spec)


def calls(spec: EngineSpec, sizes: Mapping[str, int]) -> int:
    """Say how often an engine runs for an image: once a step where a loop of drawing carries
    something from step to step, once in all where none does."""
    return sizes[STEPS] if loops(spec) else 1


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@functools.cache
def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError:
        raise ValueError(f"the size {expression!r} is not an expression") from None


def _value(node: ast.expr, sizes: Mapping[str, int], whole: str) -> int:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.Name(id=name):
            raise ValueError(f"the size {whole!r} needs `{name}`, which is not known")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, sizes, whole), _value(right, sizes, whole))
    raise ValueError(f"the size {whole!r} is not made of names, numbers, +, -, * and //")
