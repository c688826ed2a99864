"""What decides each network of a checkpoint: the keys of its config that are read, and what their
values must be. Other keys change nothing here and are not looked at."""

from __future__ import annotations

from typing import Any

from bifrost_rt.manifest import Scheduler
from export.configs import (
    EPSILON,
    LAYERS,
    MOST_LAYERS,
    WIDTH,
    Config,
    Flag,
    Kind,
    Many,
    Optional,
    Real,
    Text,
    Whole,
)

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
FLUX: dict[str, Kind] = {
    "attention_head_dim": WIDTH,
    "axes_dims_rope": Many(WIDTH, 3, 3),
    "guidance_embeds": Flag(),
    "in_channels": WIDTH,
    "joint_attention_dim": WIDTH,
    "num_attention_heads": WIDTH,
    "num_layers": LAYERS,
    "num_single_layers": LAYERS,
    "out_channels": Optional(WIDTH),
    "patch_size": WIDTH,
    "pooled_projection_dim": WIDTH,
}
VAE: dict[str, Kind] = {
    "act_fn": Text(),
    "block_out_channels": Many(WIDTH, most=16),
    "down_block_types": Many(Text(), most=16),
    "in_channels": WIDTH,
    "latent_channels": WIDTH,
    "layers_per_block": Whole(0, MOST_LAYERS),
    "mid_block_add_attention": Flag(),
    "norm_num_groups": WIDTH,
    "out_channels": WIDTH,
    "scaling_factor": Real(1e-6, 1e6),
    "shift_factor": Optional(Real(-1e6, 1e6)),
    "up_block_types": Many(Text(), most=16),
    "use_post_quant_conv": Flag(),
    "use_quant_conv": Flag(),
}
CLIP: dict[str, Kind] = {
    "eos_token_id": Whole(0),
    "hidden_act": Text(),
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "layer_norm_eps": EPSILON,
    "max_position_embeddings": WIDTH,
    "num_attention_heads": WIDTH,
    "num_hidden_layers": Whole(1, MOST_LAYERS),
    "vocab_size": WIDTH,
}
T5: dict[str, Kind] = {
    "d_ff": WIDTH,
    "d_kv": WIDTH,
    "d_model": WIDTH,
    "dense_act_fn": Text(),
    "feed_forward_proj": Text(),
    "is_gated_act": Flag(),
    "layer_norm_epsilon": EPSILON,
    "num_heads": WIDTH,
    "num_layers": Whole(1, MOST_LAYERS),
    "relative_attention_max_distance": WIDTH,
    "relative_attention_num_buckets": WIDTH,
    "vocab_size": WIDTH,
}


def flux(config: Config) -> dict[str, Any]:
    """Return the arguments of diffusers' two FLUX networks."""
    arguments = config.among(FLUX)
    axes, width = arguments.get("axes_dims_rope"), arguments.get("attention_head_dim")
    if axes and (any(axis % 2 for axis in axes) or (width and sum(axes) != width)):
        raise config.error(
            "axes_dims_rope", f"expected even numbers that add up to attention_head_dim {width}"
        )
    return arguments


def vae(config: Config) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKL."""
    arguments = config.among(VAE)
    blocks = arguments.get("block_out_channels", (0,))
    for key in ("down_block_types", "up_block_types"):
        if len(arguments.get(key, (0,))) != len(blocks):
            raise config.error(key, f"expected {len(blocks)}, as block_out_channels has")
    return arguments


def scheduler(config: Config) -> Scheduler:
    """Return the noise schedule."""
    for key, value in PLAIN_SCHEDULER.items():
        config.only(key, value)
    length, shift = Whole(), Real(-100, 100)
    found = Scheduler(
        num_train_timesteps=config.get("num_train_timesteps", Whole(1, 1_000_000), 1000),
        use_dynamic_shifting=config.get("use_dynamic_shifting", Flag(), False),
        shift=config.get("shift", Real(1e-3, 1e3), 1.0),
        base_shift=config.get("base_shift", shift, 0.5),
        max_shift=config.get("max_shift", shift, 1.15),
        base_image_seq_len=config.get("base_image_seq_len", length, 256),
        max_image_seq_len=config.get("max_image_seq_len", length, 4096),
    )
    if found.max_image_seq_len <= found.base_image_seq_len:
        raise config.error(
            "max_image_seq_len", f"expected more than base_image_seq_len {found.base_image_seq_len}"
        )
    return found
