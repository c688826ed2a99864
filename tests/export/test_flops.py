"""The claim behind the project, counted from the graphs: the MLLM costs a ninth of the reference's.

Nothing is timed. Both branches are traced at the sizes of the 7B model, without weights.
"""

from __future__ import annotations

import pytest
import torch

from bifrost_rt import dims
from export import flops
from export.model.answering import MllmText
from export.model.decoder_config import DecoderConfig
from export.model.decoding import VisualDecode
from export.model.text_branch import TextBranch
from export.model.visual_branch import VisualBranch
from export.stages import mllm_text, visual_decode
from export.trace import trace

TOKENS, STEPS, MAX_LENGTH, LAYERS = 256, 256, 300, 28
SIZES = dims.of_run(text_tokens=MAX_LENGTH, steps=STEPS)  # as many steps as tokens


def config(layers: int) -> DecoderConfig:
    """Qwen2.5-VL-7B at another depth."""
    return DecoderConfig(3584, 18944, layers, 28, 4, 128, 152064, 1e-6, 1e6)


def ours(layers: int) -> int:
    """One image: the text once, then every decoding step, from the graphs' own nodes."""
    c = config(layers)
    with torch.device("meta"):
        text, visual = TextBranch(c, MAX_LENGTH).eval(), VisualBranch(c, TOKENS).eval()
        head = torch.nn.Linear(c.hidden_size, c.vocab_size, bias=False)
    prefill = mllm_text.stage(MllmText(text, head, visual), c)
    once = flops.count(trace(prefill), SIZES)
    step = flops.count(trace(visual_decode.stage(VisualDecode(visual), c)), SIZES)
    return once + STEPS * step


def reference(layers: int) -> int:
    """The official loop: two rows (with and without the prompt), padded, and for every position of
    both the linear layers of both branches, in every step."""
    c = config(layers)
    rows, length = 2, MAX_LENGTH + TOKENS
    kv = c.num_key_value_heads * c.head_dim
    linear = 2 * c.hidden_size * (c.hidden_size + kv + 3 * c.intermediate_size // 2)
    branches = 2 * rows * length * 2 * linear
    attention = 4 * rows * length * length * c.hidden_size
    head = 2 * rows * TOKENS * c.hidden_size**2
    return STEPS * (layers * (branches + attention) + head)


def test_the_references_cost_is_the_published_count() -> None:
    assert reference(LAYERS) / 1e12 == pytest.approx(7497, rel=1e-3)


def at_full_depth() -> int:
    """Cost is affine in depth; the slow test shows that it is."""
    one, two = ours(1), ours(2)
    return one + (LAYERS - 1) * (two - one)


def test_the_mllm_costs_at_least_8_times_less() -> None:
    """At the longest prompt; shorter ones cost less still."""
    assert reference(LAYERS) / at_full_depth() >= 8


@pytest.mark.slow
def test_the_full_depth_is_what_was_extrapolated() -> None:
    assert ours(LAYERS) == at_full_depth()
