"""The recipe's one command.

    python -m training.run --out DIR [--stage NAME] [--steps N] [--minutes M] [--publish DIR]

Without `--stage` every stage runs in order and the checkpoint is published to `--publish`.
Killed at any point, the same command goes on where it stopped; `--steps` and `--minutes` limit
each stage of this call only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch

from bifrost_rt.files import atomic_write
from training.captioner import CaptionerStage, latent_pool
from training.config import TINY, Config
from training.controlnet import ControlStage
from training.decoder import DecoderStage
from training.flux import FluxStage
from training.loop import Stage, read, train
from training.pool import vae_pool
from training.publish import publish
from training.vae import VaeStage
from training.visual import VisualStage

matplotlib.use("Agg")

STAGES: dict[str, Callable[[Config, Path], Stage]] = {
    "vae": VaeStage,
    "decoder": DecoderStage,
    "captioner": CaptionerStage,
    "flux": FluxStage,
    "visual": VisualStage,
    "controlnet": ControlStage,
}


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """One panel per stage: every loss, and their running mean."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(losses), figsize=(4 * len(losses), 3), squeeze=False)
    for panel, (name, values) in zip(panels[0], losses.items(), strict=True):
        panel.plot(values, linewidth=0.3, alpha=0.5)
        window = max(1, len(values) // 50)
        means = [
            sum(values[max(0, i - window) : i]) / min(i, window)
            for i in range(1, len(values) + 1, max(1, window // 4))
        ]
        panel.plot(range(1, len(values) + 1, max(1, window // 4)), means)
        panel.set(title=name, xlabel="step", yscale="log")
    figure.tight_layout()
    with atomic_write(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    pyplot.close(figure)


def past_losses(out: Path) -> dict[str, list[float]]:
    """Return the losses of every stage that has a state in `out`."""
    states = {name: out / f"{name}.state" for name in STAGES}
    return {name: read(path)["losses"] for name, path in states.items() if path.exists()}


def run(
    config: Config,
    out: Path,
    stages: list[str],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    target: Path | None = None,
    fast: bool = False,
) -> None:
    """Trains the stages in order, plots, and publishes to `target` where one is given.

    Args:
        fast: compile the repeated blocks first; needs a C++ compiler.
    """
    for name in stages:
        torch.manual_seed(config.seed)  # of the initial weights; a resumed run overwrites them
        stage = STAGES[name](config, out)
        if fast and isinstance(stage, FluxStage | ControlStage):
            stage.compile()
        train(stage, config.schedules[name], out, config.seed, steps, minutes)
        plot(past_losses(out), out / "losses.png")
        # Encode at once what later stages learn from, so that they can start side by side.
        if name == "vae":
            vae_pool(config, out)
        if name == "captioner":
            latent_pool(config, out)
    if target is not None:
        publish(config, out, target)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="states, pools and the loss plot")
    parser.add_argument("--stage", choices=tuple(STAGES), action="append", help="default: all")
    parser.add_argument("--steps", type=int, help="at most this many per stage in this call")
    parser.add_argument("--minutes", type=float, help="at most this long per stage in this call")
    parser.add_argument("--publish", type=Path, help="folder for mllm/, bifrost/ and flux/")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where to train: cpu (default), cuda")
    parser.add_argument("--compile", action="store_true", help="faster steps, a slower start")
    parser.add_argument("--tiny", action="store_true", help="a toy model: checks the machinery")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_default_device(given.device)  # networks, batches and states follow
    given.out.mkdir(parents=True, exist_ok=True)
    run(
        TINY if given.tiny else Config(),
        given.out,
        given.stage or list(STAGES),
        steps=given.steps,
        minutes=given.minutes,
        target=given.publish,
        fast=given.compile,
    )


if __name__ == "__main__":
    main()
