"""Models and pipelines that have the sizes of ours and compute something else are refused by what
their configs say, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.build import main as build
from export.errors import CheckpointError
from tests.export.checkpoints import PARTS, edit_json, opened, outline


@pytest.mark.parametrize(
    ("place", "changes", "parts"),
    [
        ("mllm", {"model_type": "qwen2_vl"}, ("model_type is 'qwen2_vl'", "qwen2_5_vl")),
        ("mllm", {"model_type": "qwen3_vl"}, ("model_type is 'qwen3_vl'", "qwen2_5_vl")),
        ("mllm", {"architectures": ["LlamaForCausalLM"]}, ("architectures is 'LlamaForCausalLM'",)),
        ("mllm", {"architectures": 7}, ("architectures is 7",)),
        ("mllm", {"text_config": {"model_type": "qwen2"}}, ("text_config.model_type is 'qwen2'",)),
        ("mllm", {"vision_config": {"model_type": "siglip"}}, ("vision_config.model_type",)),
        ("bifrost", {"model_type": "janus"}, ("model_type is 'janus'", "multi_modality")),
        ("bifrost", {"architectures": ["Other"]}, ("architectures is 'Other'",)),
        ("bifrost/flux_controlnet", {"_class_name": "SD3ControlNetModel"}, ("SD3ControlNet",)),
        ("flux/transformer", {"_class_name": "ChromaTransformer2DModel"}, ("Chroma",)),
        ("flux/vae", {"_class_name": "AutoencoderDC"}, ("_class_name is 'AutoencoderDC'",)),
        ("flux/text_encoder", {"model_type": "siglip"}, ("model_type is 'siglip'",)),
        ("flux/text_encoder_2", {"model_type": "umt5"}, ("model_type is 'umt5'", "expected t5")),
    ],
)
def test_another_model_of_the_same_sizes_is_refused(
    place: str, changes: dict[str, Any], parts: tuple[str, ...], root: Path
) -> None:
    path = root / place / "config.json"
    edit_json(path, **changes)
    with pytest.raises(CheckpointError) as caught:
        outline(opened(root))
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "'FluxKontextPipeline'"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is 'AutoencoderTiny'"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, "swapped"),
        ("tokenizer_2/tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}, "'Llama"),
        ("text_encoder/config.json", {"eos_token_id": 5}, "eos_token_id is 5, but the tokenizer"),
    ],
)
def test_another_pipeline_or_tokenizer_is_refused(
    place: str, changes: dict[str, Any], message: str, root: Path
) -> None:
    edit_json(root / "flux" / place, **changes)
    with pytest.raises(CheckpointError, match=message):
        outline(opened(root))


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("mllm/config.json", {"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ("flux/scheduler/scheduler_config.json", {"shift": None}, "shift is null"),
        ("flux/vae/config.json", {"up_block_types": ["A", "B"]}, 'up_block_types = ["A", "B"]'),
    ],
)
def test_a_build_says_so_in_one_line_and_leaves_nothing(
    place: str,
    changes: dict[str, Any],
    message: str,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_json(root / place, **changes)
    flags = [part for name in PARTS for part in (f"--{name}", str(root / name))]
    assert build([*flags, "--output", str(tmp_path / "set")]) != 0
    said = capsys.readouterr()
    assert not said.out
    assert f"{root / place}: " in said.err
    assert message in said.err
    assert "Traceback" not in said.err
    assert [path for path in tmp_path.iterdir() if path != root] == []
