"""`text_prefill`: the MLLM's text -> the K/V cache that every decoding step reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import BRANCHES, IMAGES, TEXT_TOKENS, TEXTS
from bifrost_rt.manifest import TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from export.model.decoder_config import DecoderConfig
    from export.model.decoding import TextPrefill

DEFINITION = Definition("text_prefill", tolerance=1e-4)


def cache_specs(c: DecoderConfig) -> tuple[TensorSpec, ...]:
    """The K/V cache: two tensors per layer, as this stage writes and every decoding
    step reads them."""
    shape = (BRANCHES, IMAGES, c.num_key_value_heads, TEXT_TOKENS, c.head_dim)
    return tuple(
        TensorSpec(f"text_{kind}.{layer}", "float32", shape)
        for layer in range(c.num_hidden_layers)
        for kind in ("keys", "values")
    )


def stage(module: TextPrefill, c: DecoderConfig) -> Stage:
    """ids [U, S] -> masked tokens [B, N, D] and the cache [G, B, kv_heads, S, head_dim]"""
    cache = cache_specs(c)
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(
            TensorSpec("input_ids", "int64", (TEXTS, TEXT_TOKENS)),
            TensorSpec("text_index", "int64", (BRANCHES, IMAGES)),
        ),
        outputs=(
            TensorSpec("tokens", "float32", (IMAGES, module.num_tokens, c.hidden_size)),
            *cache,
        ),
        # the tokens are a constant, and the visual branch reads the cache
        compared=tuple(spec.name for spec in cache),
    )
