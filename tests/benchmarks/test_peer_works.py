"""What the candidates of the benchmark of peers read is the same model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from benchmarks.peers import flux, flux_files, text_files
from benchmarks.peers.programs import stock_step
from benchmarks.peers.programs.own_step import OwnStep
from benchmarks.peers.programs.own_text import OwnText
from benchmarks.peers.programs.torch_step import TorchStep

TINY = text_files.shapes("tiny", 2)
# Q8_0 has blocks of 32
SHAPES = dataclasses.replace(
    TINY,
    decoder=dataclasses.replace(TINY.decoder, hidden_size=64, intermediate_size=96, head_dim=16),
)


@pytest.fixture(scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of these tests alone."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers constructs its own deprecated class
        patch.setenv("BIFROST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.usefixtures("_cache")
def test_the_vocabulary_is_cut_as_the_depth_is() -> None:
    whole, cut = text_files.shapes("7b", 28).decoder, text_files.shapes("7b", 4).decoder
    assert whole.vocab_size == 152064
    assert cut.vocab_size == pytest.approx(152064 / 7, abs=64)
    assert cut.hidden_size == whole.hidden_size == 3584


@pytest.mark.usefixtures("_cache")
def test_a_gguf_file_holds_the_checkpoints_numbers() -> None:
    folder = text_files.made(SHAPES, ("bf16",), ("q8_0", "bf16"))
    path = folder / "bf16.gguf"
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(read) == 2 * 12 + 3
    coarse = gguf.GGUFReader(path.with_name("q8_0.gguf")).tensors
    for tensor in coarse:
        assert tensor.tensor_type == (
            gguf.GGMLQuantizationType.F32
            if len(tensor.shape) == 1
            else gguf.GGMLQuantizationType.Q8_0
        )
    # a model in numpy that reads the file computes what our graph does
    prompt = text_files.prompt(9).tolist()
    asked = {"folder": folder, "form": "bf16", "backend": "onnxruntime", "prompt": prompt}
    exact = OwnText({**asked, "new_tokens": 3, "threads": 1})
    logits = exact.output()
    assert logits.shape == (640,)
    hidden = _last_hidden(read, prompt)
    head = dequantize(read["output.weight"].data, read["output.weight"].tensor_type)
    np.testing.assert_allclose(head @ hidden, logits, atol=2e-3)
    figures = exact.run()
    assert set(figures) == {"prefill", "token"}
    assert all(seconds > 0 for seconds in figures.values())
    assert text_files.made(SHAPES, ("bf16",), ("q8_0", "bf16")) == folder


def _last_hidden(read: dict[str, gguf.ReaderTensor], ids: list[int]) -> np.ndarray:
    """Qwen2 in numpy, from a GGUF file: the last row behind the final norm."""

    def of(name: str) -> np.ndarray:
        return np.asarray(dequantize(read[name].data, read[name].tensor_type), np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * of(f"{name}.weight")

    def linear(x: np.ndarray, name: str, bias: bool = False) -> np.ndarray:
        return x @ of(f"{name}.weight").T + (of(f"{name}.bias") if bias else 0)

    c = SHAPES.decoder
    rows = len(ids)
    angles = np.arange(rows)[:, None] / c.rope_theta ** (
        np.arange(c.head_dim // 2) / (c.head_dim / 2)
    )
    cos, sin = (np.tile(f(angles), 2)[:, None] for f in (np.cos, np.sin))

    def rotated(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, -1)
        return x * cos + np.concatenate((-second, first), -1) * sin

    x = of("token_embd.weight")[ids]
    for i in range(c.num_hidden_layers):
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (
            linear(h, f"blk.{i}.attn_{n}", bias=True).reshape(rows, -1, c.head_dim) for n in "qkv"
        )
        groups = c.num_attention_heads // c.num_key_value_heads
        q, k, v = rotated(q), np.repeat(rotated(k), groups, 1), np.repeat(v, groups, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(c.head_dim)
        scores = np.where(np.tri(rows, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + linear(
            np.einsum("hij,jhd->ihd", weights, v).reshape(rows, -1), f"blk.{i}.attn_output"
        )
        h = norm(x, f"blk.{i}.ffn_norm")
        gate = linear(h, f"blk.{i}.ffn_gate")
        x = x + linear(
            gate / (1 + np.exp(-gate)) * linear(h, f"blk.{i}.ffn_up"), f"blk.{i}.ffn_down"
        )
    return norm(x[-1], "output_norm")


@pytest.mark.slow
@pytest.mark.usefixtures("_cache")
def test_the_stock_step_computes_what_ours_does() -> None:
    work = flux.work("tiny", 1)
    settings = {c.name: dict(c.settings) for c in work.candidates}
    ours = OwnStep({**settings["bifrost-rt float32, onnxruntime"], "threads": 1})
    threads = torch.get_num_threads()
    stock = TorchStep({**settings[work.reference], "threads": threads})
    velocity = ours.output()
    assert velocity.shape == (1, 1024, 16)
    np.testing.assert_allclose(velocity, stock.output(), atol=1e-4)
    assert set(ours.run()) == set(stock.run()) == set(work.figures)
    coarse = OwnStep({**settings["bifrost-rt int8, onnxruntime"], "threads": 1})
    off = coarse.output() - velocity
    assert 0 < np.sqrt(np.square(off).mean() / np.square(velocity).mean()) < 0.05


def test_programs_of_peers_read_the_files_by_the_same_names() -> None:
    for name in ("CHECKPOINT", "INPUTS", "TIME", "GUIDANCE"):
        assert getattr(stock_step, name) == getattr(flux_files, name)
