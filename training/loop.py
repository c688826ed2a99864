"""The loop that every stage shares: schedule, EMA, progress, and a state that survives any kill.

Each step seeds its own randomness from (seed, stage, step), so a resumed run does exactly what an
uninterrupted one does. The state is written beside itself and renamed: it is whole or absent.
"""

from __future__ import annotations

import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bifrost_rt.files import atomic_write
from training.config import Schedule

SAVE_EVERY = 60.0  # s
REPORT_EVERY = 20.0  # s


class Stage(Protocol):
    """One thing to train: `module` holds every trained parameter, `loss` draws its own batch."""

    name: str
    module: nn.Module

    def loss(self, step: int, batch: int, rng: np.random.Generator) -> Tensor:
        """Return the loss of one step on a batch drawn by `rng`."""
        ...


def write_aside(value: object, path: Path) -> None:
    """Write with torch.save, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as aside:
        torch.save(value, aside)


def _seeds(seed: int, name: str, step: int) -> np.random.Generator:
    sequence = np.random.SeedSequence([seed, zlib.crc32(name.encode()), step])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence.spawn(1)[0])


def read(path: Path) -> dict[str, Any]:
    """Read what `write_aside` wrote, on the device of this run."""
    value: dict[str, Any] = torch.load(
        path, weights_only=True, map_location=torch.get_default_device()
    )
    return value


def steps_done(out: Path, name: str) -> int:
    """Say how far a stage has been trained."""
    return len(read(out / f"{name}.state")["losses"])


def load_weights(module: nn.Module, out: Path, name: str) -> None:
    """Return the averaged weights of a stage that has been trained before."""
    path = out / f"{name}.state"
    if not path.exists():
        raise FileNotFoundError(
            f"stage `{name}` has no state in {out}\n"
            f"hint: run `python -m training.run --out {out} --stage {name}` first"
        )
    module.load_state_dict(read(path)["average"])


def _optimisers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the repeated blocks where the schedule asks for it.

    Muon is scaled to AdamW's step size, so both share one rate. Modulation matrices, embeddings
    and heads stay with AdamW.
    """
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    blocks = {
        n: p
        for n, p in named.items()
        if schedule.muon and p.ndim == 2 and ("blocks." in n or "layers." in n) and "norm" not in n
    }
    rest = [p for n, p in named.items() if n not in blocks]
    decay = schedule.weight_decay
    chosen: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, schedule.lr, betas=(0.9, 0.99), weight_decay=decay)
    ]
    if blocks:
        chosen.append(
            torch.optim.Muon(
                list(blocks.values()),
                schedule.lr,
                weight_decay=decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return chosen


def train(
    stage: Stage,
    schedule: Schedule,
    out: Path,
    seed: int,
    steps: int | None = None,
    minutes: float | None = None,
) -> list[float]:
    """Trains until the schedule, the step count or the clock is used up; returns all losses.

    `steps` and `minutes` limit this call only; what they cut off can be resumed later.
    """
    module, path = stage.module, out / f"{stage.name}.state"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimisers = _optimisers(module, schedule)
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    losses: list[float] = []
    if path.exists():
        state = read(path)
        module.load_state_dict(state["weights"])
        for optimiser, saved_state in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved_state)
        average, losses = state["average"], state["losses"]
    first = len(losses)
    last = min(schedule.steps, first + steps) if steps is not None else schedule.steps
    started = saved = reported = time.monotonic()

    def save() -> None:
        write_aside(
            {
                "weights": module.state_dict(),
                "average": average,
                "optimisers": [o.state_dict() for o in optimisers],
                "losses": losses,
            },
            path,
        )

    module.train()
    for step in range(first, last):
        now = time.monotonic()
        if minutes is not None and now - started > 60 * minutes:
            break
        rng = _seeds(seed, stage.name, step)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(step)
            optimiser.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # autocast keeps the norms' weights in float32, and torch says so at every call
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            loss = stage.loss(step, schedule.batch, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, schedule.clip)
        for optimiser in optimisers:
            optimiser.step()
        keep = min(schedule.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - keep)
                else:
                    average[key].copy_(value)
        losses.append(float(loss.detach()))
        if now - saved > SAVE_EVERY:
            save()
            saved = now
        if now - reported > REPORT_EVERY:
            recent = float(np.mean(losses[-100:]))
            pace = (now - started) / (step - first + 1)
            print(
                f"{stage.name} {step + 1}/{schedule.steps} loss {recent:.5f} {pace:.3f} s/step",
                file=sys.stderr,
                flush=True,
            )
            reported = now
    save()
    return losses
