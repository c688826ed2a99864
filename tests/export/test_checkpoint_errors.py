"""Checkpoints that are not what they should be: one clear error that names the file or tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from export import assemble
from export.checkpoint import Checkpoint
from export.errors import CheckpointError
from tests.conftest import ALPHA
from tests.export.checkpoints import edit_json, edit_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to be damaged."""
    for name in ("mllm", "bifrost", "flux"):
        shutil.copytree(ALPHA / name, tmp_path / name)
    return tmp_path


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint(folder / "mllm", folder / "bifrost", folder / "flux")
    facts = assemble.facts(checkpoint)
    checkpoint.visual_branch()
    checkpoint.text_branch(48)
    checkpoint.refuse_left_overs()
    assert facts.num_visual_tokens == 16


def test_the_golden_checkpoint_reads(folder: Path) -> None:
    read_all(folder)


def test_a_missing_folder(folder: Path) -> None:
    shutil.rmtree(folder / "flux" / "vae")
    with pytest.raises(CheckpointError, match=r"vae/config.json: cannot be read"):
        read_all(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "mllm" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00004.safetensors: missing"):
        read_all(folder)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_shard(folder: Path, keep: int) -> None:
    shard = folder / "bifrost" / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors: not a complete"):
        read_all(folder)


def test_an_index_that_names_a_tensor_its_shard_lacks(folder: Path) -> None:
    path = folder / "bifrost" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["vision_head.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not in the shard that it names: vision_head.weight"):
        read_all(folder)


def test_an_index_that_points_out_of_its_folder(folder: Path) -> None:
    path = folder / "bifrost" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["vision_head.weight"] = "../mllm/model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_all(folder)


def test_a_tensor_of_a_wrong_shape(folder: Path) -> None:
    path = folder / "flux" / "vae" / "diffusion_pytorch_model.safetensors"
    key = "decoder.conv_in.bias"
    edit_tensors(path, lambda t: t.update({key: torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=rf"{key}: expected \[32\], found \[7\]"):
        read_all(folder)


def test_missing_and_unexpected_tensors_are_listed(folder: Path) -> None:
    path = folder / "bifrost" / "flux_controlnet" / "diffusion_pytorch_model.safetensors"

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["controlnet_blocks.0.gain"] = tensors.pop("controlnet_blocks.0.weight")

    edit_tensors(path, rename)
    with pytest.raises(CheckpointError, match=r"missing tensors: controlnet_blocks.0.weight"):
        read_all(folder)
    edit_tensors(
        path,
        lambda t: t.update({"controlnet_blocks.0.weight": t["controlnet_blocks.0.gain"].clone()}),
    )
    with pytest.raises(CheckpointError, match=r"unexpected tensors .*controlnet_blocks.0.gain"):
        read_all(folder)


def test_an_unexpected_tensor_among_the_branches(folder: Path) -> None:
    """As a variant with another head or more tokens would leave it."""
    path = folder / "bifrost" / "model-00002-of-00002.safetensors"
    index = folder / "bifrost" / "model.safetensors.index.json"
    edit_tensors(path, lambda t: t.update({"timestep_embedder.weight": torch.zeros(2, 2)}))
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "timestep_embedder.weight": path.name})
    with pytest.raises(CheckpointError, match=r"unexpected tensors .*timestep_embedder.weight"):
        read_all(folder)


def test_left_overs_of_training_are_no_error(folder: Path) -> None:
    path = folder / "bifrost" / "model-00002-of-00002.safetensors"
    index = folder / "bifrost" / "model.safetensors.index.json"
    names = ("vision_gen_vae_model.encoder.weight", "vision_language_model.visual.merger.ln_q.w")
    edit_tensors(path, lambda t: t.update({name: torch.zeros(2) for name in names}))
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | dict.fromkeys(names, path.name))
    read_all(folder)


def test_a_nan(folder: Path) -> None:
    path = folder / "flux" / "text_encoder" / "model.safetensors"
    key = "text_model.final_layer_norm.weight"
    edit_tensors(path, lambda t: t[key].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"tensor {key} holds NaN"):
        read_all(folder)


def test_a_tensor_that_is_not_floating_point(folder: Path) -> None:
    path = folder / "flux" / "vae" / "diffusion_pytorch_model.safetensors"
    edit_tensors(
        path, lambda t: t.update({"decoder.conv_in.bias": torch.zeros(32, dtype=torch.int8)})
    )
    with pytest.raises(CheckpointError, match="decoder.conv_in.bias is I8, expected F32"):
        read_all(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model_fsdp_0", "model.ckpt"])
def test_other_formats_are_refused_by_name(folder: Path, name: str) -> None:
    for path in (folder / "bifrost").glob("model*"):
        path.unlink()
    (folder / "bifrost" / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"found {name}"):
        read_all(folder)


def test_other_formats_beside_safetensors_are_reported(folder: Path) -> None:
    (folder / "bifrost" / "pytorch_model.bin").write_bytes(b"")
    checkpoint = Checkpoint(folder / "mllm", folder / "bifrost", folder / "flux")
    assert checkpoint.ignored_files == [str(folder / "bifrost" / "pytorch_model.bin")]


def test_two_models_in_one_folder(folder: Path) -> None:
    shutil.copy(
        folder / "bifrost" / "model-00001-of-00002.safetensors",
        folder / "bifrost" / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="holds both"):
        read_all(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision_pos_emb_type", "sincos"),
        ("use_discrete_visual_tokenizer", True),
        ("vision_head_type", "mlp"),
        ("use_2d_query_tokens", True),
        ("vision_denoising_type", "diffusion"),
        ("num_visual_gen_tokens", 64),
    ],
)
def test_an_unsupported_variant(folder: Path, key: str, value: object) -> None:
    edit_json(folder / "bifrost" / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=key):
        read_all(folder)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("mllm/config.json", {"rope_scaling": {"type": "yarn"}}, "'yarn' is not supported"),
        ("mllm/config.json", {"hidden_act": "gelu"}, "'gelu' is not supported"),
        ("bifrost/flux_controlnet/config.json", {"num_mode": 3}, "num_mode = 3"),
        ("bifrost/flux_controlnet/config.json", {"input_cond_dim": 32}, "latents of width 32"),
        ("flux/scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (
            "flux/scheduler/scheduler_config.json",
            {"_class_name": "DDIM"},
            "_class_name is 'DDIM', expected FlowMatch",
        ),
        ("flux/vae/config.json", {"latent_channels": 8}, "wrong shape"),
    ],
)
def test_a_configuration_that_does_not_fit(
    folder: Path, path: str, changes: dict, message: str
) -> None:
    edit_json(folder / path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)
        _ = Checkpoint(folder / "mllm", folder / "bifrost", folder / "flux").scheduler


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "bifrost" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bifrost/config.json: not JSON"):
        read_all(folder)
