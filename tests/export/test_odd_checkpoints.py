"""Checkpoints as people have them: what can be read is read as if it lay in the usual place, and
everything else is named as what it is, before any work is done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export.errors import CheckpointError
from tests.export.checkpoints import (
    DIFFUSERS,
    PARTS,
    edit_json,
    edit_tensors,
    opened,
    outline,
    shard,
)

# A change of a checkpoint; where it moves folders, it returns where they are.
Change = Callable[[Path], dict[str, Path] | None]
SAME: list[Change] = []
REFUSED: list[tuple[Change, tuple[str, ...]]] = []
BOM = b"\xef\xbb\xbf"


def same(change: Change) -> Change:
    """The checkpoint is read as if nothing had been changed."""
    SAME.append(change)
    return change


def refused(*parts: str) -> Callable[[Change], Change]:
    """One error that holds all these parts."""

    def take(change: Change) -> Change:
        REFUSED.append((change, parts))
        return change

    return take


@same
def a_sole_variant(root: Path) -> None:
    for part in ("vae", "transformer"):
        folder = root / "flux" / part
        (folder / f"{DIFFUSERS}.safetensors").rename(folder / f"{DIFFUSERS}.fp16.safetensors")
    for part in ("text_encoder", "text_encoder_2"):
        folder = root / "flux" / part
        (folder / "model.safetensors").rename(folder / "model.bf16.safetensors")


@same
def a_sharded_variant(root: Path) -> None:
    shard(
        root / "flux/transformer", DIFFUSERS,
        "{stem}.fp16-{i:05d}-of-00002.safetensors", "{stem}.safetensors.index.fp16.json",
    )  # fmt: skip


@same
def a_sharded_variant_as_old_versions_wrote_it(root: Path) -> None:
    names = "{stem}-{i:05d}-of-00002.fp16.safetensors"
    shard(root / "flux/transformer", DIFFUSERS, names, None)


@same
def the_model_beside_a_variant(root: Path) -> None:
    file = root / "flux/vae" / f"{DIFFUSERS}.safetensors"
    file.with_name(f"{DIFFUSERS}.ema.safetensors").write_bytes(b"not looked at")


@same
def shards_without_an_index(root: Path) -> None:
    shard(root / "mllm", "model", index=None)


@same
def shards_that_are_counted_from_zero(root: Path) -> None:
    for i in (1, 2):
        shard(root / "mllm", "model", index=None) if i == 1 else None
        name = f"model-{i:05d}-of-00002.safetensors"
        (root / "mllm" / name).rename(root / "mllm" / name.replace(f"{i:05d}", f"{i - 1:05d}", 1))


@same
def shards_in_a_folder_of_their_own(root: Path) -> None:
    index = shard(root / "bifrost", "model")
    assert index is not None
    (root / "bifrost/weights").mkdir()
    for file in (root / "bifrost").glob("model-0*"):
        file.rename(root / "bifrost/weights" / file.name)
    listed = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={key: f"weights/{name}" for key, name in listed.items()})


@same
def an_index_that_lists_fewer_tensors(root: Path) -> None:
    index = shard(root / "bifrost", "model")
    assert index is not None
    listed = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=dict(sorted(listed.items())[::3]))


@same
def a_controlnet_saved_as_model(root: Path) -> None:
    folder = root / "bifrost/flux_controlnet"
    (folder / f"{DIFFUSERS}.safetensors").rename(folder / "model.safetensors")


@same
def single_files_beside_the_folders(root: Path) -> None:
    shutil.copy(root / "mllm/model.safetensors", root / "mllm/consolidated.safetensors")
    (root / "flux/flux1-dev.safetensors").write_bytes(b"not looked at")


@same
def the_layout_of_a_hub_cache(root: Path) -> dict[str, Path]:
    """Every file is a link into a folder of blobs."""
    snapshots = {}
    for part in PARTS:
        model = root / "hub" / f"models--org--{part}"
        snapshots[part] = model / "snapshots/0123abcd"
        (model / "refs").mkdir(parents=True)
        (model / "refs/main").write_text("0123abcd")
        (model / "blobs").mkdir()
        for file in [f for f in (root / part).rglob("*") if f.is_file()]:
            blob = model / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            link = snapshots[part] / file.relative_to(root / part)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
        shutil.rmtree(root / part)
    return snapshots


@same
def a_clip_config_as_clipmodel_writes_it(root: Path) -> None:
    path = root / "flux/text_encoder/config.json"
    text = json.loads(path.read_text())
    del text["architectures"]
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 16}
    path.write_text(json.dumps({**whole, "text_config": text, "vision_config": {}}))


@same
def whole_text_encoders(root: Path) -> None:
    """With what belongs to the rest of CLIP and T5."""
    clip, t5 = root / "flux/text_encoder", root / "flux/text_encoder_2"
    edit_json(clip / "config.json", architectures=["CLIPTextModelWithProjection"])
    edit_json(t5 / "config.json", architectures=["T5ForConditionalGeneration"])
    others = {name: torch.zeros(2) for name in ("text_projection.weight", "logit_scale")}
    edit_tensors(clip / "model.safetensors", lambda t: t.update(others))
    decoder = {name: torch.zeros(2) for name in ("decoder.block.0.w", "lm_head.weight")}
    edit_tensors(t5 / "model.safetensors", lambda t: t.update(decoder))


@same
def integers_where_floats_are_usual(root: Path) -> None:
    edit_json(root / "flux/text_encoder_2/config.json", initializer_factor=1, dropout_rate=0)
    edit_json(root / "flux/text_encoder/config.json", initializer_factor=1, attention_dropout=0)
    edit_json(root / "mllm/config.json", rope_theta=1000000)


@same
def whole_numbers_written_as_floats(root: Path) -> None:
    path = root / "flux/transformer/config.json"
    whole = {k: v for k, v in json.loads(path.read_text()).items() if type(v) is int}
    edit_json(path, **{key: float(value) for key, value in whole.items()})


@same
def keys_of_other_versions(root: Path) -> None:
    flash = {"_attn_implementation": "flash_attention_2", "attn_implementation": "x", "dtype": 5}
    for part in ("mllm", "flux/text_encoder", "flux/text_encoder_2", "flux/vae", "bifrost"):
        edit_json(root / part / "config.json", **flash, _attn_implementation_autoset=True)
    edit_json(root / "flux/vae/config.json", sample_size=[512, 512], force_upcast="yes")


@same
def identities_that_older_tools_leave_out(root: Path) -> None:
    gone: dict[str, Any] = {"model_type": ..., "architectures": ..., "_class_name": ...}
    for path in root.rglob("config.json"):
        edit_json(path, **gone)
    (root / "flux/model_index.json").unlink()


@same
def a_text_config_of_null(root: Path) -> None:
    edit_json(root / "mllm/config.json", text_config=None)


@same
def no_limit_of_tokens(root: Path) -> None:
    config = root / "flux/tokenizer/tokenizer_config.json"
    edit_json(config, model_max_length=1000000000000000019884624838656)


@same
def a_base_model_in_4_bit_that_nothing_is_needed_of(root: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("q_proj.weight")]:
            packed = torch.zeros(tensors.pop(name).shape[1], 1, dtype=torch.int32)
            tensors[name.replace(".weight", ".qweight")] = packed

    edit_tensors(root / "mllm/model.safetensors", pack)


@same
def folders_with_names_in_many_scripts(root: Path) -> dict[str, Path]:
    elsewhere = root / "My Models (v1) #2 %20 ünï 模型"
    elsewhere.mkdir()
    for part in PARTS:
        (root / part).rename(elsewhere / part)
    return {part: elsewhere / part for part in PARTS}


@same
def a_chat_template_with_windows_line_ends(root: Path) -> None:
    """transformers opens it as text, which gives plain line ends."""
    template = json.loads((root / "mllm/chat_template.json").read_text())["chat_template"]
    path = root / "mllm/chat_template.jinja"
    path.write_bytes(BOM + template.replace("\n", "\r\n").encode())


@same
def a_chat_template_among_others(root: Path) -> None:
    path = root / "mllm/chat_template.json"
    template = json.loads(path.read_text())["chat_template"]
    others = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    edit_json(path, chat_template=others)


@refused("adapter_model.safetensors", "LoRA adapter without its base", "merge_and_unload")
def an_adapter_alone(root: Path) -> None:
    (root / "bifrost/model.safetensors").rename(root / "bifrost/adapter_model.safetensors")
    (root / "bifrost/adapter_config.json").write_text('{"peft_type": "LORA"}')


@refused("LoRA adapter without its base", "merge_and_unload")
def an_adapter_without_a_config(root: Path) -> None:
    (root / "bifrost/config.json").rename(root / "bifrost/adapter_config.json")


@refused("flux/transformer", "not merged", "to_k.base_layer.bias", "fuse_lora")
def adapters_that_were_not_merged(root: Path) -> None:
    def split(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".attn.to_k." in n]:
            tensors[name.replace("to_k.", "to_k.base_layer.")] = tensors.pop(name)

    edit_tensors(root / "flux/transformer" / f"{DIFFUSERS}.safetensors", split)


@refused("missing tensors", "'_orig_mod.'", "torch.compile")
def a_model_saved_while_it_was_compiled(root: Path) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    edit_tensors(root / "flux/transformer" / f"{DIFFUSERS}.safetensors", wrap)


@refused("missing tensors: model.layers.0.self_attn.q_proj.weight", "4 bit")
def a_base_model_in_4_bit(root: Path) -> None:
    a_base_model_in_4_bit_that_nothing_is_needed_of(root)
    name = "vision_language_model.model.layers.0.self_attn.q_proj.weight"
    edit_tensors(root / "bifrost/model.safetensors", lambda t: t.pop(name))


@refused("several variants", "bf16, fp16")
def two_variants(root: Path) -> None:
    file = root / "flux/vae" / f"{DIFFUSERS}.safetensors"
    shutil.copy(file, file.with_name(f"{DIFFUSERS}.bf16.safetensors"))
    file.rename(file.with_name(f"{DIFFUSERS}.fp16.safetensors"))


@refused("shard 2 of 2 is missing", "model-00001-of-00002.safetensors")
def a_missing_shard_without_an_index(root: Path) -> None:
    shard(root / "mllm", "model", index=None)
    (root / "mllm/model-00002-of-00002.safetensors").unlink()


@refused("shards of several models", "of-00002", "of-00003")
def shards_of_two_models(root: Path) -> None:
    shard(root / "mllm", "model", index=None)
    (root / "mllm/model-00003-of-00003.safetensors").write_bytes(b"")


@refused("holds tensor", "and so does model-00001-of-00002.safetensors")
def a_tensor_in_two_shards(root: Path) -> None:
    shard(root / "mllm", "model", index=None)
    for i in (1, 2):
        file = root / f"mllm/model-{i:05d}-of-00002.safetensors"
        edit_tensors(file, lambda t: t.update({"model.more": torch.zeros(1)}))


@refused("model-00001-of-00004.safetensors: missing", "index.json lists it")
def an_index_of_other_shards(root: Path) -> None:
    index = shard(root / "mllm", "model")
    assert index is not None
    index.write_text(index.read_text().replace("-of-00002", "-of-00004"))


@refused("weight_map is [", "expected an object")
def an_index_without_a_map(root: Path) -> None:
    index = shard(root / "mllm", "model")
    assert index is not None
    edit_json(index, weight_map=list(json.loads(index.read_text())["weight_map"]))


@refused("found flux1-dev.safetensors", f"name it {DIFFUSERS}.safetensors")
def weights_under_a_name_of_their_own(root: Path) -> None:
    folder = root / "flux/transformer"
    (folder / f"{DIFFUSERS}.safetensors").rename(folder / "flux1-dev.safetensors")


def _instead(place: str, content: bytes) -> Change:
    def change(root: Path) -> None:
        (root / place).write_bytes(content)

    return change


VAE_WEIGHTS = f"flux/vae/{DIFFUSERS}.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 9983040304\n"
PAGE = b"\n<!DOCTYPE html><html>Access to model is restricted</html>"
for place in (
    VAE_WEIGHTS,
    "flux/vae/config.json",
    "mllm/tokenizer.json",
    "flux/tokenizer/vocab.json",
):
    REFUSED += [
        (_instead(place, POINTER), (place, "a Git LFS pointer", "git lfs pull")),
        (_instead(place, PAGE), (place, "a web page", "hf auth login")),
        (_instead(place, b""), (place, "empty", "download it again")),
    ]
REFUSED += [
    (
        _instead(VAE_WEIGHTS, b"PK\x03\x04..."),
        (VAE_WEIGHTS, "PyTorch pickle", "safe_serialization"),
    ),
    (_instead("mllm/config.json", '{"a": 1}'.encode("utf-16")), ("mllm/config.json", "UTF-16")),
    (_instead("mllm/config.json", b"[" * 100_000), ("mllm/config.json", "not JSON")),
    (_instead("flux/vae/config.json", b"[]"), ("flux/vae/config.json", "object, found []")),
    (_instead("mllm/chat_template.json", b'{"chat_template": "{% if"}'), ("cannot be rendered",)),
    (_instead("mllm/chat_template.json", b'{"chat_template": 5}'), ("chat_template is 5",)),
    (_instead("mllm/chat_template.json", b'{"chat_template": [5]}'), ("chat_template is [5]",)),
]


@refused(VAE_WEIGHTS, "a link to ../../blobs/deadbeef, which is not there", "cp -rL")
def a_dangling_link(root: Path) -> None:
    (root / VAE_WEIGHTS).unlink()
    (root / VAE_WEIGHTS).symlink_to("../../blobs/deadbeef")


@refused("flux/vae/config.json", "a link to ../../blobs/deadbeef, which is not there")
def a_config_that_is_a_dangling_link(root: Path) -> None:
    (root / "flux/vae/config.json").unlink()
    (root / "flux/vae/config.json").symlink_to("../../blobs/deadbeef")


@refused("mllm/tokenizer.json", "a link to nowhere, which is not there")
def a_tokenizer_that_is_a_dangling_link(root: Path) -> None:
    (root / "mllm/tokenizer.json").unlink()
    (root / "mllm/tokenizer.json").symlink_to("nowhere")


@refused(VAE_WEIGHTS, "a folder, not a file")
def a_folder_in_the_place_of_a_file(root: Path) -> None:
    (root / VAE_WEIGHTS).unlink()
    (root / VAE_WEIGHTS).mkdir()


@refused("Qwen/Qwen2.5-VL-7B-Instruct: no such folder", "hf download Qwen/Qwen2.5-VL-7B-Instruct")
def the_name_of_a_model_on_the_hub(root: Path) -> dict[str, Path]:
    return {"mllm": Path("Qwen/Qwen2.5-VL-7B-Instruct")}


@refused("no such folder", "hf download black-forest-labs/FLUX.1-dev ")
def the_address_of_a_model_on_the_hub(root: Path) -> dict[str, Path]:
    return {"flux": Path("https://huggingface.co/black-forest-labs/FLUX.1-dev")}


@refused("no such folder", "hf download Qwen/Qwen2.5-VL-7B-Instruct ")
def the_name_of_a_model_in_a_recipe(root: Path) -> dict[str, Path]:
    return {"mllm": root / "Qwen/Qwen2.5-VL-7B-Instruct"}


@refused("none: no such folder", "give the flux folder")
def a_folder_that_is_not_there(root: Path) -> dict[str, Path]:
    return {"flux": root / "none"}


@refused("cache of the Hugging Face hub", "models--org--bifrost/snapshots/0123abcd")
def the_root_of_a_hub_cache(root: Path) -> dict[str, Path]:
    snapshots = the_layout_of_a_hub_cache(root)
    return {part: snapshot.parents[1] for part, snapshot in snapshots.items()} | {
        "mllm": snapshots["mllm"]
    }


@refused("a single file of FLUX (flux1-dev.safetensors)", "give the file itself")
def a_single_file_in_a_folder(root: Path) -> None:
    shutil.rmtree(root / "flux")
    (root / "flux").mkdir()
    (root / "flux/flux1-dev.safetensors").write_bytes(b"")


@refused("flux1-dev.safetensors: a single file of FLUX", "--flux-configs", "tokenizer_2/")
def a_single_file(root: Path) -> dict[str, Path]:
    (root / "flux1-dev.safetensors").write_bytes(b"")
    return {"flux": root / "flux1-dev.safetensors"}


@refused("one network's folder, not a pipeline's")
def the_transformer_in_the_place_of_flux(root: Path) -> dict[str, Path]:
    return {"flux": root / "flux/transformer"}


@refused("the folder above: it holds mllm/", "give ")
def the_folder_above(root: Path) -> dict[str, Path]:
    return {"mllm": root}


@refused("a diffusers pipeline folder", "give it as --flux, not as --mllm")
def flux_in_the_place_of_mllm(root: Path) -> dict[str, Path]:
    return {"mllm": root / "flux"}


@refused("model_type is 'qwen2_5_vl', expected multi_modality", "bifrost and mllm swapped")
def swapped_folders(root: Path) -> dict[str, Path]:
    return {"mllm": root / "bifrost", "bifrost": root / "mllm"}


@refused("text_encoder_2/config.json", "model_type is 'clip_text_model'", "swapped")
def swapped_text_encoders(root: Path) -> None:
    flux = root / "flux"
    (flux / "text_encoder").rename(flux / "aside")
    (flux / "text_encoder_2").rename(flux / "text_encoder")
    (flux / "aside").rename(flux / "text_encoder_2")


@refused("tokenizer's largest id is", "MLLM has 640 embeddings")
def a_tokenizer_of_a_larger_model(root: Path) -> None:
    path = root / "mllm/tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"]["ünseen"] = 5000
    path.write_text(json.dumps(document))


@refused("learnable_pos_emb has the shape [16], expected 3 dimensions")
def a_tensor_of_another_rank(root: Path) -> None:
    edit_tensors(
        root / "bifrost/model.safetensors", lambda t: t.update(learnable_pos_emb=torch.zeros(16))
    )


def _name(value: object) -> str | None:
    return getattr(value, "__name__", None) if callable(value) else None


@pytest.mark.parametrize("change", SAME, ids=_name)
def test_it_is_read_as_usual(change: Change, root: Path, tiny_outline: dict[str, Any]) -> None:
    folders = change(root) or {}
    assert outline(opened(root, **folders)) == tiny_outline


@pytest.mark.parametrize(
    ("change", "parts"), REFUSED, ids=lambda v: _name(v) if callable(v) else v[0][:40]
)
def test_it_is_named_as_what_it_is(change: Change, parts: tuple[str, ...], root: Path) -> None:
    folders = change(root) or {}
    with pytest.raises(CheckpointError) as caught:
        outline(opened(root, **folders))
    for part in parts:
        assert part in str(caught.value)


def test_every_text_file_may_begin_with_a_byte_order_mark(
    root: Path, tiny_outline: dict[str, Any]
) -> None:
    shard(root / "mllm", "model")
    marked = [f for f in root.rglob("*") if f.suffix in (".json", ".txt", ".jinja")]
    assert {f.name for f in marked} >= {
        "config.json", "tokenizer_config.json", "special_tokens_map.json", "model_index.json",
        "scheduler_config.json", "chat_template.json", "tokenizer.json", "vocab.json",
        "merges.txt", "model.safetensors.index.json",
    }  # fmt: skip
    for file in marked:
        file.write_bytes(BOM + file.read_bytes())
    assert outline(opened(root)) == tiny_outline
