"""FLUX in other files than diffusers' folders gives the same modules with the same values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bifrost_rt import manifest
from export.build import build
from export.checkpoint import Checkpoint
from export.dialects import autoencoder, float8, gguf_file, t5
from export.dialects import flux as authors
from export.errors import CheckpointError
from export.flux_files import FluxFiles
from export.plan import main as plan
from export.recipe import Recipe
from export.synthesize import synthesize
from export.synthetic.shapes import Encoder, Flux, Shapes
from export.weights import Weights
from tests.export.checkpoints import DIFFUSERS, opened, outline

gguf = pytest.importorskip("gguf")
Tensors = dict[str, torch.Tensor]


def transformer(diffusers: Tensors) -> Tensors:
    """diffusers' names -> the authors'."""
    t, found = dict(diffusers), {}

    def move(new: str, *old: str, leaf: str = "") -> None:
        for end in ("weight", "bias") if not leaf else ("weight",):
            joined = torch.cat([t.pop(f"{name}.{end}") for name in old])
            found[f"{new}.{leaf or end}"] = joined

    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for ours_layer, theirs_layer in (("linear_1", "in_layer"), ("linear_2", "out_layer")):
            move(f"{theirs}_in.{theirs_layer}", f"time_text_embed.{ours}_embedder.{ours_layer}")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    for end in ("weight", "bias"):
        scale, shift = t.pop(f"norm_out.linear.{end}").chunk(2)
        found[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    one, two = "transformer_blocks.0.", "double_blocks.0."
    for ours, theirs, q, k, v, out, norm, mlp in (
        ("norm1", "img", "to_q", "to_k", "to_v", "to_out.0", "norm_", "ff"),
        ("norm1_context", "txt", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
         "norm_added_", "ff_context"),
    ):  # fmt: skip
        move(f"{two}{theirs}_mod.lin", f"{one}{ours}.linear")
        move(f"{two}{theirs}_attn.qkv", *(f"{one}attn.{n}" for n in (q, k, v)))
        move(f"{two}{theirs}_attn.proj", f"{one}attn.{out}")
        move(f"{two}{theirs}_attn.norm.query_norm", f"{one}attn.{norm}q", leaf="scale")
        move(f"{two}{theirs}_attn.norm.key_norm", f"{one}attn.{norm}k", leaf="scale")
        move(f"{two}{theirs}_mlp.0", f"{one}{mlp}.net.0.proj")
        move(f"{two}{theirs}_mlp.2", f"{one}{mlp}.net.2")
    one, two = "single_transformer_blocks.0.", "single_blocks.0."
    move(f"{two}modulation.lin", f"{one}norm.linear")
    joined = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    move(f"{two}linear1", *(one + name for name in joined))
    move(f"{two}linear2", f"{one}proj_out")
    move(f"{two}norm.query_norm", f"{one}attn.norm_q", leaf="scale")
    move(f"{two}norm.key_norm", f"{one}attn.norm_k", leaf="scale")
    assert not t, t.keys()
    return found


def vae(diffusers: Tensors) -> Tensors:
    """diffusers' names of two blocks -> the authors'."""
    found = {}
    for name, value in diffusers.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("up_blocks.0.", "up.ONE.").replace("up_blocks.1.", "up.0.")
        new = new.replace("up.ONE.", "up.1.").replace("upsamplers.0", "upsample")
        new = new.replace("down_blocks.", "down.").replace("downsamplers.0", "downsample")
        if ".up." in new or ".down." in new:
            new = new.replace("resnets", "block")
        new = new.replace("mid_block.resnets.0", "mid.block_1")
        new = new.replace("mid_block.resnets.1", "mid.block_2")
        if "attentions" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = new.replace("to_", "")
            value = value[:, :, None, None] if value.dim() == 2 else value
        found[new] = value
    return found


GGUF_T5 = {
    "layer.0.layer_norm": "attn_norm", "SelfAttention.q": "attn_q", "SelfAttention.k": "attn_k",
    "SelfAttention.v": "attn_v", "SelfAttention.o": "attn_o", "attention_bias": "attn_rel_b",
    "layer.1.layer_norm": "ffn_norm", "wi_0": "ffn_gate", "wi_1": "ffn_up", "wo": "ffn_down",
}  # fmt: skip


def t5_in_gguf(transformers: Tensors) -> Tensors:
    """transformers' names of one block -> GGUF's."""
    names = {"shared.weight": "token_embd.weight"}
    names["encoder.final_layer_norm.weight"] = "enc.output_norm.weight"
    for name in transformers.keys() - names.keys():
        [short] = [new for end, new in GGUF_T5.items() if name.endswith(f"{end}.weight")]
        names[name] = f"enc.blk.0.{short}.weight"
    return {names[name]: value for name, value in transformers.items()}


def write_gguf(path: Path, tensors: Tensors, kind: str = "F32") -> Tensors:
    """Write a file; what is no multiple of a block stays in float32. The package cannot quantize to
    Q4_K, so blocks of that type are random.

    Returns:
        What the package dequantizes.
    """
    writer, values = gguf.GGUFWriter(path, "flux"), {}
    codes = np.random.default_rng(0)
    for name, value in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        fits = value.shape[-1] % block == 0 and value.dim() > 1
        number = number if fits else gguf.GGMLQuantizationType.F32
        if fits and kind == "Q4_K":
            blocks = codes.integers(0, 256, (value.numel() // block, size), np.uint8)
            scales = codes.uniform(1e-4, 1e-3, (len(blocks), 2)).astype(np.float16)
            blocks[:, :4] = scales.view(np.uint8)
            data = blocks.reshape(*value.shape[:-1], -1)
        else:
            data = gguf.quantize(value.float().numpy(), number)
        values[name] = torch.from_numpy(gguf.dequantize(data, number)).reshape(value.shape).clone()
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def of_diffusers(
    values: Tensors, to_theirs: Callable[[Tensors], Tensors], ours: Tensors
) -> Tensors:
    """Values under other names -> those that `to_theirs` makes them of."""
    ends = np.cumsum([0, *(value.numel() for value in ours.values())])
    places = {
        name: torch.arange(start, start + value.numel()).reshape(value.shape)
        for start, (name, value) in zip(ends[:-1].tolist(), ours.items(), strict=True)
    }
    flat, theirs, dtypes = torch.empty(int(ends[-1])), to_theirs(places), {}
    for name, at in theirs.items():
        flat[at.flatten()] = values[name].float().flatten()
        dtypes |= dict.fromkeys(at.flatten().tolist(), values[name].dtype)
    return {name: flat[at].to(dtypes[int(at.flatten()[0])]) for name, at in places.items()}


def float8_file(path: Path, tensors: Tensors, scaled: bool) -> Tensors:
    """Write matrices in float8, and return what they stand for."""
    saved, values = dict(tensors), dict(tensors)
    for number, name in enumerate(n for n, value in tensors.items() if value.dim() == 2):
        factor = torch.tensor(0.5 + number / 64)
        codes = (tensors[name].float() / factor).to(torch.float8_e4m3fn)
        saved[name], values[name] = codes, codes.bfloat16()
        if scaled:
            saved[f"{name.removesuffix('weight')}scale_weight"] = factor
            values[name] = codes.float() * factor
    if scaled:
        saved["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(saved, path)
    return values


def as_files(root: Path) -> Path:
    """The four parts of FLUX as single files in a folder, and configs without weights."""
    flux, out = root / "flux", root / "single"
    out.mkdir()
    shutil.copytree(
        flux, root / "configs", ignore=shutil.ignore_patterns("*.safetensors", "model_index.json")
    )
    save_file(
        transformer(load_file(flux / f"transformer/{DIFFUSERS}.safetensors")),
        out / "flux1-dev.safetensors",
    )
    save_file(vae(load_file(flux / f"vae/{DIFFUSERS}.safetensors")), out / "ae.safetensors")
    shutil.copy(flux / "text_encoder/model.safetensors", out / "clip_l.safetensors")
    shutil.copy(flux / "text_encoder_2/model.safetensors", out / "t5xxl_fp16.safetensors")
    return out


@pytest.fixture
def files(root: Path) -> Path:
    """The tiny checkpoint's."""
    return as_files(root)


WIDE = Shapes(
    transformer=Flux(head_dim=128, rope_axes=(16, 56, 56)),
    controlnet=Flux(head_dim=128, rope_axes=(16, 56, 56)),
    t5=Encoder(width=256, layers=1, heads=4, head_dim=64, mlp=256, vocab=384),
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose matrices are as wide as the largest blocks of GGUF."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    synthesize(WIDE, folder)
    return folder


@pytest.fixture(params=["float8", "scaled float8", "Q8_0", "Q4_K"])
def packed(request: pytest.FixtureRequest, wide: Path, tmp_path: Path) -> dict[str, Path]:
    """FLUX in its authors' names and T5, packed; and a pipeline's folder of the same numbers."""
    kind: str = request.param
    root = tmp_path / "checkpoint"
    shutil.copytree(wide, root)
    out = as_files(root)
    shutil.rmtree(root / "configs/transformer")  # its tensors tell it
    found = {"root": root, "configs": root / "configs"}
    for option, part, stem, file, to_theirs in (
        ("flux", "transformer", DIFFUSERS, "flux1-dev", transformer),
        ("t5", "text_encoder_2", "model", "t5xxl_fp16", t5_in_gguf),
    ):
        place = root / "flux" / part / f"{stem}.safetensors"
        ours = load_file(place)
        found[option] = out / f"{file}-{kind}.gguf"
        if "float8" in kind:
            theirs, found[option] = load_file(out / f"{file}.safetensors"), out / f"{file}.sft"
            values = float8_file(found[option], theirs, kind.startswith("scaled"))
            to_theirs = to_theirs if option == "flux" else dict
        else:
            values = write_gguf(found[option], to_theirs(ours), kind)
        save_file(of_diffusers(values, to_theirs, ours), place)
    for option, name in (("vae", "ae"), ("clip", "clip_l")):
        found[option] = out / f"{name}.safetensors"
    return found


def test_a_packed_file_is_the_folder_of_its_numbers(packed: dict[str, Path]) -> None:
    root = packed.pop("root")
    flux = FluxFiles(packed.pop("flux"), packed, packed.pop("configs"))
    found = Checkpoint(root / "mllm", root / "bifrost", flux, read=False)
    assert outline(found) == outline(opened(root))
    counted = [found.origins[f"flux/{n}"]["packed"] for n in ("transformer", "text_encoder_2")]
    assert all(sum(kinds.values()) > 5 for kinds in counted), counted


@pytest.mark.slow
def test_its_engines_are_the_same_to_the_bit(packed: dict[str, Path], tmp_path: Path) -> None:
    root = packed.pop("root")
    same_engines(root, {"flux_configs": packed.pop("configs"), **packed}, tmp_path)


def same_engines(root: Path, alone: dict[str, Path], tmp_path: Path) -> Path:
    """Build a set of a pipeline's folder and one of files, compare their engines, and return the
    second."""
    common = {"mllm": str(root / "mllm"), "bifrost": str(root / "bifrost"), "t5_max_length": 16}
    sets = []
    for name, flux in (("folder", {"flux": root / "flux"}), ("files", alone)):
        where = {key: str(path) for key, path in flux.items()}
        sets.append(build(Recipe(**common, **where, output=str(tmp_path / name))))
    folder, single_set = (manifest.read(one).files for one in sets)
    same = [name for name in folder if name.endswith((".onnx", ".data"))]
    assert len(same) > 10
    assert {n: folder[n].sha256 for n in same} == {n: single_set[n].sha256 for n in same}
    return sets[1]


def single(files: Path, **others: Path) -> Checkpoint:
    root = files.parent
    names = {"flux": "flux1-dev", "vae": "ae", "clip": "clip_l", "t5": "t5xxl_fp16"}
    paths = {o: others.get(o, files / f"{n}.safetensors") for o, n in names.items()}
    flux = paths.pop("flux")
    return Checkpoint(
        root / "mllm", root / "bifrost", FluxFiles(flux, paths, root / "configs"), read=False
    )


def test_single_files_are_the_pipeline(files: Path, tiny_outline: dict[str, Any]) -> None:
    assert outline(single(files)) == tiny_outline


def test_a_file_of_the_whole_model_is_the_pipeline(
    files: Path, tiny_outline: dict[str, Any]
) -> None:
    whole: Tensors = {}
    for name, prefix in (
        ("flux1-dev", "model.diffusion_model."),
        ("ae", "vae."),
        ("clip_l", "text_encoders.clip_l.transformer."),
        ("t5xxl_fp16", "text_encoders.t5xxl.transformer."),
    ):
        tensors = load_file(files / f"{name}.safetensors")
        whole |= {prefix + n: value for n, value in tensors.items()}
    save_file(whole, files / "whole.safetensors")
    root = files.parent
    flux = FluxFiles(files / "whole.safetensors", {}, root / "configs").checked()
    found = Checkpoint(root / "mllm", root / "bifrost", flux, read=False)
    assert outline(found) == tiny_outline


@pytest.mark.slow
def test_the_engines_are_the_same_to_the_bit(files: Path, tmp_path: Path) -> None:
    root = files.parent
    alone = {
        "flux": files / "flux1-dev.safetensors",
        "vae": files / "ae.safetensors",
        "clip": files / "clip_l.safetensors",
        "t5": files / "t5xxl_fp16.safetensors",
        "flux_configs": root / "configs",
    }
    built = same_engines(root, alone, tmp_path)
    report = json.loads((built / "report.json").read_text())
    assert report["origins"]["flux/vae"]["names"] == "black-forest-labs"


def same_numbers(root: Path, part: str, stem: str, tensors: Tensors) -> Checkpoint:
    """The diffusers folder with these values."""
    save_file(tensors, root / "flux" / part / f"{stem}.safetensors")
    return Checkpoint(*(root / name for name in ("mllm", "bifrost", "flux")), read=False)


@pytest.mark.parametrize("kind", ["Q8_0", "BF16", "F16", "F32"])
def test_gguf_is_the_folder_of_its_numbers(files: Path, kind: str) -> None:
    saved = load_file(files / "t5xxl_fp16.safetensors")
    write_gguf(files / "t5.gguf", t5_in_gguf(saved), kind)
    read = t5.named(Weights.open_file(files / "t5.gguf"))
    dtypes = set()
    for name in saved:
        saved[name] = read.weights.source(read.place(name).key).read()
        dtypes.add(saved[name].dtype)
    expected = outline(same_numbers(files.parent, "text_encoder_2", "model", saved))
    found = single(files, t5=files / "t5.gguf")
    assert outline(found) == expected
    packed = found.origins["flux/text_encoder_2"]["packed"]
    assert (packed.keys() == {"Q8_0"}) == (kind == "Q8_0")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_a_gguf_tensor_is_what_the_package_makes_of_it(tmp_path: Path, kind: str) -> None:
    values = torch.randn(40, 64)
    write_gguf(tmp_path / "a.gguf", {"a": values}, kind)
    number = gguf.GGMLQuantizationType[kind]
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), number), number))
    weights = Weights.open_file(tmp_path / "a.gguf")
    assert torch.equal(weights.source("a").read().float(), expected)
    assert torch.equal(weights.source("a", (8, 24)).read().float(), expected[8:24])


def test_plain_float8_is_the_folder_of_its_numbers(files: Path) -> None:
    saved = load_file(files / "flux1-dev.safetensors")
    codes = {n: v.to(torch.float8_e4m3fn) for n, v in saved.items()}
    save_file(codes, files / "flux1-dev.safetensors")
    place = files.parent / "flux/transformer" / f"{DIFFUSERS}.safetensors"
    values = {n: v.to(torch.float8_e4m3fn).bfloat16() for n, v in load_file(place).items()}
    expected = outline(same_numbers(files.parent, "transformer", DIFFUSERS, values))
    found = single(files)
    assert outline(found) == expected
    assert found.origins["flux/transformer"]["packed"] == {"F8_E4M3": len(codes)}


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_scaled_float8_is_multiplied(tmp_path: Path, scale: str) -> None:
    codes = torch.randn(300, 200).to(torch.float8_e4m3fn)
    shapes = {"scale_weight": (), "weight_scale": (300, 1), "weight_scale_inv": (3, 2)}
    factor = torch.rand(shapes[scale]) + 0.5
    beside = {f"a.{scale}": factor, "a.input_scale": torch.ones(1)}
    if scale == "scale_weight":
        beside["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({"a.weight": codes, **beside}, tmp_path / "a.safetensors")
    if scale == "weight_scale_inv":
        factor = factor.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    weights = Weights.open_file(tmp_path / "a.safetensors")
    assert weights.entries.keys() == {"a.weight"}
    assert torch.equal(weights.source("a.weight").read(), codes.float() * factor)
    part = weights.source("a.weight", (100, 290)).read()
    assert torch.equal(part, (codes.float() * factor)[100:290])


def test_what_tensors_tell_is_what_the_configs_say(files: Path) -> None:
    found = authors.named(Weights.open_file(files / "flux1-dev.safetensors"))
    with pytest.raises(CheckpointError, match=r"heads are 16 wide.*128"):
        authors.config(found)
    found = autoencoder.named(Weights.open_file(files / "ae.safetensors"))
    with pytest.raises(CheckpointError, match="no multiples of 32"):
        autoencoder.config(found)
    told = t5.config(t5.named(Weights.open_file(files / "t5xxl_fp16.safetensors")))
    config = single(files).flux.config("text_encoder_2").values
    assert {key: told[key] for key in config.keys() & told.keys()} == {
        key: config[key] for key in config.keys() & told.keys()
    }


def test_damaged_files_are_named(files: Path) -> None:
    write_gguf(files / "t5.gguf", t5_in_gguf(load_file(files / "t5xxl_fp16.safetensors")))
    whole = (files / "t5.gguf").read_bytes()
    for length in (10, 200, len(whole) - 100):
        (files / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: not a complete GGUF file"):
            gguf_file.entries(files / "cut.gguf")
    with pytest.raises(CheckpointError, match=r"holds T5's encoder, expected FLUX's VAE"):
        outline(single(files, vae=files / "t5.gguf"))
    with pytest.raises(CheckpointError, match=r"--flux-configs|holds no tokenizers"):
        FluxFiles(files / "flux1-dev.safetensors").checked()
    tensors = load_file(files / "flux1-dev.safetensors")
    tensors["single_blocks.0.linear1.weight"] = tensors["single_blocks.0.linear1.weight"][1:]
    save_file(tensors, files / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"linear1\.weight: expected \[224, 32\], found"):
        outline(single(files, flux=files / "short.safetensors"))


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    codes = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    for beside, message in (
        ({"a.weight_scale": torch.ones(3)}, "expected one number"),
        ({"a.weight_scale_2": torch.ones(1)}, "weight_scale_2"),
    ):
        save_file({"a.weight": codes, **beside}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=message):
            Weights.open_file(tmp_path / "a.safetensors")
    assert float8.unpack({}) == {}


@pytest.mark.parametrize("kind", ["I8", "Q8_1", "Q8_K"])
def test_types_that_the_package_does_not_dequantize_are_named(files: Path, kind: str) -> None:
    saved = t5_in_gguf(load_file(files / "t5xxl_fp16.safetensors"))
    name = "enc.blk.0.attn_q.weight"
    number = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[number][1]
    writer = gguf.GGUFWriter(files / "t5.gguf", "t5")
    for one, value in saved.items():
        if one == name:
            kinds = np.int8 if kind == "I8" else np.uint8
            data = np.zeros((value.shape[0], value.shape[1] if kind == "I8" else size), kinds)
            writer.add_tensor(one, data, raw_dtype=number)
        else:
            writer.add_tensor(one, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=rf"t5\.gguf: tensor {name} is {kind}, which") as said:
        outline(single(files, t5=files / "t5.gguf"))
    assert "such as Q8_0, Q4_K or BF16" in str(said.value.hint)


def test_a_type_that_the_package_does_not_know_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"one.weight": torch.ones(2, 32)})
    raw = bytearray((tmp_path / "a.gguf").read_bytes())
    at = raw.index(b"one.weight") + len("one.weight") + 4 + 2 * 8  # its rank and two sizes
    raw[at : at + 4] = (999).to_bytes(4, "little")
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"a\.gguf: .*999.*") as said:
        Weights.open_file(tmp_path / "a.gguf")
    assert "pip install -U gguf" in str(said.value.hint)


def test_a_plan_takes_what_a_build_takes(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = files.parent
    both = ["--device", "rtx-4090", "--mllm", root / "mllm", "--bifrost", root / "bifrost"]
    alone = ["--flux", files / "flux1-dev.safetensors", "--flux-configs", root / "configs"]
    for option, name in (("vae", "ae"), ("clip", "clip_l"), ("t5", "t5xxl_fp16")):
        alone += [f"--{option}", files / f"{name}.safetensors"]
    plans = []
    for number, flux in enumerate((["--flux", root / "flux"], alone)):
        json_file = tmp_path / f"{number}.json"
        assert plan([str(one) for one in (*both, *flux, "--json", json_file)]) == 0
        plans.append(json.loads(json_file.read_text()))
    assert plans[0] == plans[1]
    for wrong, message in (
        (["--device", "rtx-4090", "--like", "7b", "--flux", "f"], "--flux is of a checkpoint"),
        (["--device", "rtx-4090"], "nothing to plan"),
        ([*both, "--flux", root / "flux", "--lora", "a.pt"], "expected a .safetensors file"),
    ):
        assert plan([str(one) for one in wrong]) == 1
        assert message in capsys.readouterr().err
