"""Every number of the recipe: widths of the networks and the schedule of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Schedule:
    """One stage's optimisation. The learning rate warms up, holds, and falls over the last part
    of `steps`, so a run cut short by the clock has simply not decayed yet."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    decay: float = 0.3  # share of the steps over which the rate falls to a twentieth
    ema: float = 0.995
    clip: float = 1.0
    weight_decay: float = 0.0
    muon: bool = False

    def rate(self, step: int) -> float:
        """Return the learning rate of one step."""
        rise = min(1.0, (step + 1) / self.warmup)
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * rise * max(0.05, min(1.0, left))


@dataclass(frozen=True)
class Config:
    """The bundled model: 128 px, latents 16x16x8, 64 image tokens, 16 visual tokens."""

    seed: int = 1
    # VAE
    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    latent_channels: int = 8
    # MLLM: hidden width is also the width of the patch latents
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    tower_width: int = 128
    tower_layers: int = 4
    # FLUX
    flux_heads: int = 4
    flux_head_width: int = 48
    flux_double: int = 2
    flux_single: int = 4
    t5_width: int = 96
    t5_layers: int = 2
    t5_length: int = 24
    clip_width: int = 64
    clip_layers: int = 2
    # ControlNet
    control_double: int = 2
    control_single: int = 1
    control_scale: float = 0.7
    # pool of encoded scenes that FLUX and the ControlNet learn from
    pool: int = 16384

    schedules: dict[str, Schedule] = field(
        default_factory=lambda: {
            "vae": Schedule(steps=1300, batch=32, lr=2e-3, ema=0.99),
            "decoder": Schedule(steps=650, batch=8, lr=5e-4, decay=0.5, ema=0.99),
            "captioner": Schedule(steps=1250, batch=32, lr=2e-3, muon=True),
            "flux": Schedule(steps=1850, batch=32, lr=1.5e-3, ema=0.998, muon=True),
            "visual": Schedule(steps=1600, batch=64, lr=2e-3, muon=True),
            "controlnet": Schedule(steps=1100, batch=32, lr=1.5e-3, muon=True),
        }
    )


TINY = replace(
    Config(),
    vae_channels=(8, 8, 8, 8),
    hidden=32,
    layers=2,
    mlp=48,
    tower_width=32,
    tower_layers=1,
    flux_heads=2,
    flux_head_width=16,
    flux_double=1,
    flux_single=1,
    t5_width=16,
    t5_layers=1,
    clip_width=16,
    clip_layers=1,
    control_double=1,
    control_single=1,
    pool=32,
    schedules={
        name: Schedule(steps=3, batch=4, lr=1e-3, warmup=1)
        for name in ("vae", "decoder", "captioner", "flux", "visual", "controlnet")
    },
)
