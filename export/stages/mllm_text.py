"""`mllm_text`: the MLLM's text, prompt and answer -> the K/V cache and the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import ANSWER_TOKENS, CACHE_TOKENS, IMAGE_TOKENS, NEW_TOKENS, TEXTS
from bifrost_rt.manifest import State, TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from bifrost_rt.dims import Size
    from export.model.answering import MllmText
    from export.model.decoder_config import DecoderConfig

DEFINITION = Definition(
    "mllm_text",
    tolerance=1e-4,
    not_quantized={"lm_head": "small differences of its outputs decide which token comes next"},
)


def cache_specs(c: DecoderConfig, prefix: str, capacity: Size) -> tuple[TensorSpec, ...]:
    """Return a K/V cache: two tensors per layer, one row per token of a text."""
    shape = (TEXTS, c.num_key_value_heads, capacity, c.head_dim)
    return tuple(
        TensorSpec(f"{prefix}_{kind}.{layer}", "float32", shape)
        for layer in range(c.num_hidden_layers)
        for kind in ("keys", "values")
    )


def stage(module: MllmText, c: DecoderConfig) -> Stage:
    """R new rows of U texts behind those that the cache holds.

    `row_sources` says of every row which one it is of the embedded ids, [U * R], with the image
    tokens behind them. `positions` are those of M-RoPE. Of the R rows of a text the first
    `new_length` are real. The rest chooses the next token: see `export/model/sampling.py`. The
    answer's tokens stand in `answer` too, so that steps can be queued and read later.
    """
    past, present = cache_specs(c, "past", CACHE_TOKENS), cache_specs(c, "text", CACHE_TOKENS)
    rows, vocabulary = (TEXTS, NEW_TOKENS), (TEXTS, c.vocab_size)
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(
            TensorSpec("input_ids", "int64", rows),
            TensorSpec("image_tokens", "float32", (IMAGE_TOKENS, c.hidden_size)),
            TensorSpec("row_sources", "int64", rows),
            TensorSpec("positions", "int64", (3, *rows)),
            TensorSpec("past_length", "int64", (TEXTS,)),
            TensorSpec("new_length", "int64", (TEXTS,)),
            TensorSpec("seen", "float32", vocabulary),
            TensorSpec("answer", "int64", (TEXTS, ANSWER_TOKENS)),
            TensorSpec("answer_step", "int64", (1,)),
            TensorSpec("uniform", "float32", (TEXTS, ANSWER_TOKENS)),
            TensorSpec("temperature", "float32", (1,)),
            TensorSpec("top_k", "int64", (1,)),
            TensorSpec("top_p", "float32", (1,)),
            TensorSpec("repetition_penalty", "float32", (1,)),
            *past,
        ),
        outputs=(
            TensorSpec("logits", "float32", vocabulary),
            TensorSpec("next_ids", "int64", (TEXTS, 1)),
            TensorSpec("next_positions", "int64", (3, TEXTS, 1)),
            TensorSpec("next_length", "int64", (TEXTS,)),
            TensorSpec("next_seen", "float32", vocabulary),
            TensorSpec("next_answer", "int64", (TEXTS, ANSWER_TOKENS)),
            TensorSpec("next_step", "int64", (1,)),
            TensorSpec("masked_token", "float32", (TEXTS, 1, c.hidden_size)),
            *present,
        ),
        # of a step: one new row
        state=(
            State("next_ids", "input_ids"),
            State("next_positions", "positions"),
            State("next_length", "past_length"),
            State("next_seen", "seen", "in_place"),
            State("next_answer", "answer", "in_place"),
            State("next_step", "answer_step"),
            *(State(new.name, old.name, "append") for old, new in zip(past, present, strict=True)),
        ),
        # the visual branch reads the cache, and the logits are the answer
        compared=("logits", *(spec.name for spec in present)),
        chosen=("next_ids", "next_answer"),
    )
