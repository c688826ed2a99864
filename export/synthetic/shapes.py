"""Every number that decides what a checkpoint looks like on disk."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from export.errors import RecipeError
from export.formats import FORMATS, HALF
from export.model.decoder_config import DecoderConfig

DTYPES = tuple(sorted(f.name for f in FORMATS.values() if f.safetensors))
GIB = 1 << 30


@dataclass(frozen=True)
class Tower:
    """The MLLM's vision tower. No engine reads it; a complete mllm folder holds it."""

    depth: int = 1
    width: int = 16
    mlp: int = 24
    heads: int = 2


@dataclass(frozen=True)
class Flux:
    """The FLUX transformer, or the ControlNet made in its image."""

    heads: int = 2
    head_dim: int = 16
    double_blocks: int = 1
    single_blocks: int = 1
    guidance_embeds: bool = True
    rope_axes: tuple[int, int, int] = (4, 6, 6)

    @property
    def inner(self) -> int:
        """Width of its rows."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Vae:
    """The VAE. k blocks enlarge 2^(k-1) times."""

    block_out_channels: tuple[int, ...] = (8, 16)
    latent_channels: int = 4
    layers_per_block: int = 1
    mid_attention: bool = True
    quant_convs: bool = False
    norm_groups: int = 4
    scaling_factor: float = 0.3611
    shift_factor: float | None = 0.1159


@dataclass(frozen=True)
class Encoder:
    """A text encoder: CLIP (whose heads divide the width) or T5 (whose heads have their own)."""

    width: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int


@dataclass(frozen=True)
class Layout:
    """How the same tensors and tokenizers lie on disk: what published folders differ in.

    Attributes:
        shard_bytes: a shard is closed when the next tensor would make it larger.
        newer_keys: the mllm folder as transformers from 4.52 on writes it
            (`model.language_model.`, `text_config`), not as it was published.
        left_out: text-branch tensors, by prefix (`embed_tokens.`, `layers.0.mlp.`), that the
            bifrost folder does not hold; they are the mllm folder's.
        clip_prefix: CLIP's names begin with `text_model.`.
        clip_eos_in_config: CLIP's config.json names its end token; the published one says 2, which
            means the highest id.
        t5_embedding: under which of its two names T5's embedding is saved.
        mllm_tokenizer, clip_tokenizer: "json" (tokenizer.json), "vocab" (vocab.json and
            merges.txt) or "both".
        merges: in tokenizer.json, as "strings" ("a b") or as "pairs" (["a", "b"]).
        own_lengths: every tokenizer.json carries a truncation and a padding of its own.
        chat_template: the file that holds it.
    """

    dtype: str = HALF.name
    shard_bytes: int = 5 * GIB
    newer_keys: bool = False
    left_out: tuple[str, ...] = ()
    clip_prefix: bool = True
    clip_eos_in_config: bool = False
    t5_embedding: str = "shared.weight"
    mllm_tokenizer: str = "both"
    clip_tokenizer: str = "vocab"
    merges: str = "strings"
    own_lengths: bool = False
    chat_template: str = "chat_template.json"

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", DTYPES),
            ("t5_embedding", ("shared.weight", "encoder.embed_tokens.weight")),
            ("mllm_tokenizer", ("json", "vocab", "both")),
            ("clip_tokenizer", ("json", "vocab", "both")),
            ("merges", ("strings", "pairs")),
            (
                "chat_template",
                ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"),
            ),
        ):
            if getattr(self, name) not in known:
                raise RecipeError(
                    f"{name} {getattr(self, name)!r} is unknown",
                    hint=f"known: {', '.join(known)}",
                )
        if self.shard_bytes < 1:
            raise RecipeError(f"shard_bytes must be at least 1, got {self.shard_bytes}")


@dataclass(frozen=True)
class Shapes:
    """One checkpoint; the defaults are tiny.

    Raises:
        RecipeError: the networks would not fit together.
    """

    decoder: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=640,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
        )
    )
    tied_head: bool = False
    tower: Tower = Tower()
    visual_tokens: int = 16
    max_seq_length: int = 64
    transformer: Flux = Flux()
    controlnet: Flux = Flux()
    vae: Vae = Vae()
    clip: Encoder = Encoder(width=16, layers=1, heads=2, head_dim=8, mlp=24, vocab=768)
    t5: Encoder = Encoder(width=24, layers=1, heads=2, head_dim=8, mlp=32, vocab=384)
    dynamic_shifting: bool = True
    layout: Layout = Layout()

    def __post_init__(self) -> None:
        decoder, transformer, controlnet = self.decoder, self.transformer, self.controlnet
        for wrong, message in (
            (
                round(self.visual_tokens**0.5) ** 2 != self.visual_tokens,
                f"visual_tokens must be a square number, got {self.visual_tokens}",
            ),
            (
                decoder.num_attention_heads % decoder.num_key_value_heads != 0,
                f"{decoder.num_key_value_heads} key/value heads do not divide "
                f"{decoder.num_attention_heads} heads",
            ),
            (
                transformer.inner != controlnet.inner,
                f"transformer and ControlNet are {transformer.inner} and {controlnet.inner} wide, "
                "must be equal",
            ),
            *(
                (sum(net.rope_axes) != net.head_dim, f"rope_axes {net.rope_axes} must add up to "
                 f"head_dim {net.head_dim}")
                for net in (transformer, controlnet)
            ),
            (
                self.clip.heads * self.clip.head_dim != self.clip.width,
                "CLIP's heads must divide its width",
            ),
        ):  # fmt: skip
            if wrong:
                raise RecipeError(message)

    def cut(self, layers: int) -> Shapes:
        """Return the same widths with at most `layers` layers, or blocks of a kind, in every
        network.

        Raises:
            RecipeError: layers below 1.
        """
        if layers < 1:
            raise RecipeError(f"layers must be at least 1, got {layers}")

        def flux(net: Flux) -> Flux:
            return replace(
                net,
                double_blocks=min(layers, net.double_blocks),
                single_blocks=min(layers, net.single_blocks),
            )

        depth = min(layers, self.decoder.num_hidden_layers)
        return replace(
            self,
            decoder=replace(self.decoder, num_hidden_layers=depth),
            tower=replace(self.tower, depth=min(layers, self.tower.depth)),
            transformer=flux(self.transformer),
            controlnet=flux(self.controlnet),
            clip=replace(self.clip, layers=min(layers, self.clip.layers)),
            t5=replace(self.t5, layers=min(layers, self.t5.layers)),
            vae=replace(self.vae, layers_per_block=min(layers, self.vae.layers_per_block)),
        )


_FLUX_DEV = Flux(24, 128, double_blocks=19, single_blocks=38, rope_axes=(16, 56, 56))
_RELEASE = Shapes(
    decoder=DecoderConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=152064,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
    tower=Tower(depth=32, width=1280, mlp=3420, heads=16),
    visual_tokens=256,
    max_seq_length=300,
    transformer=_FLUX_DEV,
    controlnet=replace(_FLUX_DEV, double_blocks=1, single_blocks=4),
    vae=Vae((128, 256, 512, 512), latent_channels=16, layers_per_block=2, norm_groups=32),
    clip=Encoder(width=768, layers=12, heads=12, head_dim=64, mlp=3072, vocab=49408),
    t5=Encoder(width=4096, layers=24, heads=64, head_dim=64, mlp=10240, vocab=32128),
)
PRESETS: dict[str, Shapes] = {
    "7b": _RELEASE,
    "3b": replace(
        _RELEASE,
        decoder=replace(
            _RELEASE.decoder,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
        tied_head=True,
    ),
    # Small enough to be timed on a CPU, large enough that arithmetic decides: each network's share
    # of the official loop's operations is near the real model's, 92 % of them in the MLLM.
    "bench": replace(
        _RELEASE,
        decoder=replace(
            _RELEASE.decoder,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=8192,
        ),
        tower=Tower(),
        transformer=Flux(12, 64, 1, 2, rope_axes=(8, 28, 28)),
        controlnet=Flux(12, 64, 1, 1, rope_axes=(8, 28, 28)),
        vae=Vae((16, 32, 64, 64), latent_channels=16, norm_groups=8),
        clip=Encoder(width=256, layers=2, heads=4, head_dim=64, mlp=512, vocab=8192),
        t5=Encoder(width=256, layers=2, heads=4, head_dim=64, mlp=512, vocab=8192),
    ),
    "tiny": Shapes(),
}
