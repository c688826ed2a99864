"""The config.json of every network, as its authors publish it."""

from __future__ import annotations

from typing import Any

from export.formats import FORMATS
from export.network_configs import SUPPORTED_VARIANT
from export.synthetic.shapes import Flux, Shapes
from export.synthetic.tokenizers import CLIP_LENGTH, clip_end, qwen_id

_TORCH_DTYPE = {f.name: f.dtype for f in FORMATS.values() if f.safetensors}


def mllm(shapes: Shapes) -> dict[str, Any]:
    """Flat, as Qwen2.5-VL was published, or with `text_config`, as newer transformers write it."""
    c = shapes.decoder
    sections = list(c.sections)
    text: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": 128000,
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "use_sliding_window": False,
        "vocab_size": c.vocab_size,
    }
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        text["head_dim"] = c.head_dim
    document: dict[str, Any] = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": qwen_id("<|image_pad|>"),
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": shapes.tied_head,
        "vision_config": vision(shapes),
        "vision_start_token_id": qwen_id("<|vision_start|>"),
        "vision_end_token_id": qwen_id("<|vision_end|>"),
    }
    dtype = _TORCH_DTYPE[shapes.layout.dtype]
    if shapes.layout.newer_keys:
        rope = {"mrope_section": sections, "rope_theta": c.rope_theta, "rope_type": "default"}
        text |= {"model_type": "qwen2_5_vl_text", "rope_parameters": rope}
        return document | {"dtype": dtype, "text_config": text}
    scaling = {"type": "mrope", "mrope_section": sections}
    return {**document, **text, "rope_theta": c.rope_theta, "rope_scaling": scaling,
            "torch_dtype": dtype}  # fmt: skip


def vision(shapes: Shapes) -> dict[str, Any]:
    """Qwen2.5-VL's vision tower; every eighth layer attends to the whole image."""
    tower = shapes.tower
    full = [i for i in range(tower.depth) if i % 8 == 7] or [tower.depth - 1]
    return {
        "depth": tower.depth,
        "fullatt_block_indexes": full,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_heads": tower.heads,
        "out_hidden_size": shapes.decoder.hidden_size,
    }


def bifrost(shapes: Shapes) -> dict[str, Any]:
    """Return the variant of the release."""
    return {
        **SUPPORTED_VARIANT,
        "architectures": ["MultiModalityCausalLM"],
        "max_seq_length": shapes.max_seq_length,
        "model_type": "multi_modality",
        "num_visual_gen_tokens": shapes.visual_tokens,
        "torch_dtype": _TORCH_DTYPE[shapes.layout.dtype],
    }


def flux(shapes: Shapes, net: Flux) -> dict[str, Any]:
    """Arguments of diffusers' two FLUX networks."""
    return {
        "attention_head_dim": net.head_dim,
        "axes_dims_rope": net.rope_axes,
        "guidance_embeds": net.guidance_embeds,
        "in_channels": 4 * shapes.vae.latent_channels,
        "joint_attention_dim": shapes.t5.width,
        "num_attention_heads": net.heads,
        "num_layers": net.double_blocks,
        "num_single_layers": net.single_blocks,
        "patch_size": 1,
        "pooled_projection_dim": shapes.clip.width,
    }


def controlnet_file(shapes: Shapes) -> dict[str, Any]:
    """With the width of the tokens, which diffusers does not know."""
    return {
        "_class_name": "FluxControlNetModel",
        **flux(shapes, shapes.controlnet),
        "conditioning_embedding_channels": None,
        "input_cond_dim": shapes.decoder.hidden_size,
        "num_mode": None,
    }


def transformer_file(shapes: Shapes) -> dict[str, Any]:
    """Return the FLUX transformer's."""
    return {"_class_name": "FluxTransformer2DModel", **flux(shapes, shapes.transformer)}


def vae(shapes: Shapes) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL."""
    v = shapes.vae
    blocks = len(v.block_out_channels)
    return {
        "block_out_channels": v.block_out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "latent_channels": v.latent_channels,
        "layers_per_block": v.layers_per_block,
        "mid_block_add_attention": v.mid_attention,
        "norm_num_groups": v.norm_groups,
        "scaling_factor": v.scaling_factor,
        "shift_factor": v.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_post_quant_conv": v.quant_convs,
        "use_quant_conv": v.quant_convs,
    }


def vae_file(shapes: Shapes) -> dict[str, Any]:
    """Return the VAE's."""
    return {"_class_name": "AutoencoderKL", **vae(shapes)}


def clip(shapes: Shapes) -> dict[str, Any]:
    """CLIP's text encoder."""
    c = shapes.clip
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,
        "eos_token_id": clip_end() if shapes.layout.clip_eos_in_config else 2,
        "hidden_act": "quick_gelu",
        "hidden_size": c.width,
        "intermediate_size": c.mlp,
        "max_position_embeddings": CLIP_LENGTH,
        "model_type": "clip_text_model",
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "pad_token_id": 1,
        "projection_dim": c.width,
        "vocab_size": c.vocab,
    }


def t5(shapes: Shapes) -> dict[str, Any]:
    """T5's encoder."""
    c = shapes.t5
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": c.mlp,
        "d_kv": c.head_dim,
        "d_model": c.width,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "model_type": "t5",
        "num_heads": c.heads,
        "num_layers": c.layers,
        "tie_word_embeddings": False,
        "vocab_size": c.vocab,
    }


def scheduler(shapes: Shapes) -> dict[str, Any]:
    """FLUX.1-dev's noise schedule, or one with a fixed shift."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": shapes.dynamic_shifting,
    }


def pipeline() -> dict[str, Any]:
    """model_index.json of the flux folder."""
    return {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
