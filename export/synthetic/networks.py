"""Which tensors a checkpoint has, with which values, read off the networks themselves.

Names and shapes come from the project's modules and the stock classes on the meta device, so that
a random checkpoint cannot drift from what the loaders expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from export.model.controlnet import LatentControlNet
from export.model.visual_branch import VisualBranch, visual_key
from export.synthetic import configs
from export.synthetic.shapes import Shapes
from export.synthetic.shards import Planned

BIFROST_TEXT = "vision_language_model.model."
_EMBEDDING_STD = 0.7
_CONVOLUTIONS = (nn.Linear, nn.Conv2d, nn.Conv3d)
M = TypeVar("M", bound=nn.Module)


def mllm(shapes: Shapes) -> list[Planned]:
    """Return the complete Qwen2.5-VL: text branch, head, vision tower."""
    newer = shapes.layout.newer_keys
    text, visual = ("model.language_model.", "model.visual.") if newer else ("model.", "visual.")
    tower = _on_meta(
        lambda: Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(**configs.vision(shapes))
        )
    )
    return [*_text_branch(shapes, text, _head(shapes, "")), *_plan(tower, lambda n: visual + n)]


def bifrost(shapes: Shapes) -> list[Planned]:
    """Both branches of the trained MLLM, without what the layout leaves out."""
    head = _head(shapes, "vision_language_model.")
    left_out = tuple(BIFROST_TEXT + prefix for prefix in shapes.layout.left_out)
    text = [
        planned
        for planned in _text_branch(shapes, BIFROST_TEXT, head)
        if not left_out or not planned.name.startswith(left_out)
    ]
    return [*text, *_plan(_visual_branch(shapes), visual_key)]


def controlnet(shapes: Shapes) -> list[Planned]:
    """Return the latent ControlNet. Its output projections are not zero, as before training."""
    width = shapes.decoder.hidden_size
    config = configs.flux(shapes, shapes.controlnet)
    return list(_plan(_on_meta(lambda: LatentControlNet(width, **config))))


def transformer(shapes: Shapes) -> list[Planned]:
    """Return the FLUX transformer."""
    config = configs.flux(shapes, shapes.transformer)
    return list(_plan(_on_meta(lambda: FluxTransformer2DModel(**config))))


def vae(shapes: Shapes) -> list[Planned]:
    """Return the VAE with its encoder, as it is published."""
    return list(_plan(_on_meta(lambda: AutoencoderKL(**configs.vae(shapes)))))


def clip(shapes: Shapes) -> list[Planned]:
    """CLIP's text encoder. Versions of transformers differ in the prefix; the layout decides."""
    net = _on_meta(lambda: CLIPTextModel(CLIPTextConfig(**configs.clip(shapes))))
    prefix = "text_model." if shapes.layout.clip_prefix else ""
    return list(_plan(net, lambda name: prefix + name.removeprefix("text_model.")))


def t5(shapes: Shapes) -> list[Planned]:
    """T5's encoder; its one embedding has two names, of which files hold one."""
    net = _on_meta(lambda: T5EncoderModel(T5Config(**configs.t5(shapes))))
    names = ("shared.weight", "encoder.embed_tokens.weight")
    planned = [p for p in _plan(net) if p.name not in names]
    shape = (shapes.t5.vocab, shapes.t5.width)
    # T5 does not divide scores by the root of the head's width: its queries are that much smaller
    return [
        Planned(shapes.layout.t5_embedding, shape, 0.0, _EMBEDDING_STD),
        *(
            Planned(p.name, p.shape, p.mean, p.std / math.sqrt(shapes.t5.head_dim))
            if p.name.endswith("SelfAttention.q.weight")
            else p
            for p in planned
        ),
    ]


def _visual_branch(shapes: Shapes) -> VisualBranch:
    return _on_meta(lambda: VisualBranch(shapes.decoder, shapes.visual_tokens))


def _text_branch(shapes: Shapes, prefix: str, head: list[Planned]) -> list[Planned]:
    """Every layer in full: the visual branch's layers have the text branch's names and shapes."""
    table = (shapes.decoder.vocab_size, shapes.decoder.hidden_size)
    return [
        Planned(f"{prefix}embed_tokens.weight", table, 0.0, _EMBEDDING_STD),
        *(
            Planned(prefix + p.name, p.shape, p.mean, p.std)
            for p in _plan(_visual_branch(shapes))
            if p.name.startswith(("layers.", "norm."))
        ),
        *head,
    ]


def _head(shapes: Shapes, prefix: str) -> list[Planned]:
    if shapes.tied_head:
        return []
    table = (shapes.decoder.vocab_size, shapes.decoder.hidden_size)
    return [Planned(f"{prefix}lm_head.weight", table, 0.0, 1 / math.sqrt(table[1]))]


def _plan(net: nn.Module, rename: Callable[[str], str] = str) -> Iterator[Planned]:
    """Values that keep activations near 1 through any depth and every weight in play."""
    for name in net.state_dict():
        owner, _, leaf = name.rpartition(".")
        module = net.get_submodule(owner)
        shape = tuple(module._parameters.get(leaf, module._buffers.get(leaf)).shape)
        yield Planned(rename(name), shape, *_values(module, leaf, shape))


def _values(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> tuple[float, float, bool]:
    """mean, standard deviation, whether negative values are turned over"""
    if leaf == "num_batches_tracked":
        return 1000, 0.0, False
    if leaf == "running_var":
        return 1.0, 0.3, True
    if leaf == "running_mean":
        return 0.0, 0.2, False
    if leaf in ("mask_token", "learnable_pos_emb"):
        return 0.0, 0.5, False
    if isinstance(module, nn.Embedding):
        return 0.0, _EMBEDDING_STD, False
    if leaf == "bias":
        return 0.0, 0.1, False
    if isinstance(module, nn.ConvTranspose2d):  # stride = kernel: one tap per output
        return 0.0, 1 / math.sqrt(shape[0]), False
    if isinstance(module, _CONVOLUTIONS):
        return 0.0, 1 / math.sqrt(math.prod(shape[1:])), False
    assert (leaf, len(shape)) == ("weight", 1), (type(module).__name__, leaf)
    return 1.0, 0.1, False  # a norm's


def _on_meta(build: Callable[[], M]) -> M:
    with torch.device("meta"):
        return build()


NETWORKS: dict[str, tuple[str, Callable[[Shapes], list[Planned]], Callable[[Shapes], Any]]] = {
    "mllm": ("model", mllm, configs.mllm),
    "bifrost": ("model", bifrost, configs.bifrost),
    "bifrost/flux_controlnet": ("diffusion_pytorch_model", controlnet, configs.controlnet_file),
    "flux/transformer": ("diffusion_pytorch_model", transformer, configs.transformer_file),
    "flux/vae": ("diffusion_pytorch_model", vae, configs.vae_file),
    "flux/text_encoder": ("model", clip, configs.clip),
    "flux/text_encoder_2": ("model", t5, configs.t5),
}
