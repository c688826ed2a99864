"""Looking equals transformers: patches to the bit, tokens within 1e-4 of the largest value."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel as Tower,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bifrost_rt import RequestError, backends, dims, image_processor, vision
from bifrost_rt.backends.base import output_shape, symbol_sizes
from bifrost_rt.manifest import Range, Vision
from export import engine_files, graph, memory, preprocessor
from export.checkpoint import Checkpoint
from export.errors import CheckpointError, RecipeError
from export.stages import vision_encode
from tests.conftest import ALPHA

# Width x height: square, long, tall, tiny, more than the limit, and no multiple of anything.
SIZES = [(128, 128), (100, 37), (448, 448), (641, 479), (33, 200), (28, 28), (5, 7), (1500, 1400)]
TOLERANCE = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "windows of two tokens, one head": {
        **{"depth": 3, "hidden_size": 24, "num_heads": 1, "intermediate_size": 40},
        **{"window_size": 56, "fullatt_block_indexes": [1]},
    },
    "all layers see everything, patches of 16": {
        **{"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 20},
        **{"patch_size": 16, "window_size": 128, "fullatt_block_indexes": [0, 1]},
    },
    "none does, tokens of 9 patches": {
        **{"depth": 2, "hidden_size": 40, "num_heads": 5, "intermediate_size": 12},
        **{"patch_size": 4, "spatial_merge_size": 3, "window_size": 48},
        **{"fullatt_block_indexes": []},
    },
}


@pytest.fixture(scope="module", params=["golden", *SHAPES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLLM folder."""
    if request.param == "golden":
        return ALPHA / "mllm"
    made = tmp_path_factory.mktemp("mllm") / "mllm"
    shutil.copytree(ALPHA / "mllm", made)
    newer = request.param == "none does, tokens of 9 patches"
    change_tower(made, SHAPES[request.param], newer=newer)
    return made


def change_tower(folder: Path, changes: dict[str, Any], *, newer: bool) -> None:
    """Give a folder a random tower of other shapes, in either dialect of transformers."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    table = {**config["vision_config"], **changes}
    table.pop("spatial_patch_size")
    config["vision_config"] = table
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    tower = Tower(Qwen2_5_VLVisionConfig(**table))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    prefix = "model.visual." if newer else "visual."
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    kept = {n: f for n, f in index["weight_map"].items() if not n.startswith("visual.")}
    for shard in folder.glob("model-*.safetensors"):
        held = load_file(shard)
        save_file({n: t for n, t in held.items() if not n.startswith("visual.")}, shard)
    tensors = {f"{prefix}{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file(tensors, folder / "tower.safetensors")
    index["weight_map"] = {**kept, **dict.fromkeys(tensors, "tower.safetensors")}
    file.write_text(json.dumps(index))
    side = {"patch_size": table["patch_size"], "merge_size": table["spatial_merge_size"]}
    old = json.loads((folder / "preprocessor_config.json").read_text())
    document: dict[str, Any] = {**old, **side, "max_pixels": 40 * 40 * 64}
    (folder / "preprocessor_config.json").unlink()
    if newer:
        least, most = document.pop("min_pixels"), document.pop("max_pixels")
        document["size"] = {"shortest_edge": least, "longest_edge": most}
        text = json.dumps({"image_processor": document, "processor_class": "Qwen2_5_VLProcessor"})
        (folder / "processor_config.json").write_text(text)
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(document))


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(folder, ALPHA / "bifrost", ALPHA / "flux", read=False)


class Reference:
    """transformers' own processor and tower."""

    def __init__(self, folder: Path, facts: Vision) -> None:
        checkpoint = opened(folder)
        config = json.loads((folder / "config.json").read_text())["vision_config"]
        self.tower = Tower(Qwen2_5_VLVisionConfig(**config)).eval()
        prefix = checkpoint._tower_prefix
        assert prefix is not None
        weights = {
            name: checkpoint.base.source(f"{prefix}{name}").read().float()
            for name in self.tower.state_dict()
        }
        self.tower.load_state_dict(weights)
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": facts.min_pixels, "longest_edge": facts.max_pixels},
            **{"patch_size": facts.patch_size, "merge_size": facts.merge_size},
            **{"image_mean": facts.image_mean, "image_std": facts.image_std},
        )

    def patches(self, image: Image.Image) -> Any:
        return self.processor(images=image, return_tensors="pt")

    def tokens(self, image: Image.Image) -> NDArray[np.float32]:
        given = self.patches(image)
        with torch.inference_mode():
            found = self.tower(given["pixel_values"], given["image_grid_thw"]).pooler_output
        array: NDArray[np.float32] = found.numpy()
        return array


@pytest.fixture(scope="module")
def facts(folder: Path) -> Vision:
    found = preprocessor.read(opened(folder))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reference(folder: Path, facts: Vision) -> Reference:
    return Reference(folder, facts)


def scene(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(width).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_are_the_references_to_the_bit(
    facts: Vision, reference: Reference, size: tuple[int, int]
) -> None:
    image = scene(*size)
    found, expected = image_processor.patches(image, facts), reference.patches(image)
    grid = expected["image_grid_thw"][0].tolist()
    assert [1, found.rows * facts.merge_size, found.columns * facts.merge_size] == grid
    patches = expected["pixel_values"].numpy()
    assert np.array_equal(found.values.reshape(patches.shape), patches)
    largest = image_processor.limits(facts)
    assert found.tokens <= largest.tokens
    assert image_processor.windows(found.rows, found.columns, facts) <= largest.windows
    assert max(found.rows, found.columns) <= largest.side


@pytest.mark.parametrize("size", [*SIZES, (4000, 20), (900, 901)], ids=str)
def test_an_image_that_was_made_to_fit_has_the_same_patches(
    facts: Vision, size: tuple[int, int]
) -> None:
    image = scene(*size)
    fitting = image_processor.fit(image, facts)
    assert fitting.width * fitting.height <= max(image.width * image.height, facts.min_pixels)
    found, whole = (image_processor.patches(one, facts).values for one in (fitting, image))
    assert np.array_equal(found, whole)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(
    request: pytest.FixtureRequest,
    folder: Path,
    facts: Vision,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """The engine by itself, as a build writes it."""
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(reason)
    output = tmp_path_factory.mktemp("vision")
    largest = image_processor.limits(facts)
    tower = opened(folder).vision_tower(largest.side * facts.merge_size)
    stage = vision_encode.stage(tower)
    files, found = engine_files.write(stage, output, "fp32", memory.one_image(48), largest)
    spec = engine_files.describe(stage, output, [f.name for f in files], found, "fp32")
    backend = backends.load(request.param)
    bounds = {name: Range(1, None) for name in dims.DIMS}
    made = backend.open(output, spec, bounds)
    yield made
    made.close()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_are_the_references(
    facts: Vision, reference: Reference, engine: Any, size: tuple[int, int]
) -> None:
    image = scene(*size)
    given = vision.inputs(image_processor.patches(image, facts), facts)
    (output,) = engine.spec.outputs
    found = np.empty(output_shape(output, symbol_sizes(engine.spec, given)), np.float32)
    engine.bind(given, {output.name: found})()
    expected = reference.tokens(image)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_an_image_like_a_thread_is_refused(facts: Vision) -> None:
    with pytest.raises(RequestError, match="the longer side may be at most 200 times the shorter"):
        image_processor.grid(1, 201, facts)
    image_processor.grid(1, 200, facts)


def changed(tmp_path: Path, name: str, **changes: Any) -> Path:
    """The golden folder with other entries in one file; a key of a table is written table__key."""
    made = tmp_path / "mllm"
    shutil.copytree(ALPHA / "mllm", made)
    document = json.loads((made / name).read_text())
    for key, value in changes.items():
        *tables, last = key.split("__")
        into = document
        for table in tables:
            into = into[table]
        into[last] = value
    (made / name).write_text(json.dumps(document))
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config__hidden_act": "gelu"}, "vision_config.hidden_act = 'gelu' is not"),
        ({"vision_config__num_heads": 3}, "vision_config.num_heads is 3, expected heads that"),
        ({"vision_config__window_size": 20}, "window_size is 20, expected at least 28 pixels"),
        ({"vision_config__fullatt_block_indexes": [2]}, "expected numbers below depth, 2"),
        ({"vision_config__out_hidden_size": 32}, "expected the text branch's hidden_size, 64"),
        ({"vision_config__spatial_patch_size": 16}, "spatial_patch_size is 16, expected patch_s"),
        ({"vision_config__in_chans": 4}, "expected 3, red, green and blue"),
        ({"vision_config__rope_parameters": {"rope_type": "linear"}}, "rope_type = 'linear' is no"),
    ],
)
def test_a_tower_that_is_not_computed_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(changed(tmp_path, "config.json", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type = 'CLIPImageP"),
        ({"patch_size": 16}, "patch_size is 16, expected the vision tower's, 14"),
        ({"do_resize": False}, "do_resize = false is not supported"),
        ({"resample": 2}, "resample = 2 is not supported, only 3"),
        ({"image_std": [0.1, 0, 0.1]}, "image_std .*, expected three numbers above 0"),
        ({"image_mean": [0.5]}, "image_mean .*, expected a list of 3"),
        ({"min_pixels": 1 << 25}, "min_pixels .*, expected at most max_pixels"),
    ],
)
def test_another_preprocessor_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = changed(tmp_path, "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        preprocessor.read(opened(folder))


def test_the_recipe_limits_images(tmp_path: Path) -> None:
    checkpoint = opened(ALPHA / "mllm")
    found = preprocessor.read(checkpoint, 56 * 56)
    assert found is not None
    assert image_processor.grid(5000, 2500, found) == (2, 1)
    whole = preprocessor.read(checkpoint)
    assert whole is not None
    assert image_processor.limits(whole).tokens == preprocessor.TOKENS
    with pytest.raises(RecipeError, match="max_image_pixels is 1000, but the smallest image"):
        preprocessor.read(checkpoint, 1000)


def test_a_checkpoint_may_have_no_eyes(tmp_path: Path) -> None:
    blind = changed(tmp_path / "a", "config.json", vision_config=None)
    assert preprocessor.read(opened(blind)) is None
    assert preprocessor.why_none(opened(blind)) == f"{blind} has no vision tower"
    unsaid = changed(tmp_path / "b", "config.json")
    (unsaid / "preprocessor_config.json").unlink()
    assert preprocessor.read(opened(unsaid)) is None
    assert preprocessor.why_none(opened(unsaid)) == f"{unsaid} has no preprocessor_config.json"


def test_a_trace_fits_every_grid(folder: Path, facts: Vision) -> None:
    """No size of the example became a constant."""
    largest = image_processor.limits(facts)
    stage = vision_encode.stage(opened(folder).vision_tower(largest.side * facts.merge_size))
    traced = graph.to_graph(stage)
    shapes = {tensor.name: tensor.shape for tensor in traced.graph.inputs}
    assert str(shapes["patches"][0]) == "windows"
    assert str(shapes["token_order"][0]) == "vision_tokens"
