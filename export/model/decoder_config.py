"""The facts of a decoder, apart from its torch modules: what plans and makes checkpoints by their
shapes need not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.configs import (
    EPSILON,
    MOST_LAYERS,
    WIDTH,
    Config,
    Many,
    Optional,
    Real,
    Text,
    Whole,
)


@dataclass(frozen=True)
class DecoderConfig:
    """The facts of a Qwen2.5 decoder that decide its shapes and arithmetic."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int] = (0, 0, 0)

    @property
    def sections(self) -> tuple[int, int, int]:
        """How many of the rotary frequencies turn with time, height and width: `mrope_section`, or
        divided as in the published models where that is not known."""
        return self.mrope_section if any(self.mrope_section) else published_sections(self.head_dim)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> DecoderConfig:
        """Return what `read` makes of a config that stands in no file."""
        return cls.read(Config(Path("config.json"), config))

    @classmethod
    def read(cls, config: Config) -> DecoderConfig:
        """Read a Qwen2.5-VL config.json, flat (as published) or with `text_config` (as newer
        transformers write it).

        Raises:
            CheckpointError: a key is missing or of a wrong value, or names a rotary or attention
                variant that this decoder does not compute.
        """
        text = config.over("text_config")
        rope = Config(config.path, {})
        for key in ("rope_parameters", "rope_scaling"):
            rope = rope if rope.values else (text.table(key) or rope)
        for key in ("rope_type", "type"):
            rope.only(key, "default", "mrope", None)
        text.only("hidden_act", "silu")
        text.only("use_sliding_window", False, None)
        layers = text.get("layer_types", Optional(Many(Text())), None) or ()
        if any(layer != "full_attention" for layer in layers):
            raise text.error("layer_types", "expected 'full_attention' alone")
        width, heads = text.get("hidden_size", WIDTH), text.get("num_attention_heads", WIDTH)
        kv_heads = text.get("num_key_value_heads", Optional(WIDTH), None) or heads
        if heads % kv_heads:
            raise text.error("num_key_value_heads", f"expected a divisor of {heads} heads")
        head_dim = text.get("head_dim", Optional(WIDTH), None)
        if head_dim is None and width % heads:
            raise text.error("num_attention_heads", f"expected a divisor of hidden_size {width}")
        if (head_dim or width // heads) % 2:
            raise text.error(
                "num_attention_heads" if head_dim is None else "head_dim",
                f"which makes {head_dim or width // heads} values a head, expected an even number",
            )
        theta = Optional(Real(1, 1e12))
        whole = head_dim or width // heads
        published = published_sections(whole)
        sections = rope.get("mrope_section", Many(Whole(0), 3, 3), published)
        if sum(sections) != whole // 2:
            raise rope.error("mrope_section", f"expected numbers that add up to {whole // 2}")
        return cls(
            hidden_size=width,
            intermediate_size=text.get("intermediate_size", WIDTH),
            num_hidden_layers=text.get("num_hidden_layers", Whole(1, MOST_LAYERS)),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim or width // heads,
            vocab_size=text.get("vocab_size", WIDTH),
            rms_norm_eps=text.get("rms_norm_eps", EPSILON, 1e-5),
            rope_theta=rope.get("rope_theta", theta, None)
            or text.get("rope_theta", theta, None)
            or 1e6,
            mrope_section=sections,
        )


def published_sections(head_dim: int) -> tuple[int, int, int]:
    """M-RoPE's sections in the proportion of the published models: 16, 24 and 24 of 64."""
    half = head_dim // 2
    axis = 3 * half // 8
    return half - 2 * axis, axis, axis
