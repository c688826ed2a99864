"""Every value of every config of a checkpoint, made wrong: an error of ours that names the file, or
the same network as before. What a library raises at a value never reaches the user."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from export import lazy_tensors, tokenizer_files
from export.checkpoint import Checkpoint
from export.errors import CheckpointError
from tests.export.checkpoints import PARTS, edit_json, opened

WRONG_TYPES = (None, "7", "auto", True, [], [None], {}, {"a": 1}, float("nan"), float("inf"))
WRONG_NUMBERS = (-1, 0, 0.5, -1e30, 10**9, 10**30, 1e308)


def _mllm(checkpoint: Checkpoint) -> Any:
    branches = (checkpoint.visual_branch(), checkpoint.text_branch(checkpoint.max_seq_length))
    return checkpoint.decoder, [_network(branch) for branch in branches]


def _network(module: Any) -> Any:
    return str(module), {n: source.shape for n, source in lazy_tensors.named(module).items()}


READ: dict[str, Callable[[Checkpoint], Any]] = {
    "mllm/config.json": _mllm,
    "mllm/config.json: text_config": _mllm,
    "bifrost/config.json": lambda c: (c.max_seq_length, c.num_visual_tokens),
    "bifrost/flux_controlnet/config.json": lambda c: _network(c.controlnet),
    "flux/transformer/config.json": lambda c: _network(c.transformer),
    "flux/vae/config.json": lambda c: (
        _network(c.vae.decoder), str(c.vae.post_quant_conv),
        c.vae.config.scaling_factor, c.vae.config.shift_factor,
    ),
    "flux/text_encoder/config.json": lambda c: (_network(c.clip), c.clip.config.eos_token_id),
    "flux/text_encoder_2/config.json": lambda c: _network(c.t5),
    "flux/scheduler/scheduler_config.json": lambda c: c.scheduler,
    "flux/tokenizer/tokenizer_config.json": tokenizer_files.clip_length,
    "flux/model_index.json": lambda c: None,
}  # fmt: skip


# Without a meaning here, and with many entries: one of them stands for all.
UNREAD = ("vision_config", "added_tokens_decoder")
MEANT = ("shift_factor = None",)  # no shift


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value that is not the value itself."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, inner in items[:1] if path and path[0] in UNREAD else items:
            yield from _places(inner, (*path, key))


def _with(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(document))
    owner = changed
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    return changed


@pytest.fixture
def config(name: str, tiny: Path, tmp_path: Path) -> Path:
    """A config of a copy of the checkpoint."""
    for part in PARTS:
        shutil.copytree(tiny / part, tmp_path / part)
    file, _, table = name.partition(": ")
    path = tmp_path / file
    if table:  # as newer transformers write it
        document = json.loads(path.read_text())
        outside = ("architectures", "model_type", "vision_config")
        inside = {key: value for key, value in document.items() if key not in outside}
        document = {key: document[key] for key in outside}
        path.write_text(json.dumps({**document, table: inside}))
    return path


@pytest.mark.parametrize("name", READ)
def test_a_wrong_value_is_an_error_of_ours_or_changes_nothing(
    name: str, config: Path, tmp_path: Path
) -> None:
    document = json.loads(config.read_text())
    before = READ[name](opened(tmp_path))
    wrong = []
    for place in _places(document):
        for value in (*WRONG_TYPES, *WRONG_NUMBERS):
            config.write_text(json.dumps(_with(document, place, value)))
            what = f"{'.'.join(map(str, place))} = {value!r}"
            try:
                after = READ[name](opened(tmp_path))
            except CheckpointError as error:
                if str(tmp_path) not in error.message:
                    wrong.append(f"{what}: names no file: {error}")
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                of_wrong_type = any(value is one for one in WRONG_TYPES)
                if of_wrong_type and after != before and what not in MEANT:
                    wrong.append(f"{what}: taken, and another network is made")
    assert wrong == []


@pytest.mark.parametrize("name", READ)
def test_a_key_that_is_gone_is_an_error_of_ours_or_has_a_default(
    name: str, config: Path, tmp_path: Path
) -> None:
    document = json.loads(config.read_text())
    for key in document:
        edit_json(config, **{key: ...})
        with contextlib.suppress(CheckpointError):
            READ[name](opened(tmp_path))
        config.write_text(json.dumps(document))
