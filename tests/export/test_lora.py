"""A LoRA that a build adds is the checkpoint with the product added by hand, in every naming."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file

from bifrost_rt import inspect, manifest
from bifrost_rt.errors import BifrostError
from export import lazy_tensors, recipe
from export.build import build, main
from export.checkpoint import Checkpoint
from export.dialects import lora
from export.errors import RecipeError
from export.flux_files import FluxFiles
from export.lora_files import LoraFile, parse
from export.quantize import calibrate
from export.recipe import Recipe
from tests.export.checkpoints import DIFFUSERS, PARTS, opened, outline
from tests.export.test_dialects import transformer as as_the_authors

Tensors = dict[str, torch.Tensor]
FLUX, CLIP, T5 = "flux/transformer", "flux/text_encoder", "flux/text_encoder_2"
FILES = {FLUX: DIFFUSERS, CLIP: "model", T5: "model"}
RANK, ALPHA = 3, 5.0
# In our names, with different ranges of blocks, of attention, MLP and modulation.
LAYERS = {
    FLUX: (
        *("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj"),
        *("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.norm1.linear"),
        *("single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_out"),
        "norm_out.linear",
    ),
    CLIP: ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"),
    T5: ("encoder.block.0.layer.0.SelfAttention.k", "encoder.block.0.layer.1.DenseReluDense.wo"),
}
# The authors' layers, with the layers that they join.
QKV = tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
LINEAR1 = tuple(f"single_transformer_blocks.0.{x}" for x in
                ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))  # fmt: skip
JOINED = {
    "double_blocks.0.img_attn.qkv": QKV,
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.net.2",),
    "single_blocks.0.linear1": LINEAR1,
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


def weights(root: Path, part: str) -> Tensors:
    return load_file(root / part / f"{FILES[part]}.safetensors")


def key(tensors: Tensors, layer: str) -> str:
    """A layer's weight, with or without what transformers puts before CLIP's names."""
    return next(n for n in (layer, layer.removeprefix("text_model.")) if f"{n}.weight" in tensors)


def pairs(root: Path, seed: int = 0) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """part -> layer -> up and down."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for part, layers in LAYERS.items():
        tensors = weights(root, part)
        found[part] = {}
        for layer in layers:
            out, inner = tensors[f"{key(tensors, layer)}.weight"].shape
            up = torch.randn(out, RANK, generator=generator)
            found[part][layer] = (up, torch.randn(RANK, inner, generator=generator))
    return found


def add(root: Path, part: str, layer: str, products: torch.Tensor, *more: torch.Tensor) -> None:
    """Add to a layer of the checkpoint: in float32, rounded once."""
    tensors = weights(root, part)
    name = f"{key(tensors, layer)}.weight"
    total = tensors[name].float() + products
    for one in more:
        total = total + one
    tensors[name] = total.to(tensors[name].dtype)
    save_file(tensors, root / part / f"{FILES[part]}.safetensors", metadata={"format": "pt"})


def by_hand(root: Path, factor: float) -> dict[str, Any]:
    for part, layers in pairs(root).items():
        for layer, (up, down) in layers.items():
            add(root, part, layer, (up @ down) * factor)
    return outline(opened(root))


def with_loras(root: Path, *files: LoraFile) -> Checkpoint:
    return Checkpoint(*(root / part for part in PARTS), loras=files, read=False)


def diffusers(root: Path, path: Path) -> float:
    tensors = {}
    for part, layers in pairs(root).items():
        for layer, (up, down) in layers.items():
            name = f"{Path(part).name}.{layer}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, path)
    return 1.0


def formerly(root: Path, path: Path) -> float:
    tensors = {}
    for part, layers in pairs(root).items():
        for layer, (up, down) in layers.items():
            name = f"{Path(part).name}.{layer}"
            tensors |= {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return ALPHA / RANK


def header(root: Path, path: Path) -> float:
    diffusers(root, path)
    said = {f"{Path(p).name}.{k}": v for p in LAYERS for k, v in
            {"lora_alpha": ALPHA, "r": RANK, "use_rslora": True}.items()}  # fmt: skip
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(said)})
    return ALPHA / RANK**0.5


def peft(root: Path, path: Path) -> float:
    tensors = {}
    for layers in pairs(root).values():
        for layer, (up, down) in layers.items():
            name = f"base_model.model.{layer}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, path)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "alpha_pattern": {".*": ALPHA}}
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return ALPHA / RANK


def kohya(root: Path, path: Path) -> float:
    tensors = {}
    prefixes = {FLUX: "lora_transformer_", CLIP: "lora_te1_", T5: "lora_te3_"}
    for part, layers in pairs(root).items():
        for layer, (up, down) in layers.items():
            name = prefixes[part] + layer.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return ALPHA / RANK


@pytest.mark.parametrize("naming", [diffusers, formerly, header, peft, kohya])
def test_every_naming_is_the_product_added_by_hand(
    root: Path, tmp_path: Path, tiny_outline: dict[str, Any], naming: Callable[..., float]
) -> None:
    path = tmp_path / "a.safetensors"
    scale = 0.75
    factor = scale * naming(root, path)
    found = with_loras(root, LoraFile(path, scale))
    added = outline(found)
    assert [len(one.taken) for one in found.loras] == [sum(map(len, LAYERS.values()))]
    assert added != tiny_outline
    assert added == by_hand(root, factor)


@pytest.mark.parametrize("spelling", ["kohya", "points"])
@pytest.mark.parametrize("file", ["folder", "authors"])
def test_joined_layers_of_the_authors(root: Path, tmp_path: Path, spelling: str, file: str) -> None:
    generator, tensors, parts = torch.Generator().manual_seed(1), {}, {}
    saved = weights(root, FLUX)
    for layer, joined in JOINED.items():
        heights = [saved[f"{name}.weight"].shape[0] for name in joined]
        inner = saved[f"{joined[0]}.weight"].shape[1]
        up = torch.randn(sum(heights), RANK, generator=generator)
        down = torch.randn(RANK, inner, generator=generator)
        name = f"diffusion_model.{layer}"
        ends = ("lora_A", "lora_B")
        if spelling == "kohya":
            name, ends = "lora_unet_" + layer.replace(".", "_"), ("lora_down", "lora_up")
        tensors |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor([ALPHA])
        ups = dict(zip(joined, up.split(heights), strict=True))
        if layer.startswith("final_layer"):  # they have the shift before the scale
            ups = {joined[0]: torch.cat(up.chunk(2)[::-1])}
        parts |= {ours: (rows, down) for ours, rows in ups.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    asked, flux = LoraFile(tmp_path / "a.safetensors"), root / "flux"
    if file == "authors":
        save_file(as_the_authors(saved), tmp_path / "flux1-dev.safetensors")
        single = FluxFiles(
            tmp_path / "flux1-dev.safetensors",
            {
                "vae": flux / "vae" / f"{DIFFUSERS}.safetensors",
                "clip": flux / "text_encoder/model.safetensors",
                "t5": flux / "text_encoder_2/model.safetensors",
            },
            flux,
        )
        mllm, bifrost = root / "mllm", root / "bifrost"
        added = outline(Checkpoint(mllm, bifrost, single, loras=[asked], read=False))
    else:
        added = outline(with_loras(root, asked))
    for layer, (up, down) in parts.items():
        add(root, FLUX, layer, (up @ down) * (ALPHA / RANK))
    assert added == outline(opened(root))


def test_two_files_are_added_before_one_rounding(root: Path, tmp_path: Path) -> None:
    layer, scales = "transformer_blocks.0.attn.to_q", (0.5, -2.0)
    tensors = weights(root, FLUX)
    half = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(half, root / FLUX / f"{DIFFUSERS}.safetensors", metadata={"format": "pt"})
    products, asked = [], []
    for number, scale in enumerate(scales):
        up, down = (value.half() for value in pairs(root, number)[FLUX][layer])
        path = tmp_path / f"{number}.safetensors"
        names = (f"transformer.{layer}.lora_{x}.weight" for x in "AB")
        save_file(dict(zip(names, (down, up), strict=True)), path)
        asked.append(LoraFile(path, scale))
        products.append((up.float() @ down.float()) * scale)
    added = outline(with_loras(root, *asked))
    add(root, FLUX, layer, *products)
    assert added == outline(opened(root))


@pytest.mark.slow
def test_the_set_is_the_same_to_the_bit_and_says_what_was_added(root: Path, tmp_path: Path) -> None:
    folders = {part: str(root / part) for part in PARTS}
    path = tmp_path / "style.safetensors"
    factor = 0.5 * formerly(root, path)
    common = {**folders, "t5_max_length": 16, "precision": "bf16"}
    added = build(Recipe(**common, lora=(f"{path}:0.5",), output=str(tmp_path / "added")))
    by_hand(root, factor)
    plain = build(Recipe(**common, output=str(tmp_path / "plain")))
    one, two = manifest.read(added), manifest.read(plain)
    same = [name for name in one.files if name.endswith((".onnx", ".data", ".png"))]
    assert len(same) > 10
    assert {n: one.files[n].sha256 for n in same} == {n: two.files[n].sha256 for n in same}
    [said] = one.loras
    assert said == manifest.Lora("style.safetensors", manifest.sha256(path), 0.5)
    assert two.loras == ()
    assert f"LoRA       style.safetensors, times 0.5, sha256 {said.sha256[:12]}" in (
        inspect.describe(one)
    )
    assert json.loads((added / "report.json").read_text())["loras"][0]["scale"] == 0.5


def test_identities_follow_content_and_scale(root: Path, tmp_path: Path) -> None:
    def identity(path: Path, scale: float) -> str:
        net = with_loras(root, LoraFile(path, scale)).transformer
        return lazy_tensors.of(net.transformer_blocks[0].attn.to_q, "weight").identity

    diffusers(root, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    changed = load_file(tmp_path / "a.safetensors")
    changed[min(changed)] = changed[min(changed)] * 2
    save_file(changed, tmp_path / "c.safetensors")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    assert identity(a, 1.0) == identity(b, 1.0)
    assert len({identity(a, 1.0), identity(a, 0.5), identity(c, 1.0)}) == 3
    prints = {
        calibrate.fingerprint([root], [LoraFile(path, scale).described()])
        for path, scale in ((a, 1.0), (a, 0.5), (c, 1.0), (b, 1.0))
    }
    assert len(prints) == 3
    assert calibrate.fingerprint([root]) not in prints


def bad(root: Path, tmp_path: Path, edit: Callable[[Tensors], object]) -> LoraFile:
    path = tmp_path / "a.safetensors"
    formerly(root, path)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return LoraFile(path)


Q = "transformer.transformer_blocks.0.attn.to_q"
DOWN, UP = f"{Q}.lora.down.weight", f"{Q}.lora.up.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({DOWN: torch.ones(2, 32)}), "have no rank in common"),
        (lambda t: t.update({DOWN: torch.ones(0, 32), UP: torch.ones(32, 0)}), "no rank in common"),
        (lambda t: t.update({DOWN: torch.ones(3, 32, 1, 1)}), "have no rank in common"),
        (lambda t: t.update({DOWN: torch.ones(3, 31)}), r"down.weight: expected \[3, 32\]"),
        (lambda t: t.update({UP: torch.ones(33, 3)}), r"up.weight: expected \[32, 3\], found \[33"),
        (lambda t: t.pop(UP), r"one is missing of transformer\.transformer_blocks\.0\.attn\.to_q"),
        (lambda t: t.update({f"{Q}.alpha": torch.ones(2)}), r"alpha is \[1.0, 1.0\], expected one"),
        (lambda t: t.update({f"{Q}.alpha": torch.zeros(())}), "alpha is 0.0, expected one number"),
        (lambda t: t.update({UP: t[UP].double()}), r"are F64, expected .*up\.weight"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "are F8_E4M3, expected"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "more than the prod"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)}), r"lora_B\.bias"),
        (lambda t: t.update({f"{Q}.diff": torch.ones(32, 32)}), "more than the products"),
        (lambda t: [t.pop(name) for name in list(t) if "lora" in name], "holds no LoRA"),
        (
            lambda t: t.update(
                {
                    f"{Q.removeprefix('transformer.')}.lora_A.weight": torch.ones(3, 32),
                    f"{Q.removeprefix('transformer.')}.lora_B.weight": torch.ones(32, 3),
                }
            ),
            r"adds to transformer_blocks\.0\.attn\.to_q\.weight as",
        ),
    ],
)
def test_a_wrong_file_is_one_error(
    root: Path, tmp_path: Path, edit: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(BifrostError, match=message) as raised:
        outline(with_loras(root, bad(root, tmp_path, edit)))
    assert "a.safetensors" in raised.value.message
    assert raised.value.hint


def test_values_beyond_a_type_are_named(root: Path, tmp_path: Path) -> None:
    asked = bad(root, tmp_path, lambda t: t.update({UP: torch.full((32, 3), 1e38)}))
    with pytest.raises(BifrostError, match=r"a\.safetensors: with it, .*to_q\.weight has values"):
        outline(with_loras(root, LoraFile(asked.path, 1e6)))
    for name in (UP, f"{Q}.alpha"):
        asked = bad(root, tmp_path, lambda t, n=name: t[n].fill_(float("nan")))
        with pytest.raises(BifrostError, match=rf"a\.safetensors: tensor {name} holds NaN"):
            outline(with_loras(root, asked))


def test_layers_that_do_not_exist_are_named_together(root: Path, tmp_path: Path) -> None:
    def more(tensors: Tensors) -> None:
        for name in ("transformer.transformer_blocks.7.attn.to_q", "lora_te1_text_model_nothing"):
            tensors |= {f"{name}.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}

    asked = bad(root, tmp_path, more)
    with pytest.raises(BifrostError, match="another model than") as raised:
        outline(with_loras(root, asked))
    assert "lora_te1_text_model_nothing, transformer.transformer_blocks.7.attn.to_q" in str(
        raised.value
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}
    save_file({**tensors, f"{name}.alpha": torch.ones(())}, asked.path)
    with pytest.raises(BifrostError, match=r"LoRA of the MLLM is not added here.*--mllm"):
        outline(with_loras(root, asked))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no adapter_config.json beside it"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much', expected a number"),
        ({}, "missing key lora_alpha"),
        ({"lora_alpha": 1, "use_dora": True}, "use_dora = true is not supported"),
        ({"lora_alpha": 1, "peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
        ({"lora_alpha": 1, "init_lora_weights": "pissa"}, "'pissa' is not supported"),
        ({"lora_alpha": 1, "alpha_pattern": {"(": 1}}, "no regular expression"),
    ],
)
def test_what_peft_says_is_read_strictly(
    root: Path, tmp_path: Path, config: dict[str, Any] | None, message: str
) -> None:
    peft(root, tmp_path / "a.safetensors")
    if config is None:
        (tmp_path / "adapter_config.json").unlink()
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BifrostError, match=message):
        with_loras(root, LoraFile(tmp_path / "a.safetensors"))


def test_headers_and_files_that_are_no_lora(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    diffusers(root, path)
    save_file(load_file(path), path, {"lora_adapter_metadata": "[1]"})
    with pytest.raises(BifrostError, match="no JSON object"):
        with_loras(root, LoraFile(path))
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(BifrostError, match="a Python pickle"):
        with_loras(root, LoraFile(path))
    with pytest.raises(BifrostError, match="cannot be read: No such file"):
        with_loras(root, LoraFile(tmp_path / "none.safetensors"))


def test_the_text_of_a_file_and_its_scale(tmp_path: Path) -> None:
    assert parse("a.safetensors") == LoraFile(Path("a.safetensors"), 1.0)
    assert parse("b/c:d/a.safetensors") == LoraFile(Path("b/c:d/a.safetensors"), 1.0)
    assert parse("a:b.safetensors:-0.5") == LoraFile(Path("a:b.safetensors"), -0.5)
    for text in ("x", "nan", "inf", "0", "", "1e999"):
        with pytest.raises(RecipeError, match="expected a finite number other than 0"):
            parse(f"a.safetensors:{text}")
    for name in ("a.pt", "a.bin:0.5", "a.ckpt", "folder", "a.gguf"):
        with pytest.raises(RecipeError, match=r"expected a \.safetensors file") as raised:
            parse(name)
        assert "pickles are not opened" in str(raised.value.hint)


def test_the_command_line_takes_several(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--lora", "a.safetensors", "--output", "out"]
    assert main([*given, "--lora", "b.pt"]) == 1
    assert "expected a .safetensors file" in capsys.readouterr().err
    assert main(["--lora", "a.safetensors", "--lora", "b.safetensors:2"]) == 1
    assert "a set with a LoRA would take the place of the recipe's" in capsys.readouterr().err


def test_a_recipe_names_loras_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    lines = ['mllm = "m"', 'bifrost = "b"', 'flux = "f"', 'output = "o"']
    path.write_text("\n".join([*lines, 'lora = ["x.safetensors:0.5", "y.safetensors"]']))
    read = recipe.read(path, {})
    x, y = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    assert read.loras == (LoraFile(x, 0.5), LoraFile(y))
    with pytest.raises(RecipeError, match=r"a LoRA would take the place") as raised:
        recipe.read(path, {"lora": ["z.safetensors"]})
    assert "--output" in str(raised.value.hint)
    given = recipe.read(path, {"lora": ["z.safetensors"], "output": "other"})
    assert given.loras == (LoraFile(Path("z.safetensors")),)
    with pytest.raises(RecipeError, match="is given 2 times"):
        recipe.load({**dict.fromkeys((*PARTS, "output"), "m"), "lora": ["z.safetensors"] * 2}, "r")


def test_kohyas_names_mean_what_diffusers_says(tmp_path: Path) -> None:
    """Its converter splits the joined layers of FLUX.1's own width."""
    width, rank = 3072, 4
    with torch.device("meta"):
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    tensors: Tensors = {}
    for layer, out, inner in (
        ("double_blocks_0_img_attn_qkv", 3 * width, width),
        ("double_blocks_0_txt_attn_qkv", 3 * width, width),
        ("double_blocks_0_img_mod_lin", 6 * width, width),
        ("single_blocks_0_linear1", 7 * width, width),
        ("single_blocks_0_linear2", width, 5 * width),
    ):
        tensors[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(rank, inner)
        tensors[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(out, rank)
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, tmp_path / "kohya.safetensors")
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    save_file({n: v.clone() for n, v in theirs.items()}, tmp_path / "diffusers.safetensors")
    kohya, converted = (
        lora.load(LoraFile(tmp_path / f"{name}.safetensors")) for name in ("kohya", "diffusers")
    )
    adapted = [lora.adapt([one], "transformer", net) for one in (kohya, converted)]
    lora.refuse_left_overs([kohya, converted])
    named = [name.removeprefix("transformer.") for name in converted.layers]
    assert len(named) == 3 + 3 + 1 + 4 + 1
    for path in named:
        shape = tuple(net.get_parameter(f"{path}.weight").shape)
        zero = lazy_tensors.LazyTensor(shape, torch.float32, "0", partial(torch.zeros, shape))
        ours, wanted = (add_to(f"{path}.weight", zero).read() for add_to in adapted)
        assert torch.equal(ours, wanted)
        assert ours.any()
