"""One file per engine: the module that becomes the graph, its tensors, its tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from bifrost_rt.manifest import Range, TensorSpec

# Sizes that callers choose. Everything else is a number in the graph.
IMAGES, PROMPTS, TEXTS = "images", "prompts", "texts"
BRANCHES, TEXT_TOKENS, STEPS = "branches", "text_tokens", "steps"
REVEALED = "revealed"


@dataclass(frozen=True)
class Stage:
    """One engine before it is a graph.

    Attributes:
        module: called with the inputs in order, returns the outputs in order.
        carry: output -> the input that it becomes in the loop's next step.
        tolerance: largest absolute difference to torch in float32, on real inputs.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float
    carry: dict[str, str] = field(default_factory=dict)


def dimensions(
    mllm_max_length: int, num_visual_tokens: int, max_images: int | None
) -> Mapping[str, Range]:
    """The range of every symbol.

    `branches` is 1, or 2 with classifier-free guidance; `texts` are the distinct texts that the
    MLLM reads, `prompts` the distinct prompts, `revealed` the most places that a decoding step
    reveals.
    """
    more = None if max_images is None else max_images + 1
    return {
        IMAGES: Range(1, max_images),
        PROMPTS: Range(1, max_images),
        TEXTS: Range(1, more),
        BRANCHES: Range(1, 2),
        TEXT_TOKENS: Range(1, mllm_max_length),
        STEPS: Range(1, None),
        REVEALED: Range(1, num_visual_tokens),
    }
