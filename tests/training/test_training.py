"""Every stage takes a few steps at toy size; a killed run ends where an uninterrupted one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint
from training.captioner import GRID, Captioner, CaptionerStage, patches
from training.config import TINY, Schedule
from training.flux import FluxModel
from training.loop import train
from training.pool import pack, unpack
from training.run import STAGES, run
from training.sample import draw, sigmas
from training.vae import VaeStage
from training.visual import decode, trained_branches


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage for two steps, published."""
    out = tmp_path_factory.mktemp("run")
    run(TINY, out, list(STAGES), steps=2, target=out / "published")
    return out


def _losses(out: Path, name: str) -> list[float]:
    losses: list[float] = torch.load(out / f"{name}.state", weights_only=True)["losses"]
    return losses


def test_every_stage_trains_and_is_plotted(trained: Path) -> None:
    for name in STAGES:
        assert len(_losses(trained, name)) == 2
        assert np.isfinite(_losses(trained, name)).all()
    assert (trained / "losses.png").stat().st_size > 1000


def test_the_published_folders_hold_every_network(trained: Path) -> None:
    folder = trained / "published"
    checkpoint = Checkpoint(folder / "mllm", folder / "bifrost", folder / "flux")
    text, visual = trained_branches(TINY, trained)
    saved = dict(checkpoint.text_branch(96).named_parameters())
    saved |= {f"visual.{n}": p for n, p in checkpoint.visual_branch().named_parameters()}
    kept = dict(text.named_parameters())
    kept |= {f"visual.{n}": p for n, p in visual.named_parameters()}
    assert saved.keys() == kept.keys()
    for name, parameter in saved.items():
        torch.testing.assert_close(parameter.float(), kept[name], rtol=0.01, atol=1e-4)
    checkpoint.refuse_left_overs()
    assert checkpoint.num_visual_tokens == GRID * GRID
    for network in (checkpoint.controlnet, checkpoint.transformer, checkpoint.vae):
        assert all(p.isfinite().all() for p in network.parameters())
    assert checkpoint.clip.config.vocab_size
    assert checkpoint.t5.config.vocab_size


def test_a_trained_run_draws(trained: Path) -> None:
    text, visual = trained_branches(TINY, trained)
    tokens = decode(text, visual, ["a red circle", "a cross"], np.random.default_rng(0), steps=5)
    assert tokens.shape == (2, GRID * GRID, TINY.hidden)
    assert tokens.isfinite().all()
    pool = {"latents": torch.zeros(1, 8, 16, 16), "scale": torch.ones(()), "shift": torch.ones(())}
    stage = VaeStage(TINY, trained)
    images = draw(FluxModel(TINY).eval(), stage.module.eval(), pool, ["a cross"], 0, steps=2)
    assert images.shape == (1, 128, 128, 3)


@pytest.mark.parametrize("name", ["captioner", "controlnet"])
def test_a_resumed_run_equals_a_whole_one(trained: Path, tmp_path: Path, name: str) -> None:
    schedule = Schedule(steps=3, batch=2, lr=1e-3, warmup=1, muon=True)
    runs = []
    for pieces in ((3,), (1, 2)):
        out = tmp_path / str(len(pieces))
        for steps in pieces:
            torch.manual_seed(0)
            stage = STAGES[name](TINY, trained)
            train(stage, schedule, out, TINY.seed, steps)
        runs.append(torch.load(out / f"{name}.state", weights_only=True))
    whole, resumed = runs
    assert whole["losses"] == resumed["losses"]
    for key, value in whole["average"].items():
        assert torch.equal(value, resumed["average"][key]), key


def test_folding_the_normalisation_changes_nothing() -> None:
    torch.manual_seed(0)
    captioner = Captioner(TINY)
    images = torch.rand(6, 3, 128, 128) * 2 - 1
    captioner.train()
    captioner.latents(images)
    captioner.eval()
    with torch.no_grad():
        before = captioner.latents(images)
        captioner.fold()
        torch.testing.assert_close(captioner.latents(images), before, rtol=1e-3, atol=1e-4)


def test_patches_come_in_merge_groups() -> None:
    """Four neighbours in a row of `patches` make one patch latent of 32 px."""
    image = torch.zeros(1, 3, 128, 128)
    image[:, :, 32:64, 96:128] = 1
    lit = patches(image).mean(1).view(GRID * GRID, 4)
    assert lit[GRID + 3].tolist() == [1, 1, 1, 1]
    assert lit.sum() == 4


def test_packing_is_undone_and_sigmas_are_flux_s() -> None:
    latents = torch.randn(2, 8, 16, 16)
    assert torch.equal(unpack(pack(latents), 16), latents)
    levels = sigmas(28)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert levels == sorted(levels, reverse=True)


def test_the_captioner_never_hears_a_heldout_prompt() -> None:
    from scenes.heldout import heldout_prompts
    from scenes.sampling import training_spec
    from training.pool import wording

    rng = np.random.default_rng(0)
    heard = {wording(training_spec(rng), rng) for _ in range(2000)}
    assert not heard & heldout_prompts()
    assert (
        CaptionerStage(TINY, Path()).frame.count(
            CaptionerStage(TINY, Path()).tokenizer.token_to_id("<|image_pad|>")
        )
        == GRID * GRID
    )
