"""`python -m training.run --out DIR [--stage NAME] [--steps N] [--minutes M]`"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.config import Config
from training.loop import train
from training.vae import VaeStage

p = argparse.ArgumentParser()
p.add_argument("--out", type=Path, required=True)
p.add_argument("--stage")
p.add_argument("--steps", type=int)
p.add_argument("--minutes", type=float)
p.add_argument("--threads", type=int, default=2)
a = p.parse_args()
c = Config()
torch.set_num_threads(a.threads)
if a.stage == "vae":
    stage = VaeStage(c)
elif a.stage == "flux":
    from training.flux import FluxStage
    stage = FluxStage(c, a.out)
    stage.compile()
elif a.stage == "captioner":
    from training.captioner import CaptionerStage
    stage = CaptionerStage(c)
train(stage, c.schedules[a.stage], a.out, c.seed, a.steps, a.minutes)
