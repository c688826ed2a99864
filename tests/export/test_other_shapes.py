"""Shapes and dialects that no release has: built as a user builds, judged by the reference.

Each set differs from the golden one in as much as possible at once; every number of a network that
an engine could have assumed is another one in at least one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.reference import Reference
from bifrost_rt import Generator, backends, manifest
from bifrost_rt.answering import Answering, Sampling
from bifrost_rt.engines import Engines
from bifrost_rt.tokenizers import Tokenizers
from export.build import build
from export.recipe import Recipe
from export.synthesize import synthesize
from export.synthetic import tokenizers
from export.synthetic.shapes import Encoder, Flux, Layout, Shapes, Vae
from tests.conversations import TURNS, Judge, forced_logits

TOLERANCE = 1e-4  # of the largest value, where that is above 1; the rounding scale is 1e-5
T5_LENGTH = 14
SHORT, LONG = "a cat", "The image shows TWO red boats and an old stone bridge near 3 houses"
TOO_LONG = f"a quiet harbour with {'boats, ' * 40} and a tower"

DECODER = Shapes().decoder
SHAPES = {
    # heads of their own width, no guidance at all, a ControlNet without single blocks
    "six_by_six": Shapes(
        decoder=replace(
            DECODER, hidden_size=40, num_attention_heads=3, num_key_value_heads=3, head_dim=16
        ),
        visual_tokens=36,
        transformer=Flux(3, 12, 3, 2, guidance_embeds=False, rope_axes=(2, 4, 6)),
        controlnet=Flux(3, 12, 2, 0, guidance_embeds=False, rope_axes=(2, 4, 6)),
        vae=Vae((8, 8, 16), latent_channels=8, mid_attention=False, quant_convs=True),
        clip=Encoder(width=24, layers=2, heads=3, head_dim=8, mlp=40, vocab=700),
        t5=Encoder(width=20, layers=2, heads=3, head_dim=4, mlp=28, vocab=400),
        dynamic_shifting=False,
        layout=Layout(
            dtype="bf16",
            shard_bytes=40_000,
            newer_keys=True,
            left_out=("embed_tokens.", "layers.0.mlp.", "layers.1.self_attn.k_proj.bias"),
            merges="pairs",
            chat_template="chat_template.jinja",
        ),
    ),
    # guidance in the transformer alone, blocks that do not divide, other heads in the ControlNet
    "two_by_two": Shapes(
        decoder=replace(
            DECODER, num_attention_heads=6, num_key_value_heads=2,
            hidden_size=48, rms_norm_eps=1e-5, rope_theta=1e4,
        ),
        tied_head=True,
        visual_tokens=4,
        transformer=Flux(2, 24, 3, 3, rope_axes=(8, 8, 8)),
        controlnet=Flux(4, 12, 2, 2, guidance_embeds=False, rope_axes=(4, 4, 4)),
        vae=Vae((4, 8, 8, 12), scaling_factor=0.5, shift_factor=None),
        layout=Layout(
            dtype="fp16",
            left_out=("",),  # the whole text branch is the base model's
            clip_prefix=False,
            clip_eos_in_config=True,
            t5_embedding="encoder.embed_tokens.weight",
            mllm_tokenizer="vocab",
            clip_tokenizer="json",
            own_lengths=True,
            chat_template="tokenizer_config.json",
        ),
    ),
    # guidance in the ControlNet alone, which has no double blocks; one key/value head, no VAE scale
    "three_by_three": Shapes(
        decoder=replace(DECODER, num_hidden_layers=1, num_key_value_heads=1),
        visual_tokens=9,
        transformer=Flux(double_blocks=2, single_blocks=4, guidance_embeds=False),
        controlnet=Flux(double_blocks=0, single_blocks=3),
        vae=Vae((8,), latent_channels=3, layers_per_block=2, norm_groups=8, shift_factor=-0.3),
        layout=Layout(dtype="fp32", mllm_tokenizer="json", clip_tokenizer="both", own_lengths=True),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """One synthesized checkpoint, its engine set and its judge."""

    shapes: Shapes
    folder: Path  # of the set
    generator: Generator
    reference: Reference

    def inputs(self, images: int) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng(11)
        places = self.shapes.visual_tokens
        size = (images, 4 * places, 4 * self.shapes.vae.latent_channels)
        return {
            "order": np.stack([rng.permutation(places) for _ in range(images)]),
            "latents": rng.standard_normal(size).astype(np.float32),
        }


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Networks this small lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# One of them by hand: tracing ten engines takes a minute.
@pytest.fixture(
    scope="session",
    params=[pytest.param("six_by_six", marks=pytest.mark.slow), "two_by_two", "three_by_three"],
)
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Iterator[Built]:
    shapes = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    synthesize(shapes, folder / "checkpoint", seed=21)
    folders = {part: str(folder / "checkpoint" / part) for part in ("mllm", "bifrost", "flux")}
    recipe = Recipe(
        **folders,
        output=str(folder / "set"),
        precision=shapes.layout.dtype,  # the checkpoint's own: nothing is lost
        t5_max_length=T5_LENGTH,
    )
    reference = Reference(**folders, mllm_max_length=shapes.max_seq_length, t5_max_length=T5_LENGTH)
    with Generator(build(recipe)) as generator:
        yield Built(shapes, folder / "set", generator, reference)


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [
        (
            [SHORT, LONG],
            {"cfg_weight": 3.0, "decoding_steps": 3, "num_inference_steps": 3,
             "guidance_scale": 2.0, "controlnet_conditioning_scale": 1.0},
        ),
        (
            [TOO_LONG],
            {"cfg_weight": 1.0, "decoding_steps": 12, "num_inference_steps": 4,
             "guidance_scale": 3.5, "controlnet_conditioning_scale": 0.7},
        ),
    ],
    ids=["two lengths with guidance", "truncated, without guidance"],
)  # fmt: skip
def test_the_engines_compute_what_the_official_loop_computes(
    built: Built, prompts: list[str], settings: dict[str, Any]
) -> None:
    arguments = {**built.inputs(len(prompts)), **settings}

    expected = built.reference.run(prompts, **arguments)
    found = built.generator.run(prompts, output_type="np", **arguments)

    assert_close(found.tokens, expected.tokens.numpy())
    assert_close(found.latents, expected.latents.numpy())
    image = expected.image_u8.numpy()
    assert found.images.shape == image.shape
    assert np.abs(found.images.astype(int) - image.astype(int)).max() <= 1
    # weights that saturate would hide what they compute
    assert 0.3 < found.tokens.std() < 5
    assert 0.3 < found.latents.std() < 10
    assert len(np.unique(image)) > 50


def test_edits_and_compositions_are_those_of_the_official_loop(built: Built) -> None:
    """Known tokens among the masked ones, and two prompts for parts of one grid."""
    places, prompts = built.shapes.visual_tokens, [SHORT, LONG]
    side = round(places**0.5)
    rng = np.random.default_rng(5)
    tokens = rng.standard_normal((1, places, built.shapes.decoder.hidden_size), np.float32)
    masked = rng.permutation(np.arange(places) % 3 > 0)
    settings: dict[str, Any] = {
        **built.inputs(2), "cfg_weight": 2.0, "decoding_steps": 3, "num_inference_steps": 2,
        "guidance_scale": 2.0, "controlnet_conditioning_scale": 1.0,
    }  # fmt: skip
    known = np.repeat(tokens, 2, axis=0)
    mask = Image.fromarray(masked.reshape(side, side).astype(np.uint8) * 255)

    expected = built.reference.run(
        prompts, tokens=known, masked=np.tile(masked, (2, 1)), **settings
    )
    found = built.generator.run(prompts, tokens=known, mask=mask, output_type="np", **settings)
    assert_close(found.tokens, expected.tokens.numpy())
    assert_close(found.latents, expected.latents.numpy())

    middle = (np.arange(side) + 0.5) / side
    upper = np.repeat(middle < 0.5, side)
    expected = built.reference.run(
        prompts,
        tokens=known,
        masked=np.ones((2, places), bool),
        regions=np.tile(upper.astype(int), (2, 1)),
        region_prompts=("an old bridge",),
        **settings,
    )
    parts: list[Any] = [("an old bridge", (0, 0, 1, 0.5))]
    found = built.generator.run(prompts, compose=parts, output_type="np", **settings)
    assert_close(found.tokens, expected.tokens.numpy())
    assert_close(found.latents, expected.latents.numpy())


def test_guidance_is_an_input_where_a_network_embeds_it(built: Built) -> None:
    embeds = built.shapes.transformer.guidance_embeds or built.shapes.controlnet.guidance_embeds
    arguments = {**built.inputs(1), "decoding_steps": 1, "num_inference_steps": 1}

    low, high = (
        built.generator.run(SHORT, guidance_scale=scale, output_type="latent", **arguments)
        for scale in (1.0, 6.0)
    )

    assert built.generator.manifest.model.guidance_embeds == embeds
    assert (np.abs(low.latents - high.latents).max() > 1e-3) == embeds


def test_every_tokenizer_dialect_gives_the_ids_of_its_tokenizer(built: Built) -> None:
    found = Tokenizers(built.folder, built.generator.manifest.text)
    words = "two boats, near 3 old houses"
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Generate an image of {words}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
    )

    assert found.mllm_prompt(words) == tokenizers.qwen().encode(chat).ids
    ids = tokenizers.clip().encode(words).ids
    end = tokenizers.clip_end()
    assert found.clip([words]).tolist() == [ids + [end] * (77 - len(ids))]
    ids = tokenizers.t5().encode(SHORT).ids
    assert found.t5([SHORT]).tolist() == [ids + [0] * (T5_LENGTH - len(ids))]
    ids = tokenizers.t5().encode(TOO_LONG).ids
    assert found.t5([TOO_LONG]).tolist() == [[*ids[: T5_LENGTH - 1], 1]]
    ids = found.mllm_prompt(TOO_LONG)
    assert len(ids) == built.shapes.max_seq_length
    assert ids[-1] == tokenizers.qwen_id("<|vision_start|>")


def test_the_image_is_as_large_as_the_vae_makes_it(built: Built) -> None:
    model = built.generator.manifest.model
    side = 4 * round(built.shapes.visual_tokens**0.5)
    scale = 2 ** (len(built.shapes.vae.block_out_channels) - 1)

    assert (model.image_height, model.image_width) == (side * scale, side * scale)


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.shape == expected.shape
    error = np.abs(found.astype(np.float64) - expected).max()
    assert error <= TOLERANCE * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_answers_are_those_of_transformers(built: Built, backend: str) -> None:
    """Greedy ids, and the logits of the answer that they make."""
    if reason := backends.BACKENDS[backend].unavailable():
        pytest.skip(reason)
    decoder = built.shapes.decoder
    if decoder.hidden_size % decoder.num_attention_heads:
        pytest.skip("transformers has no heads of their own width")
    checkpoint = built.folder.parent / "checkpoint"
    judge = Judge(checkpoint / "mllm", checkpoint / "bifrost")
    facts = manifest.read(built.folder)
    engines = Engines(
        built.folder,
        replace(facts, engines=(facts.engine("mllm_text"),)),
        backends.load(backend),
    )
    try:
        for seed, turns in enumerate(TURNS[5::3]):
            asked = judge.asks(turns, seed)
            expected = judge.answer(asked, 24)
            run = Answering(engines, facts).answer(
                asked.conversation, Sampling(), max_new_tokens=24, stop_ids=(), timings={}
            )
            assert list(run) == expected, turns.name
            logits = judge.logits(asked, expected)
            found = forced_logits(engines, asked.conversation, expected)
            assert np.abs(found - logits).max() < TOLERANCE * np.abs(logits).max(), turns.name
    finally:
        engines.close()
