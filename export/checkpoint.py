"""The official checkpoint: three folders -> the networks, with their weights.

    mllm      a Qwen2.5-VL folder
    bifrost   both branches of the trained MLLM, and flux_controlnet/
    flux      a diffusers FLUX pipeline folder, or single files (`export.flux_files`)

Everything outside the supported variant is refused by name (spec: arXiv 2508.05954 and the
configuration of the published training code).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bifrost_rt.manifest import Scheduler
from export import foreign, identity, lazy_tensors
from export import network_configs as networks
from export.configs import WIDTH, Config, Flag, Optional, Whole
from export.dialects import lora, t5
from export.errors import CheckpointError
from export.flux_files import DIFFUSERS_STEMS, FluxFiles
from export.identity import Part
from export.lora_files import LoraFile
from export.model.controlnet import LatentControlNet
from export.model.decoder_config import DecoderConfig
from export.model.text_branch import TextBranch
from export.model.vision_config import VisionConfig
from export.model.vision_tower import VisionTower
from export.model.visual_branch import VisualBranch, visual_key
from export.weights import Weights, fill, refuse_unused

# Left-overs of training that inference does not use.
BIFROST_UNUSED = (
    "vision_language_model.visual.",
    "vision_language_model.lm_head.",
    "vision_gen_vae_model.",
)
# Where a Qwen2.5-VL folder keeps its vision tower: transformers 4.52 moved it.
TOWER = ("visual.", "model.visual.")
TRAINED_HEAD, BASE_HEAD = "vision_language_model.lm_head.", "lm_head."
# Of the base model only what the training did not save is read.
MLLM_UNUSED = ("model.", "visual.", "lm_head.")
RELEASE_MAX_LENGTH = 300
# Of the MLLM: what the published config says, and more than any prompt needs.
PUBLISHED_POSITIONS, MOST_POSITIONS = 128_000, 1 << 20
# Halves of a VAE.
ENCODER, DECODER = ("encoder.", "quant_conv."), ("decoder.", "post_quant_conv.")
# Of a whole CLIP, whose text encoder alone is read.
CLIP_UNUSED = ("text_projection.", "vision_model.", "visual_projection.", "logit_scale")
M = TypeVar("M", bound=nn.Module)


class Checkpoint:
    """Three folders, opened. Networks are made when they are asked for.

    Args:
        flux: the pipeline's folder; or where its parts are.
        loras: files whose products are added to the weights of FLUX and its text encoders.
        read: whether the tensors are read then, in float32. False leaves every network on the
            meta device, after checking that the folders hold its tensors in its shapes; each
            tensor has its source (`export.lazy_tensors`).

    Raises:
        CheckpointError: a folder or file is missing, damaged or of an unsupported variant.
    """

    def __init__(
        self,
        mllm: Path,
        bifrost: Path,
        flux: Path | FluxFiles,
        *,
        loras: Sequence[LoraFile] = (),
        read: bool = True,
    ) -> None:
        self._fill = functools.partial(fill, read=read)
        self.mllm, self.bifrost = mllm, bifrost
        for name, folder in (("mllm", mllm), ("bifrost", bifrost)):
            if found := foreign.folder(folder, name):
                raise CheckpointError(f"{folder}: {found.what}", hint=found.hint)
        self.flux = (flux if isinstance(flux, FluxFiles) else FluxFiles(flux)).checked()
        self.loras = [lora.load(file) for file in loras]
        self._bifrost_config = _config(bifrost / "config.json", identity.BIFROST)
        for key, value in networks.SUPPORTED_VARIANT.items():
            self._bifrost_config.only(key, value)
        config = _config(mllm / "config.json", identity.MLLM)
        self.decoder = DecoderConfig.read(config)
        text = config.over("text_config")
        self.positions: int = text.get(
            "max_position_embeddings", Whole(1, MOST_POSITIONS), PUBLISHED_POSITIONS
        )
        self._tied_head: bool = text.get("tie_word_embeddings", Flag(), False)
        if os.path.lexists(index := self.flux.pipeline / "model_index.json"):
            _config(index, identity.PIPELINE)
        self.trained = Weights.open(bifrost, "model")
        self.base = Weights.open(mllm, "model")
        self._base_prefix = _base_prefix(self.base)
        self._tower_prefix = next((p for p in TOWER if _any_below(self.base, p)), None)
        table = config.table("vision_config")
        self.vision: VisionConfig | None = None
        if table is not None and self._tower_prefix is not None:
            self.vision = VisionConfig.read(table, self.decoder.hidden_size)

    @property
    def ignored_files(self) -> list[str]:
        """Files beside the weights that were not read, for the report."""
        return [str(w.folder / name) for w in (self.trained, self.base) for name in w.ignored_files]

    @property
    def max_seq_length(self) -> int:
        """Tokens of a chat prompt, as it was trained."""
        length: int = self._bifrost_config.get(
            "max_seq_length", Whole(1, self.positions), RELEASE_MAX_LENGTH
        )
        return length

    @cached_property
    def num_visual_tokens(self) -> int:
        """N; a square number, because the tokens are a square grid."""
        n = self.trained.shape("learnable_pos_emb", rank=3)[1]
        if math.isqrt(n) ** 2 != n:
            raise CheckpointError(
                f"{self.bifrost}: learnable_pos_emb has {n} places, expected a square number"
            )
        stated = self._bifrost_config.get("num_visual_gen_tokens", WIDTH, n)
        if stated != n:
            raise CheckpointError(
                f"{self.bifrost / 'config.json'}: num_visual_gen_tokens is {stated}, but "
                f"learnable_pos_emb has {n} places"
            )
        return n

    def text_branch(self, max_length: int) -> TextBranch:
        """Return the text branch; a tensor that was not saved with the training is the base
        model's.

        Raises:
            CheckpointError: more tokens than the model has positions, or tensors that do not fit.
        """
        if max_length > self.positions:
            raise CheckpointError(
                f"{self.mllm / 'config.json'}: max_position_embeddings is {self.positions}, but "
                f"prompts of {max_length} tokens were asked for",
                hint="the release uses 300",
            )

        def find(name: str) -> tuple[Weights, str]:
            key = f"vision_language_model.model.{name}"
            if key in self.trained:
                return self.trained, key
            return self.base, self._base_prefix + name

        branch = _without_values(lambda: TextBranch(self.decoder, max_length))
        self._fill(branch, "text branch", find)
        return branch

    def text_head(self, branch: TextBranch) -> nn.Linear:
        """Return what gives the logits: the embedding's own weight, where the model ties them.

        Raises:
            CheckpointError: it is missing, or of another shape.
        """
        c = self.decoder
        head = _without_values(lambda: nn.Linear(c.hidden_size, c.vocab_size, bias=False))
        if self._tied_head:
            head.weight = branch.embed_tokens.weight
            if source := lazy_tensors.lazy(branch.embed_tokens).get("weight"):
                lazy_tensors.attach(head, "weight", source)
            return head.eval()
        name = f"{TRAINED_HEAD}weight"
        base = f"{BASE_HEAD}weight"
        place = (self.trained, name) if name in self.trained else (self.base, base)
        self._fill(head, "head of the text branch", lambda _: place)
        return head

    def visual_branch(self) -> VisualBranch:
        """Return the visual branch, with mask token, positions and head."""
        branch = _without_values(lambda: VisualBranch(self.decoder, self.num_visual_tokens))
        self._fill(branch, "visual branch", lambda name: (self.trained, visual_key(name)))
        return branch

    def vision_tower(self, longest: int) -> VisionTower:
        """Return the vision tower, as the MLLM's folder has it.

        Args:
            longest: patches of the longest side of an image.

        Raises:
            CheckpointError: tensors that are missing or do not fit.
        """
        assert self.vision is not None
        config, prefix = self.vision, self._tower_prefix
        tower = _without_values(lambda: VisionTower(config, longest))
        self._fill(tower, "vision tower", lambda name: (self.base, f"{prefix}{name}"))
        tower.patch_embed.as_linear()
        return tower

    def refuse_left_overs(self) -> None:
        """After all networks were made: raise for tensors that belong to neither branch nor the
        head, such as those of an unsupported variant, and for layers of a LoRA that none has."""
        refuse_unused(self.trained, "bifrost", BIFROST_UNUSED)
        refuse_unused(self.base, "mllm", MLLM_UNUSED)
        lora.refuse_left_overs(self.loras)

    @cached_property
    def controlnet(self) -> LatentControlNet:
        """The latent ControlNet."""
        folder = self.bifrost / "flux_controlnet"
        config = _config(folder / "config.json", identity.CONTROLNET)
        for key in ("num_mode", "conditioning_embedding_channels"):
            config.only(key, None)
        arguments = networks.flux(config)
        weights = Weights.open(folder, *DIFFUSERS_STEMS)
        width = config.get("input_cond_dim", Optional(WIDTH), None)
        if width is None:
            width = weights.shape("controlnet_x_embedder.weight", rank=2)[1]
        if width != self.decoder.hidden_size:
            raise CheckpointError(
                f"{folder}: takes latents of width {width}, the MLLM gives "
                f"{self.decoder.hidden_size}"
            )
        arguments.pop("out_channels", None)
        net = _on_meta(config, functools.partial(LatentControlNet, width), arguments)
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
        config, named = self.flux.config("transformer"), self.flux.named("transformer")
        net = _on_meta(config, FluxTransformer2DModel, networks.flux(config))
        self._fill(net, "FLUX transformer", named.find, adapt=self._adapt("transformer", net))
        refuse_unused(named.weights, "FLUX transformer")
        return net

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE's decoder."""
        config, named = self.flux.config("vae"), self.flux.named("vae")
        vae = _on_meta(config, AutoencoderKL, networks.vae(config))
        vae.encoder = vae.quant_conv = None
        self._fill(vae, "VAE decoder", named.find)
        refuse_unused(named.weights, "VAE", [*ENCODER])
        return vae

    @cached_property
    def vae_encoder(self) -> AutoencoderKL | None:
        """The VAE's encoder; None where the files hold the decoder alone."""
        config, named = self.flux.config("vae"), self.flux.named("vae")
        if "encoder.conv_in.weight" not in named:
            return None
        vae = _on_meta(config, AutoencoderKL, networks.vae(config))
        vae.decoder = vae.post_quant_conv = None
        self._fill(vae, "VAE encoder", named.find)
        refuse_unused(named.weights, "VAE encoder", [*DECODER])
        return vae

    @cached_property
    def clip(self) -> CLIPTextModel:
        """CLIP's text encoder."""
        whole, named = self.flux.config("text_encoder"), self.flux.named("text_encoder")
        # as `CLIPModel` writes it: its text encoder is a table of its own
        config = whole.table("text_config") or whole
        net = _on_meta(config, _clip, config.among(networks.CLIP))
        self._fill(net, "CLIP text encoder", named.find, adapt=self._adapt("text_encoder", net))
        # a constant that old versions saved, and what FLUX does not use
        constant = named.place("embeddings.position_ids").key
        refuse_unused(named.weights, "CLIP text encoder", [constant, *CLIP_UNUSED])
        positions = net.config.max_position_embeddings
        for module in net.modules():
            if "position_ids" in module._buffers:
                module._buffers["position_ids"] = torch.arange(positions)[None]
        return net

    @cached_property
    def t5(self) -> T5EncoderModel:
        """T5's encoder."""
        config, named = self.flux.config("text_encoder_2"), self.flux.named("text_encoder_2")
        arguments = config.among(networks.T5)
        net = _on_meta(config, lambda **keys: T5EncoderModel(T5Config(**keys)), arguments)
        self._fill(net, "T5 encoder", named.find, adapt=self._adapt("text_encoder_2", net))
        refuse_unused(named.weights, "T5 encoder", [*t5.EMBEDDINGS, *t5.UNUSED])
        return net

    def _adapt(
        self, part: str, net: nn.Module
    ) -> Callable[[str, lazy_tensors.LazyTensor], lazy_tensors.LazyTensor]:
        return lora.adapt(self.loras, part, net)

    @cached_property
    def scheduler(self) -> Scheduler:
        """The noise schedule."""
        return networks.scheduler(self.flux.scheduler())

    @property
    def origins(self) -> dict[str, dict[str, Any]]:
        """Network -> its file, whose names it has and what it stores in less than 16 bit, of the
        networks that were asked for."""
        files = {f"flux/{part}": net for part, net in self.flux.in_files.items()}
        found = {
            name: {"from": str(net.weights.folder), "names": net.spoken,
                   "packed": net.weights.packed()}
            for name, net in files.items()
        }  # fmt: skip
        for name, weights in (("mllm", self.base), ("bifrost", self.trained)):
            found[name] = {"from": str(weights.folder), "packed": weights.packed()}
        return found


def _config(path: Path, part: Part) -> Config:
    """Read a config file that must be that of `part`."""
    return identity.check(Config.read(path), part)


def _clip(**keys: Any) -> CLIPTextModel:
    config = CLIPTextConfig(bos_token_id=None, pad_token_id=None, **keys)  # which it does not use
    config._attn_implementation = "sdpa"
    return CLIPTextModel(config)


def _base_prefix(weights: Weights) -> str:
    """Say where a Qwen2.5-VL folder keeps its decoder: transformers 4.52 moved it."""
    for prefix in ("model.language_model.", "model."):
        if f"{prefix}embed_tokens.weight" in weights:
            return prefix
    raise CheckpointError(
        f"{weights.folder}: missing tensor model.embed_tokens.weight",
        hint="the mllm folder must be a complete Qwen2.5-VL checkpoint",
    )


def _any_below(weights: Weights, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in weights.entries)


def _without_values(build: Callable[[], M]) -> M:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return build()


def _on_meta(config: Config, network: Callable[..., M], arguments: Mapping[str, Any]) -> M:
    """Build a network of a config's values, without memory for its weights.

    Raises:
        CheckpointError: its library refuses them.
    """
    with torch.device("meta"):
        return config.make("network", network, arguments)
