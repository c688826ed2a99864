"""CLIP's text encoder as one file, such as ComfyUI's `clip_l.safetensors`: transformers' names,
with or without `text_model.` in front."""

from __future__ import annotations

from typing import Any

from export.dialects.named import Named
from export.dialects.place import Place
from export.weights import Weights

PREFIX = "text_model."
HEAD = 64  # the width of a head in every CLIP that was published
END = 2  # of the published config: the end token is the highest id


def named(weights: Weights) -> Named:
    """Return the encoder of a file."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in weights.entries) else ""
    return Named(weights, lambda name: Place(prefix + name.removeprefix(PREFIX)), "transformers")


def config(net: Named) -> dict[str, Any]:
    """Return the arguments of transformers' network that the tensors tell, and CLIP-L's for the
    others.

    Raises:
        CheckpointError: a tensor that tells them is missing, or heads of an unknown width.
    """
    vocabulary, width = net.shape("embeddings.token_embedding.weight", 2)
    if width % HEAD:
        raise net.unknown(
            f"it is {width} wide, no multiple of a head's width, {HEAD}", "text_encoder"
        )
    return {
        "eos_token_id": END,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "intermediate_size": net.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": net.shape("embeddings.position_embedding.weight", 2)[0],
        "num_attention_heads": width // HEAD,
        "num_hidden_layers": net.layers("encoder.layers.{}.mlp.fc1.weight"),
        "vocab_size": vocabulary,
    }
