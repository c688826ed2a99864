"""The official checkpoint: three folders -> the networks, with their weights.

    mllm      a Qwen2.5-VL folder
    bifrost   both branches of the trained MLLM, and flux_controlnet/
    flux      a diffusers FLUX pipeline folder

Everything outside the supported variant is refused by name (spec: arXiv 2508.05954 and the
configuration of the published training code).
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bifrost_rt.manifest import Scheduler
from export.errors import CheckpointError
from export.model.controlnet import LatentControlNet
from export.model.decoder import DecoderConfig
from export.model.text_branch import TextBranch
from export.model.visual_branch import VisualBranch, visual_key
from export.weights import Weights, fill, refuse_unused

# Keys of the bifrost folder's config.json that change the mathematics, with the one value that the
# engines compute. A key that is absent has that value.
SUPPORTED_VARIANT: dict[str, Any] = {
    "add_vision_branch": True,
    "add_vision_branch_reuse_layernorm": False,
    "add_timestep_token": False,
    "add_vision_gen_mask_token": False,
    "add_vision_soi_eoi_tokens": False,
    "add_vision_soi_token": False,
    "mar_style_vision_branch": False,
    "use_2d_query_tokens": False,
    "use_clip_visual_encoder": True,
    "use_discrete_visual_tokenizer": False,
    "vae_scale_by_4": False,
    "vision_denoising_type": "mar",
    "vision_head_type": "linear",
    "vision_pos_emb_type": "learnable_pos_emb",
}
# Left-overs of training that inference does not use.
BIFROST_UNUSED = (
    "vision_language_model.visual.",
    "vision_language_model.lm_head.",
    "vision_gen_vae_model.",
)
# Of the base model only what the training did not save is read.
MLLM_UNUSED = ("model.", "visual.", "lm_head.")
# Scheduler settings that change the sigmas in ways that `schedules.sigmas` does not compute.
PLAIN_SCHEDULER: dict[str, Any] = {
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
RELEASE_MAX_LENGTH = 300
M = TypeVar("M", bound=nn.Module)


class Checkpoint:
    """Three folders, opened. Networks are made when they are asked for.

    Args:
        read: whether their tensors are read then, in float32. False leaves every network on the
            meta device, after checking that the folders hold its tensors in its shapes; each
            tensor has its source (`export.sources`).

    Raises:
        CheckpointError: a folder or file is missing, damaged or of an unsupported variant.
    """

    def __init__(self, mllm: Path, bifrost: Path, flux: Path, *, read: bool = True) -> None:
        self._fill = functools.partial(fill, read=read)
        self.mllm, self.bifrost, self.flux = mllm, bifrost, flux
        self.bifrost_config = read_json(bifrost / "config.json")
        _refuse_variant(bifrost / "config.json", self.bifrost_config, SUPPORTED_VARIANT)
        config = read_json(mllm / "config.json")
        try:
            self.decoder = DecoderConfig.from_dict(config)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{mllm / 'config.json'}: {error}") from None
        self.trained = Weights.open(bifrost, "model")
        self.base = Weights.open(mllm, "model")
        self._base_prefix = _base_prefix(self.base)

    @property
    def ignored_files(self) -> list[str]:
        """Files beside the weights that were not read, for the report."""
        return [str(w.folder / name) for w in (self.trained, self.base) for name in w.ignored_files]

    @property
    def max_seq_length(self) -> int:
        """Tokens of a chat prompt, as it was trained."""
        return int(self.bifrost_config.get("max_seq_length", RELEASE_MAX_LENGTH))

    @cached_property
    def num_visual_tokens(self) -> int:
        """N; a square number, because the tokens are a square grid."""
        n = self.trained.shape("learnable_pos_emb")[1]
        if math.isqrt(n) ** 2 != n:
            raise CheckpointError(
                f"{self.bifrost}: learnable_pos_emb has {n} places, expected a square number"
            )
        stated = self.bifrost_config.get("num_visual_gen_tokens", n)
        if stated != n:
            raise CheckpointError(
                f"{self.bifrost / 'config.json'}: num_visual_gen_tokens is {stated}, but "
                f"learnable_pos_emb has {n} places"
            )
        return n

    def text_branch(self, max_length: int) -> TextBranch:
        """The text branch; a tensor that was not saved with the training is the base model's."""

        def find(name: str) -> tuple[Weights, str]:
            key = f"vision_language_model.model.{name}"
            if key in self.trained:
                return self.trained, key
            return self.base, self._base_prefix + name

        branch = _on_meta(lambda: TextBranch(self.decoder, max_length))
        self._fill(branch, "text branch", find)
        return branch

    def visual_branch(self) -> VisualBranch:
        """The visual branch, with mask token, positions and head."""
        branch = _on_meta(lambda: VisualBranch(self.decoder, self.num_visual_tokens))
        self._fill(branch, "visual branch", lambda name: (self.trained, visual_key(name)))
        return branch

    def refuse_left_overs(self) -> None:
        """After both branches were read: raise for tensors that belong to neither, such as those of
        an unsupported variant."""
        refuse_unused(
            self.trained, "bifrost", [*BIFROST_UNUSED, *_unused_text_parameters(self.decoder)]
        )
        refuse_unused(self.base, "mllm", MLLM_UNUSED)

    @cached_property
    def controlnet(self) -> LatentControlNet:
        """The latent ControlNet."""
        folder = self.bifrost / "flux_controlnet"
        config = read_json(folder / "config.json")
        for key in ("num_mode", "conditioning_embedding_channels"):
            if config.get(key) is not None:
                raise CheckpointError(
                    f"{folder / 'config.json'}: {key} = {config[key]!r} is not supported"
                )
        weights = Weights.open(folder, "diffusion_pytorch_model")
        stated = config.get("input_cond_dim")
        width = weights.shape("controlnet_x_embedder.weight")[1] if stated is None else int(stated)
        if width != self.decoder.hidden_size:
            raise CheckpointError(
                f"{folder}: takes latents of width {width}, the MLLM gives "
                f"{self.decoder.hidden_size}"
            )
        net = _on_meta(lambda: LatentControlNet(width, **_known(LatentControlNet.__base__, config)))
        self._fill(net, "ControlNet", lambda name: (weights, name))
        refuse_unused(
            weights,
            "ControlNet",
            [f"up_sampling_block.{bn}.num_batches_tracked" for bn in ("bn1", "bn2")],
        )
        return net

    @cached_property
    def transformer(self) -> FluxTransformer2DModel:
        """The FLUX transformer."""
        folder = self.flux / "transformer"
        config = read_json(folder / "config.json")
        weights = Weights.open(folder, "diffusion_pytorch_model")
        net = _on_meta(lambda: FluxTransformer2DModel(**_known(FluxTransformer2DModel, config)))
        self._fill(net, "FLUX transformer", lambda name: (weights, name))
        refuse_unused(weights, "FLUX transformer")
        return net

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE's decoder; the encoder is not read."""
        folder = self.flux / "vae"
        config = read_json(folder / "config.json")
        weights = Weights.open(folder, "diffusion_pytorch_model")
        vae = _on_meta(lambda: AutoencoderKL(**_known(AutoencoderKL, config)))
        vae.encoder = vae.quant_conv = None
        self._fill(vae, "VAE decoder", lambda name: (weights, name))
        refuse_unused(weights, "VAE", ["encoder.", "quant_conv."])
        return vae

    @cached_property
    def clip(self) -> CLIPTextModel:
        """CLIP's text encoder."""
        folder = self.flux / "text_encoder"
        config = CLIPTextConfig(**read_json(folder / "config.json"))
        config._attn_implementation = "sdpa"
        weights = Weights.open(folder, "model")
        net = _on_meta(lambda: CLIPTextModel(config))
        prefix = "text_model." if any(n.startswith("text_model.") for n in weights.entries) else ""
        own = any(n.startswith("text_model.") for n, _ in net.named_parameters())
        self._fill(
            net,
            "CLIP text encoder",
            lambda name: (weights, name if own or not prefix else prefix + name),
        )
        # a constant that old versions saved, and the projection that FLUX does not use
        refuse_unused(
            weights, "CLIP text encoder", [f"{prefix}embeddings.position_ids", "text_projection."]
        )
        for module in net.modules():
            if "position_ids" in module._buffers:
                module._buffers["position_ids"] = torch.arange(config.max_position_embeddings)[None]
        return net

    @cached_property
    def t5(self) -> T5EncoderModel:
        """T5's encoder."""
        folder = self.flux / "text_encoder_2"
        config = T5Config(**read_json(folder / "config.json"))
        weights = Weights.open(folder, "model")
        net = _on_meta(lambda: T5EncoderModel(config))
        # one tensor under two names; checkpoints hold either or both
        names = ("shared.weight", "encoder.embed_tokens.weight")
        saved = next((n for n in names if n in weights), names[0])
        self._fill(net, "T5 encoder", lambda name: (weights, saved if name in names else name))
        refuse_unused(weights, "T5 encoder", names)
        return net

    @cached_property
    def scheduler(self) -> Scheduler:
        """The noise schedule."""
        path = self.flux / "scheduler" / "scheduler_config.json"
        config = read_json(path)
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise CheckpointError(f"{path}: {name} is not supported, only FlowMatchEulerDiscrete")
        _refuse_variant(path, config, PLAIN_SCHEDULER)
        return Scheduler(
            num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
            use_dynamic_shifting=bool(config.get("use_dynamic_shifting", False)),
            shift=float(config.get("shift", 1.0)),
            base_shift=float(config.get("base_shift", 0.5)),
            max_shift=float(config.get("max_shift", 1.15)),
            base_image_seq_len=int(config.get("base_image_seq_len", 256)),
            max_image_seq_len=int(config.get("max_image_seq_len", 4096)),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A config file.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def _refuse_variant(path: Path, config: dict[str, Any], supported: dict[str, Any]) -> None:
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{path}: {key} = {config[key]!r} is not supported, only {value!r}"
            )


def _known(cls: type, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a diffusers config that `cls` takes; others are of other versions."""
    return {k: v for k, v in config.items() if k in inspect.signature(cls).parameters}


def _base_prefix(weights: Weights) -> str:
    """Where a Qwen2.5-VL folder keeps its decoder: transformers 4.52 moved it."""
    for prefix in ("model.language_model.", "model."):
        if f"{prefix}embed_tokens.weight" in weights:
            return prefix
    raise CheckpointError(
        f"{weights.folder}: missing tensor model.embed_tokens.weight",
        hint="the mllm folder must be a complete Qwen2.5-VL checkpoint",
    )


def _unused_text_parameters(config: DecoderConfig) -> list[str]:
    """Of the last layer only K and V are needed, and neither final norm nor head."""
    model = "vision_language_model.model."
    last = f"{model}layers.{config.num_hidden_layers - 1}."
    parts = ("self_attn.q_proj.", "self_attn.o_proj.", "mlp.", "post_attention_layernorm.")
    return [f"{model}norm.", *(last + part for part in parts)]


def _on_meta(build: Callable[[], M]) -> M:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return build()
