"""The official inference loop as it is: the oracle of the tests, the yardstick of the benchmarks.

Padded to the full length, doubled for guidance at every weight, both branches for all rows, no
cache, every decoding step run, and everything about the image computed again in every denoising
step by the stock forwards of diffusers. Of this project it takes the weights
(`export.checkpoint`) and the prompts' ids (`bifrost_rt.tokenizers`), and nothing of the
mathematics.

Source: arXiv 2508.05954 and the inference script published with it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benchmarks import reference_mllm
from bifrost_rt.errors import BackendError
from bifrost_rt.tokenizers import Tokenizers
from export import tokenizer_files
from export.checkpoint import Checkpoint

UNCONDITIONAL = ""


@dataclass(frozen=True)
class ReferenceResult:
    """n images, N visual tokens, S image tokens; all float32 but `image_u8`."""

    tokens: Tensor  # [n, N, D]
    tokens_steps: Tensor  # [decoding_steps, n, N, D]
    latents: Tensor  # [n, S, C]
    latents_steps: Tensor  # [num_inference_steps, n, S, C]
    image: Tensor  # [n, 3, H, W], not clamped
    image_u8: Tensor  # [n, H, W, 3]
    timings: dict[str, float]  # seconds: `mllm` up to the tokens, `diffusion` from there on


class Reference:
    """The three folders, opened, in torch at float32.

    Args:
        device: as torch names it. On an NVIDIA GPU float32 is float32 here: TF32 is off.

    Attributes:
        checkpoint: where the networks of FLUX are; they are read at their first use.
        mllm: the official MLLM.

    Raises:
        CheckpointError: a folder is missing, damaged or of an unsupported variant.
    """

    def __init__(
        self,
        mllm: Path | str,
        bifrost: Path | str,
        flux: Path | str,
        mllm_max_length: int,
        t5_max_length: int,
        device: str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        # networks of its own: those of a build have lost their modulation layers
        self.checkpoint = Checkpoint(Path(mllm), Path(bifrost), Path(flux))
        with tempfile.TemporaryDirectory() as folder:
            facts = tokenizer_files.write(
                self.checkpoint, Path(folder), mllm_max_length, t5_max_length
            )
            self._tokenizers = Tokenizers(Path(folder), facts)
            # each is read at its first use, and the files go now
            self._tokenizers.mllm_prompt("")
            self._tokenizers.clip([""])
            self._tokenizers.t5([""])
        self._max_length = mllm_max_length
        self.mllm = reference_mllm.load(self.checkpoint).to(self._device)
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            flux, subfolder="scheduler"
        )

    def compile(self) -> None:
        """Put every network through `torch.compile`; its kernels are built at the first image,
        which takes minutes.

        Raises:
            BackendError: it cannot build kernels here.
        """
        try:
            torch.compile(lambda x: x.sin() + x.cos())(torch.ones(8))
        except Exception as error:  # torch wraps what its compilers raise in types of its own
            raise BackendError(
                f"torch.compile cannot build kernels here: {str(error).strip().splitlines()[0]}",
                hint="it needs a C++ compiler and Python's headers: apt install g++ python3-dev",
            ) from error
        c = self.checkpoint
        for network in (self.mllm, *self._diffusion(), c.controlnet.up_sampling_block):
            network.compile()

    def _diffusion(self) -> list[torch.nn.Module]:
        """Return the networks of FLUX, read at their first use."""
        c = self.checkpoint
        return [c.clip, c.t5, c.controlnet, c.transformer, c.vae.decoder]

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[str],
        *,
        order: np.ndarray | Tensor,
        latents: np.ndarray | Tensor,
        decoding_steps: int,
        cfg_weight: float,
        num_inference_steps: int,
        guidance_scale: float,
        controlnet_conditioning_scale: float,
        tokens: np.ndarray | None = None,
        masked: np.ndarray | None = None,
        regions: np.ndarray | None = None,
        region_prompts: Sequence[str] = (),
    ) -> ReferenceResult:
        """Draw one image per prompt.

        Args:
            prompts: n texts.
            order: [n, N], per image a permutation of its places; its last are revealed first.
            latents: [n, S, C], packed starting noise.
            tokens, masked: [n, N, D] and bool [n, N], known tokens and which of them are predicted
                anew, as many in each image. None: all are predicted.
            regions, region_prompts: [n, N], the prompt under which each is predicted: 0 for the
                image's own, i for `region_prompts[i - 1]`.
        """
        start = time.perf_counter()
        with self._device, torch.backends.cudnn.flags(allow_tf32=False):
            places = torch.as_tensor(order, device=self._device)
            known = None if tokens is None else torch.as_tensor(tokens, device=self._device)
            begin = None if masked is None else torch.as_tensor(masked, device=self._device)
            texts, of = [list(prompts)], None
            if regions is not None:
                texts += [[text] * len(prompts) for text in region_prompts]
                of = torch.as_tensor(regions, device=self._device)
            tokens_steps = self._decode(texts, places, decoding_steps, cfg_weight, known, begin, of)
            on_host = tokens_steps.cpu()  # waits
            decoded = time.perf_counter()
            latents_steps = self._denoise(
                prompts,
                tokens_steps[-1],
                torch.as_tensor(latents, device=self._device),
                num_inference_steps,
                guidance_scale,
                controlnet_conditioning_scale,
            )
            image = self._pixels(latents_steps[-1]).cpu()
        latents_steps = latents_steps.cpu()
        rounded = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return ReferenceResult(
            on_host[-1],
            on_host,
            latents_steps[-1],
            latents_steps,
            image,
            rounded.permute(0, 2, 3, 1),
            {"mllm": decoded - start, "diffusion": time.perf_counter() - decoded},
        )

    def _decode(
        self,
        texts: Sequence[list[str]],
        order: Tensor,
        steps: int,
        cfg_weight: float,
        known: Tensor | None = None,
        begin: Tensor | None = None,
        regions: Tensor | None = None,
    ) -> Tensor:
        """Masked decoding; every step predicts all places for both halves of the batch, once under
        each list of texts."""
        n, places = order.shape
        padded = [self._left_padded([UNCONDITIONAL] * n + list(prompts)) for prompts in texts]
        tokens = self.mllm.mask_token.expand(n, places, -1).clone()
        masked = torch.ones(n, places, dtype=torch.bool)
        if known is not None and begin is not None:
            masked = begin.clone()
            tokens[~masked] = known[~masked]
            # the rest of the order is walked as if there were nothing else
            order = torch.stack(
                [row[inside[row]] for row, inside in zip(order, masked, strict=True)]
            )
        places = order.shape[1]
        kept_steps = []
        for step in range(steps):
            preds = []
            for ids, pad in padded:
                uncond, cond = self.mllm(ids, pad, torch.cat([tokens, tokens])).chunk(2)
                preds.append(uncond + cfg_weight * (cond - uncond))
            pred = preds[0]
            if regions is not None:
                for i, other in enumerate(preds[1:], 1):
                    pred = torch.where(regions[:, :, None] == i, other, pred)
            keep = math.floor(places * math.cos(math.pi / 2 * (step + 1) / steps))
            keep = max(1, min(int(masked[0].sum()) - 1, keep))
            still = torch.zeros_like(masked)
            if step < steps - 1:
                still.scatter_(1, order[:, :keep].long(), True)
            reveal = masked & ~still
            tokens[reveal] = pred[reveal]
            masked = masked & still
            kept_steps.append(tokens.clone())
        return torch.stack(kept_steps)

    def _left_padded(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [self._tokenizers.mllm_prompt(prompt) for prompt in prompts]
        pad = [self._max_length - len(row) for row in rows]
        # what stands in the padding does not matter: no real row sees it
        padded = [[0] * p + row for p, row in zip(pad, rows, strict=True)]
        return torch.tensor(padded), torch.tensor(pad)

    def _denoise(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        latents: Tensor,
        steps: int,
        guidance_scale: float,
        control_scale: float,
    ) -> Tensor:
        """Return the pipeline's loop: ControlNet, transformer, scheduler, from the text on."""
        n, image_tokens = latents.shape[:2]
        checkpoint = self.checkpoint
        for network in (*self._diffusion(), checkpoint.vae):
            _move(network, self._device)
        clip_ids = torch.from_numpy(self._tokenizers.clip(prompts)).to(self._device)
        t5_ids = torch.from_numpy(self._tokenizers.t5(prompts)).to(self._device)
        pooled = checkpoint.clip(input_ids=clip_ids).pooler_output
        embeds = checkpoint.t5(input_ids=t5_ids).last_hidden_state
        conditions = {
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "img_ids": _image_ids(math.isqrt(image_tokens)),
            "txt_ids": torch.zeros(embeds.shape[1], 3),
            "return_dict": False,
        }
        guidance = torch.full([n], guidance_scale)
        self._scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1.0 / steps, steps),
            mu=self._shift(image_tokens),
            device=self._device,
        )
        kept_steps = []
        for t in self._scheduler.timesteps:
            timestep = t.expand(n) / 1000
            controlnet, transformer = checkpoint.controlnet, checkpoint.transformer
            samples, single_samples = controlnet(
                hidden_states=latents,
                controlnet_cond=controlnet.up_sampling_block(tokens),
                conditioning_scale=control_scale,
                timestep=timestep,
                guidance=guidance if controlnet.config.guidance_embeds else None,
                **conditions,
            )
            (velocity,) = transformer(
                hidden_states=latents,
                controlnet_block_samples=samples,
                controlnet_single_block_samples=single_samples,
                timestep=timestep,
                guidance=guidance if transformer.config.guidance_embeds else None,
                **conditions,
            )
            (latents,) = self._scheduler.step(velocity, t, latents, return_dict=False)
            kept_steps.append(latents)
        return torch.stack(kept_steps)

    def _shift(self, image_tokens: int) -> float | None:
        """diffusers' `calculate_shift`: linear in the image's tokens."""
        c = self._scheduler.config
        if not c.use_dynamic_shifting:
            return None
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        return float(c.base_shift + slope * (image_tokens - c.base_image_seq_len))

    def _pixels(self, latents: Tensor) -> Tensor:
        """[n, S, C] -> [n, 3, H, W]"""
        vae = self.checkpoint.vae
        n, image_tokens, channels = latents.shape
        side = math.isqrt(image_tokens)
        x = latents.view(n, side, side, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(n, channels // 4, 2 * side, 2 * side) / vae.config.scaling_factor
        (image,) = vae.decode(x + (vae.config.shift_factor or 0.0), return_dict=False)
        return image


def _move(network: torch.nn.Module, device: torch.device) -> None:
    """Move what was read to the device; counters that nothing reads never left `meta`."""
    network._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def _image_ids(side: int) -> Tensor:
    """[side², 3]: nothing, row and column of every packed latent."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    return ids.reshape(-1, 3)
