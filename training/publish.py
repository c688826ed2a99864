"""Writes the trained networks as the authors of Bifrost-1 publish theirs: three folders, bfloat16.

Key names and config fields are those of the official release; the text branch stands in the mllm
folder alone, as the release allows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export.model.visual_branch import visual_key
from training.captioner import PATCH, PLACES, mllm_config, trained_captioner
from training.config import Config
from training.controlnet import trained_controlnet
from training.decoder import finished_vae
from training.flux import trained_flux, transformer_config
from training.pool import vae_pool
from training.tokenizers import write_tokenizers
from training.visual import trained_branches

MAX_SEQ_LENGTH = 96

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _weights(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {
        k: v.detach().to(torch.bfloat16).contiguous().clone() if v.is_floating_point() else v
        for k, v in sorted(tensors.items())
    }
    save_file(rounded, path, metadata={"format": "pt"})


def _shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """One shard and its index, as the large checkpoints are published."""
    name = "model-00001-of-00001.safetensors"
    _weights(folder / name, tensors)
    size = sum(2 * tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(tensors), name)}
    _json(folder / "model.safetensors.index.json", index)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a diffusers config without what the running process put in."""
    kept = {k: v for k, v in config.items() if k not in ("_name_or_path", "_use_default_values")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def _flat_mllm_config(config: Config) -> dict[str, Any]:
    """config.json with the text fields at the top, as Qwen2.5-VL was published."""
    full = mllm_config(config)
    text, vision = full.text_config, full.vision_config
    rope = text.rope_parameters
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "use_cache": True,
        "max_window_layers": text.num_hidden_layers,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": list(rope["mrope_section"])},
        **{
            key: getattr(text, key)
            for key in (
                "attention_dropout", "bos_token_id", "eos_token_id", "hidden_size",
                "initializer_range", "intermediate_size", "max_position_embeddings",
                "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
                "rms_norm_eps", "tie_word_embeddings", "use_sliding_window", "vocab_size",
            )
        },
        **{
            key: getattr(full, key)
            for key in (
                "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
            )
        },
        "vision_config": {
            "in_chans": 3,
            "spatial_patch_size": PATCH,
            **{
                key: getattr(vision, key)
                for key in (
                    "depth", "hidden_act", "hidden_size", "intermediate_size", "num_heads",
                    "out_hidden_size", "patch_size", "spatial_merge_size", "window_size",
                    "fullatt_block_indexes", "tokens_per_second", "temporal_patch_size",
                )
            },
        },
    }  # fmt: skip


def _mllm(config: Config, out: Path, folder: Path) -> None:
    tensors = {}
    for name, tensor in trained_captioner(config, out).mllm.state_dict().items():
        name = name.removeprefix("model.language_model.")
        if name.startswith("model.visual."):
            name = name.removeprefix("model.")
        elif not name.startswith("lm_head."):
            name = f"model.{name}"
        tensors[name] = tensor
    _shard(folder, tensors)
    _json(folder / "config.json", _flat_mllm_config(config))
    _json(
        folder / "preprocessor_config.json",
        {
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "merge_size": 2,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "min_pixels": 128 * 128,
            "max_pixels": 128 * 128,
        },
    )


def _bifrost(config: Config, out: Path, folder: Path) -> None:
    _, visual = trained_branches(config, out)
    tensors = {visual_key(name): tensor for name, tensor in visual.state_dict().items()}
    _shard(folder, tensors)
    _json(
        folder / "config.json",
        {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "add_vision_branch": True,
            "add_vision_branch_reuse_layernorm": False,
            "add_timestep_token": False,
            "add_vision_gen_mask_token": False,
            "add_vision_soi_eoi_tokens": False,
            "add_vision_soi_token": False,
            "mar_style_vision_branch": False,
            "max_seq_length": MAX_SEQ_LENGTH,
            "num_visual_gen_tokens": PLACES,
            "t2i_resolution": 128,
            "torch_dtype": "bfloat16",
            "use_2d_query_tokens": False,
            "use_clip_visual_encoder": True,
            "use_discrete_visual_tokenizer": False,
            "vision_denoising_type": "mar",
            "vision_head_type": "linear",
            "vision_loss_type": "mse",
            "vision_pos_emb_type": "learnable_pos_emb",
            "diffusion_decoder_config": {
                "model_type": "diffusion_decoder",
                "params": {
                    "num_double_layers": config.control_double,
                    "num_single_layers": config.control_single,
                },
            },
        },
    )


def _control(config: Config, out: Path, folder: Path) -> None:
    control = trained_controlnet(config, out, trained_flux(config, out))
    _weights(folder / "diffusion_pytorch_model.safetensors", control.state_dict())
    _json(
        folder / "config.json",
        {
            "_class_name": "FluxControlNetModel",
            "_diffusers_version": "0.33.1",
            "conditioning_embedding_channels": None,
            "input_cond_dim": config.hidden,
            "num_layers": config.control_double,
            "num_mode": None,
            "num_single_layers": config.control_single,
            "patch_size": 1,
            **_plain(transformer_config(config)),
        },
    )


def _text_encoder(model: nn.Module, folder: Path, drop: tuple[str, ...], prefix: str = "") -> None:
    tensors = {
        name if name.startswith(prefix) else prefix + name: tensor
        for name, tensor in model.state_dict().items()
        if name not in drop
    }
    _weights(folder / "model.safetensors", tensors)
    config = model.config.to_diff_dict()
    config.pop("dtype", None)
    config |= {"architectures": [type(model).__name__], "torch_dtype": "bfloat16"}
    _json(folder / "config.json", config)


def _flux(config: Config, out: Path, folder: Path) -> None:
    flux, vae, pool = trained_flux(config, out), finished_vae(config, out), vae_pool(config, out)
    _json(folder / "model_index.json", MODEL_INDEX)
    _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    parts: dict[str, nn.Module] = {"transformer": flux.transformer, "vae": vae}
    for name, part in parts.items():
        _weights(folder / name / "diffusion_pytorch_model.safetensors", part.state_dict())
        fields: dict[str, Any] = {"_class_name": type(part).__name__}
        fields["_diffusers_version"] = "0.33.1"
        if name == "vae":
            fields |= {"scaling_factor": float(pool["scale"]), "shift_factor": float(pool["shift"])}
        _json(folder / name / "config.json", _plain(dict(part.config)) | fields)
    _text_encoder(flux.clip, folder / "text_encoder", (), prefix="text_model.")
    # One table under two names: the official folder holds it once.
    _text_encoder(flux.t5, folder / "text_encoder_2", ("encoder.embed_tokens.weight",))


def publish(config: Config, out: Path, target: Path) -> None:
    """Return the trained run in `out` as `target`/mllm, bifrost and flux; replaced as a whole."""
    aside = target.with_name(target.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    _mllm(config, out, aside / "mllm")
    _bifrost(config, out, aside / "bifrost")
    _control(config, out, aside / "bifrost" / "flux_controlnet")
    _flux(config, out, aside / "flux")
    write_tokenizers(aside / "mllm", aside / "flux", config.t5_length)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("mllm", "bifrost", "flux"):
        shutil.rmtree(target / name, ignore_errors=True)
        (aside / name).replace(target / name)
    aside.rmdir()
