"""FLUX's VAE as its authors named it: `ae.safetensors`. The blocks of both halves are counted from
the image, and the linear layers of attention are convolutions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from export.dialects.named import Named
from export.dialects.place import Place
from export.weights import Weights

MARK = "decoder.mid.block_1.conv1.weight"
GROUPS, SCALING, SHIFT = 32, 0.3611, 0.1159  # FLUX.1's
_BLOCK = re.compile(r"decoder\.up\.(\d+)\.block\.0\.conv1\.weight")
_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)\.(.+)")
_DOWN = re.compile(r"encoder\.down_blocks\.(\d+)\.(resnets\.(\d+)|downsamplers\.0)\.(.+)")
_MID = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def named(weights: Weights) -> Named:
    """Return the VAE of a file in the authors' names, or in diffusers'."""
    if MARK not in weights:
        return Named(weights, Place, "diffusers")
    found = [int(m[1]) for n in weights.entries if (m := _BLOCK.fullmatch(n)) and len(m[1]) < 4]
    flat = (
        len(weights.entries["decoder.mid.attn_1.q.weight"].shape) == 2
        if ("decoder.mid.attn_1.q.weight" in weights)
        else False
    )
    return Named(weights, _places(max(found, default=0), flat), "black-forest-labs")


def config(net: Named) -> dict[str, Any]:
    """Return the arguments of diffusers' network that the tensors tell, and FLUX.1's for the
    others.

    Raises:
        CheckpointError: a tensor that tells them is missing, or of another rank.
    """
    blocks = net.layers("decoder.up_blocks.{}.resnets.0.conv1.weight")
    widths = [net.shape(f"decoder.up_blocks.{i}.resnets.0.conv1.weight", 4)[0]
              for i in range(blocks)]  # fmt: skip
    widest, latents = net.shape("decoder.conv_in.weight", 4)[:2]
    if any(width % GROUPS for width in widths):
        raise net.unknown(f"its layers are {widths} wide, no multiples of {GROUPS}", "vae")
    return {
        "block_out_channels": widths[::-1] or [widest],
        "down_block_types": ["DownEncoderBlock2D"] * max(blocks, 1),
        "latent_channels": latents,
        "layers_per_block": net.layers("decoder.up_blocks.0.resnets.{}.conv1.weight") - 1,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in net,
        "norm_num_groups": GROUPS,
        "out_channels": net.shape("decoder.conv_out.weight", 4)[0],
        "scaling_factor": SCALING,
        "shift_factor": SHIFT,
        "up_block_types": ["UpDecoderBlock2D"] * max(blocks, 1),
        "use_post_quant_conv": "post_quant_conv.weight" in net,
        "use_quant_conv": "quant_conv.weight" in net,
    }


def _places(last: int, flat: bool) -> Callable[[str], Place]:
    """Args:
    last: the highest number of the decoder's blocks.
    flat: whether the attention's layers are linear in the file, too.
    """

    def place(name: str) -> Place:
        if match := _UP.fullmatch(name):
            inside = "upsample" if match[3] is None else f"block.{match[3]}"
            number = last - int(match[1])
            return Place(f"decoder.up.{number}.{inside}.{_shortcut(match[4])}")
        if match := _DOWN.fullmatch(name):
            inside = "downsample" if match[3] is None else f"block.{match[3]}"
            return Place(f"encoder.down.{match[1]}.{inside}.{_shortcut(match[4])}")
        if match := _MID.fullmatch(name):
            mid, number = f"{match[1]}.mid", int(match[3]) + 1
            if match[2] == "resnets":
                return Place(f"{mid}.block_{number}.{_shortcut(match[4])}")
            path, _, leaf = match[4].rpartition(".")
            theirs = _ATTENTION.get(path, path)
            convolution = leaf == "weight" and theirs != "norm" and not flat
            key = f"{mid}.attn_{number}.{theirs}.{leaf}"
            return Place(key, ones=2 if convolution else 0)
        return Place(name.replace("coder.conv_norm_out", "coder.norm_out"))

    return place


def _shortcut(path: str) -> str:
    return path.replace("conv_shortcut", "nin_shortcut")
