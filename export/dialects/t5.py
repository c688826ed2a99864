"""T5's encoder as one file: transformers' names, as ComfyUI's `t5xxl_fp16.safetensors` has them, or
those of GGUF."""

from __future__ import annotations

import re
from typing import Any

from export.dialects.named import Named
from export.dialects.place import Place
from export.weights import Weights

MARK = "token_embd.weight"
# One tensor under two names; files hold either or both.
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
# A decoder, a head, and the tokenizer that ComfyUI puts among the tensors.
UNUSED = ("decoder.", "lm_head.", "dec.", "output.weight", "spiece_model")
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.(.+)\.weight")
_GGUF = {
    "layer.0.layer_norm": "attn_norm",
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}


def named(weights: Weights) -> Named:
    """Return the encoder of a file."""
    if MARK in weights:
        return Named(weights, _gguf, "GGUF")
    saved = next((name for name in EMBEDDINGS if name in weights), EMBEDDINGS[0])
    return Named(weights, lambda name: Place(saved if name in EMBEDDINGS else name), "transformers")


def config(net: Named) -> dict[str, Any]:
    """Return the arguments of transformers' network that the tensors tell, and T5 v1.1's for the
    others.

    Raises:
        CheckpointError: a tensor that tells them is missing, or of another rank.
    """
    first = "encoder.block.0.layer.0.SelfAttention."
    vocabulary, width = net.shape(EMBEDDINGS[0], 2)
    buckets, heads = net.shape(f"{first}relative_attention_bias.weight", 2)
    return {
        "d_ff": net.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        "d_kv": net.shape(f"{first}q.weight", 2)[0] // max(heads, 1),
        "d_model": width,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "num_heads": heads,
        "num_layers": net.layers("encoder.block.{}.layer.0.layer_norm.weight"),
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "vocab_size": vocabulary,
    }


def _gguf(name: str) -> Place:
    if name in EMBEDDINGS:
        return Place(MARK)
    if name == "encoder.final_layer_norm.weight":
        return Place("enc.output_norm.weight")
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _GGUF:
        return Place(name)
    return Place(f"enc.blk.{match[1]}.{_GGUF[match[2]]}.weight")
