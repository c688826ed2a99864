"""Random checkpoints: streamed, seeded, of the published shapes, readable by every loader."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.reference import Reference
from export.checkpoint import Checkpoint
from export.errors import BuildError, RecipeError
from export.synthesize import main, synthesize
from export.synthetic import networks, shards, tokenizers
from export.synthetic.shapes import PRESETS, Flux, Layout, Shapes
from export.synthetic.shards import Planned

TENSORS = [
    Planned("a.weight", (300, 40), 0.0, 0.5),
    Planned("a.count", (), 1000, 0.0),
    Planned("a.var", (50,), 1.0, 0.3, positive=True),
    Planned("b.weight", (7, 3), 1.0, 0.1),
]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_safetensors_reads_what_was_streamed(tmp_path: Path, dtype: str) -> None:
    size = shards.write(tmp_path / "x", "model", TENSORS, dtype, 1 << 20, seed=0)

    found = read(tmp_path / "x")
    assert size == sum(t.numel() * t.element_size() for t in found.values())
    assert {name: tuple(t.shape) for name, t in found.items()} == {t.name: t.shape for t in TENSORS}
    assert found["a.count"].item() == 1000
    weight = found["a.weight"].float()
    assert weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert abs(weight.mean().item()) < 0.02
    assert (found["a.var"] > 0).all()


def test_values_depend_on_seed_and_name_but_not_on_the_sharding(tmp_path: Path) -> None:
    for name, limit, seed in (("one/x", 1 << 20, 0), ("many/x", 1000, 0), ("other/x", 1 << 20, 1)):
        shards.write(tmp_path / name, "model", TENSORS, "fp32", limit, seed)
    one, many, other = (read(tmp_path / name / "x") for name in ("one", "many", "other"))
    index = json.loads((tmp_path / "many/x/model.safetensors.index.json").read_text())

    assert len(set(index["weight_map"].values())) > 1
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert not torch.equal(one["a.weight"], other["a.weight"])


def test_a_tensor_larger_than_a_block_is_random_throughout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 1000)
    shards.write(tmp_path / "x", "model", TENSORS[:1], "fp32", 1 << 20, seed=0)

    weight = read(tmp_path / "x")["a.weight"].flatten()
    assert len(weight.unique()) > 11_900  # of 12,000: no block repeats another


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthesize(Shapes(), tmp_path / name, seed=5)

    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_the_loader_takes_every_tensor(tmp_path: Path) -> None:
    synthesize(Shapes(layout=Layout(shard_bytes=50_000)), tmp_path / "set")

    folder = tmp_path / "set"
    opened = Checkpoint(folder / "mllm", folder / "bifrost", folder / "flux")
    opened.text_branch(64)
    opened.visual_branch()
    opened.refuse_left_overs()
    assert opened.controlnet.controlnet_blocks[0].weight.std() > 0.1
    assert opened.controlnet.up_sampling_block.bn1.running_var.min() > 0
    for network in ("transformer", "vae", "clip", "t5"):
        assert getattr(opened, network) is not None


def test_every_weight_moves_the_image(tmp_path: Path) -> None:
    """Otherwise parity on such a checkpoint would prove nothing about the weight."""
    synthesize(Shapes(layout=Layout(dtype="fp32")), tmp_path / "set", seed=2)
    folders = (str(tmp_path / "set" / name) for name in ("mllm", "bifrost", "flux"))
    reference = Reference(*folders, mllm_max_length=64, t5_max_length=8)
    opened = reference.checkpoint
    trained = {
        "mllm": reference.mllm,
        **{n: getattr(opened, n) for n in ("controlnet", "transformer", "vae", "clip", "t5")},
    }
    for network in trained.values():
        network.requires_grad_(True)
    result = Reference.run.__wrapped__(  # with gradients
        reference,
        ["a red boat", "two old houses"],
        order=torch.stack([torch.arange(16)] * 2),
        latents=torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)),
        decoding_steps=2,
        cfg_weight=2.0,
        num_inference_steps=2,
        guidance_scale=3.5,
        controlnet_conditioning_scale=0.7,
    )
    result.image.square().sum().backward()

    still = {
        f"{name}.{parameter}"
        for name, network in trained.items()
        for parameter, value in network.named_parameters()
        if value.grad is None or value.grad.abs().max() < 1e-3
    }
    last = "mllm.layers.1"
    # the text branch's last layer ends at its keys and values; a bias that all keys share falls
    # out of the softmax
    assert still == {
        f"{last}.post_attention_layernorm.weight",
        *(f"{last}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"{last}.self_attn.{part}" for part in ("q_proj.weight", "q_proj.bias", "o_proj.weight")),
        "clip.encoder.layers.0.self_attn.k_proj.bias",
        "vae.decoder.mid_block.attentions.0.to_k.bias",
        "t5.shared.weight",  # read under its other name
    }


def test_7b_has_the_published_sizes() -> None:
    shapes = PRESETS["7b"]

    def billions(planned: list[Planned], *parts: str) -> float:
        chosen = (t for t in planned if not parts or any(part in t.name for part in parts))
        return sum(math.prod(t.shape) for t in chosen) / 1e9

    visual = [t for t in networks.bifrost(shapes) if "vision_branch" in t.name]
    assert billions(visual) == pytest.approx(6.53, abs=0.01)
    assert billions(networks.mllm(shapes)) == pytest.approx(8.29, abs=0.01)
    transformer = networks.transformer(shapes)
    assert billions(transformer) == pytest.approx(11.90, abs=0.01)
    modulation = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")
    assert billions(transformer, *modulation) == pytest.approx(3.25, abs=0.01)
    assert billions(networks.controlnet(shapes)) == pytest.approx(1.18, abs=0.01)
    assert billions(networks.t5(shapes)) == pytest.approx(4.76, abs=0.01)
    assert billions(networks.clip(shapes)) == pytest.approx(0.123, abs=0.001)
    assert billions(networks.vae(shapes)) == pytest.approx(0.084, abs=0.001)


def test_3b_has_no_head_of_its_own() -> None:
    shapes = PRESETS["3b"]
    planned = networks.mllm(shapes)

    assert not [t for t in planned if "lm_head" in t.name]
    assert sum(math.prod(t.shape) for t in planned) / 1e9 == pytest.approx(3.75, abs=0.01)


def test_cut_shortens_every_network() -> None:
    cut = PRESETS["7b"].cut(1)

    for planned in (networks.bifrost(cut), networks.transformer(cut), networks.t5(cut)):
        assert not [t for t in planned if "layers.1." in t.name or "s.1." in t.name]
    assert cut.transformer == replace(PRESETS["7b"].transformer, double_blocks=1, single_blocks=1)


@pytest.mark.parametrize("tokenizer", [tokenizers.qwen, tokenizers.clip, tokenizers.t5])
def test_tokenizers_make_words_of_many_letters(tokenizer) -> None:
    encoding = tokenizer().encode("a red apple and two boats", add_special_tokens=False)
    assert len(encoding.ids) <= 12


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(BuildError, match="not empty"):
        synthesize(Shapes(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="must be equal"):
        Shapes(controlnet=Flux(heads=3))
    with pytest.raises(RecipeError, match="square"):
        Shapes(visual_tokens=15)
    with pytest.raises(RecipeError, match="merges 'rows' is unknown"):
        Layout(merges="rows")
    with pytest.raises(RecipeError, match=r"clip.vocab is 300, its tokenizer has"):
        synthesize(Shapes(clip=replace(Shapes().clip, vocab=300)), tmp_path / "x")


def test_the_command_line_writes_a_checkpoint_and_names_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "set")
    assert main(["--output", output, "--layers", "1", "--dtype", "fp16"]) == 0
    assert capsys.readouterr().out.strip() == output
    assert main(["--output", output]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["--output", f"{output}2", "--like", "7"]) == 1
    assert "known: 7b, 3b, bench, tiny" in capsys.readouterr().err
    assert main(["--output", f"{output}2", "--layers", "0"]) == 1
    assert "layers must be at least 1" in capsys.readouterr().err
