"""The FLUX transformer as its authors named it: `flux1-dev.safetensors`, and what others made of
it. Queries, keys and values are one tensor; in single blocks the MLP's first layer joins them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from export.dialects.named import Named
from export.dialects.place import Place
from export.weights import Weights

MARK = "img_in.weight"
ROPE = {128: (16, 56, 56)}  # width of a head -> FLUX.1's rotary axes
MLP = 4  # times the width
_WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_BLOCKS = {"transformer_blocks": ("double_blocks", _DOUBLE),
           "single_transformer_blocks": ("single_blocks", _SINGLE)}  # fmt: skip
_BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")
# Of the joined tensors: which multiple of the width a part begins and ends at.
_PARTS = {"q": (0, 1), "k": (1, 2), "v": (2, 3), "mlp": (3, 3 + MLP)}


def named(weights: Weights) -> Named:
    """Return the transformer of a file in the authors' names, or in diffusers'.

    Raises:
        CheckpointError: the tensor that tells its width has not two dimensions.
    """
    if MARK not in weights:
        return Named(weights, Place, "diffusers")
    return Named(weights, places(weights.shape(MARK, rank=2)[0]), "black-forest-labs")


def config(net: Named) -> dict[str, Any]:
    """Return the arguments of diffusers' network that the tensors tell, and FLUX.1's for the
    others.

    Raises:
        CheckpointError: a tensor that tells them is missing, or heads of an unknown width.
    """
    inner, latents = net.shape("x_embedder.weight", 2)
    (head,) = net.shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if head not in ROPE:
        known = " or ".join(map(str, ROPE))
        raise net.unknown(
            f"its heads are {head} wide, and rotary axes are known for {known}", "transformer"
        )
    return {
        "attention_head_dim": head,
        "axes_dims_rope": ROPE[head],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in net,
        "in_channels": latents,
        "joint_attention_dim": net.shape("context_embedder.weight", 2)[1],
        "num_attention_heads": inner // head,
        "num_layers": net.layers("transformer_blocks.{}.norm1.linear.weight"),
        "num_single_layers": net.layers("single_transformer_blocks.{}.norm.linear.weight"),
        "out_channels": net.shape("proj_out.weight", 2)[0],
        "patch_size": 1,
        "pooled_projection_dim": net.shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
    }


def scheduler(net: Named) -> dict[str, Any]:
    """FLUX.1-dev's noise schedule; FLUX.1-schnell's, which has no guidance, where there is none."""
    dev = "time_text_embed.guidance_embedder.linear_1.weight" in net
    return {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0 if dev else 1.0,
        "use_dynamic_shifting": dev,
    }


def places(width: int) -> Callable[[str], Place]:
    """Say where the authors' files have a parameter of a network of a width."""

    def place(name: str) -> Place:
        path, _, leaf = name.rpartition(".")
        if path in _WHOLE:
            return Place(f"{_WHOLE[path]}.{leaf}", swapped=path == "norm_out.linear")
        match = _BLOCK.fullmatch(path)
        if match is None or match[1] not in _BLOCKS:
            return Place(name)
        blocks, table = _BLOCKS[match[1]]
        theirs = table.get(match[3])
        if theirs is None:
            return Place(name)
        leaf = "scale" if "_norm" in theirs else leaf
        key = f"{blocks}.{match[2]}.{theirs}.{leaf}"
        if not theirs.endswith(("qkv", "linear1")):
            return Place(key)
        part = re.search(r"(mlp|[qkv])(_proj)?$", match[3])
        assert part is not None
        first, behind = _PARTS[part[1]]
        whole = 3 if theirs.endswith("qkv") else 3 + MLP
        return Place(key, (first * width, behind * width, whole * width))

    return place
