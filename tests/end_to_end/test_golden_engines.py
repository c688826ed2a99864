"""Each engine by itself, fed with the reference's own tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

from bifrost_rt import backends, manifest, schedules, text_inputs
from bifrost_rt.engines import Engines
from bifrost_rt.manifest import Manifest
from tests.conftest import ALPHA, Case, difference, load_case

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def facts(alpha_set: Path) -> Manifest:
    return manifest.read(alpha_set)


@pytest.fixture(scope="module")
def engines(alpha_set: Path, facts: Manifest) -> Iterator[Engines]:
    opened = Engines(alpha_set, facts, backends.load("onnxruntime"))
    yield opened
    opened.close()


def prefill(engines: Engines, case: Case) -> dict[str, np.ndarray]:
    """All rows of a case, [uncond…, cond…], as the two branches of guidance."""
    rows = len(case.tensors["mllm.pad_len"])
    texts = [case.tensors[f"mllm.text_ids.{r}"] for r in range(rows)]
    given = text_inputs.prompts(engines.spec("mllm_text"), texts, max(map(len, texts)))
    outputs = engines.run("mllm_text", given, {})
    cache = {name: array for name, array in outputs.items() if name.startswith("text_")}
    text_index = np.arange(rows, dtype=np.int64).reshape(2, -1)
    lengths = np.array([len(text) for text in texts], np.int64)
    masked = np.repeat(outputs["masked_token"][:1], rows // 2, axis=0)
    tokens = np.repeat(masked, engines.spec("visual_decode").input("tokens").shape[1], axis=1)
    return {**cache, "tokens": tokens, "text_length": lengths, "text_index": text_index}


def test_prefill_gives_the_references_keys_and_values(engines: Engines) -> None:
    debug = load_file(ALPHA / "debug_00.safetensors")
    case = load_case("case_00")
    cache = prefill(engines, case)
    for layer in range(3):
        for name in ("keys", "values"):
            found = cache[f"text_{name}.{layer}"]  # [2, kv_heads, S, head_dim]
            padded = debug[f"mllm.layer{layer}.{name[0]}_cache"]  # left-padded to 48
            for row, pad in enumerate(case.tensors["mllm.pad_len"]):
                real = padded[row, :, pad:48]
                assert difference(found[row, :, : 48 - pad], real) < TOLERANCE


def test_every_decoding_step_equals_the_references(engines: Engines, case: Case) -> None:
    cache = prefill(engines, case)
    steps = case.tensors["mllm.tokens_steps"]
    masks = schedules.reveal_masks(case.tensors["mllm.orders"], case.facts["num_iter"])
    assert np.array_equal(masks, case.tensors["mllm.reveal_mask"].astype(bool))
    places, sources = schedules.reveal_rows(masks)
    tokens = cache.pop("tokens")
    for step, expected in enumerate(steps):
        outputs = engines.run(
            "visual_decode",
            {
                **cache,
                "tokens": np.ascontiguousarray(tokens),
                "step": np.array([step]),
                "reveal_places": places,
                "token_sources": sources,
                "cfg_weight": np.array([case.facts["cfg"]], np.float32),
            },
            {},
        )
        assert difference(outputs["next_tokens"], expected) < TOLERANCE
        assert outputs["next_step"] == step + 1
        tokens = expected


def test_text_encoders(engines: Engines, case: Case) -> None:
    t = case.tensors
    pooled = engines.run("clip_text", {"input_ids": t["flux.clip_input_ids"].astype(np.int64)}, {})
    embeds = engines.run("t5_text", {"input_ids": t["flux.t5_input_ids"].astype(np.int64)}, {})
    assert difference(pooled["pooled_prompt_embeds"], t["flux.pooled_prompt_embeds"]) < TOLERANCE
    assert difference(embeds["prompt_embeds"], t["flux.prompt_embeds"]) < TOLERANCE


def conditions(engines: Engines, facts: Manifest, case: Case) -> dict[str, np.ndarray]:
    t = case.tensors
    n = len(t["mllm.orders"])
    of_prompt = engines.run(
        "conditioning",
        {
            "prompt_embeds": t["flux.prompt_embeds"],
            "pooled_prompt_embeds": t["flux.pooled_prompt_embeds"],
            "prompt_index": np.arange(n),
            "timesteps": schedules.timesteps(t["flux.sigmas"], facts.scheduler),
            "guidance_scale": np.array([case.facts["guidance_scale"]], np.float32),
        },
        {},
    )
    of_tokens = engines.run("control_embed", {"tokens": t["mllm.tokens_final"]}, {})
    return {**of_prompt, **of_tokens}


def test_conditioning_gives_the_references_contexts(engines: Engines, facts: Manifest) -> None:
    debug = load_file(ALPHA / "debug_00.safetensors")
    found = conditions(engines, facts, load_case("case_00"))
    for name, expected in (
        ("control_condition", "cn.controlnet_x_embedder"),
        ("controlnet_context", "cn.context_embedder"),
        ("transformer_context", "tr.context_embedder"),
    ):
        assert difference(found[name], debug[expected]) < TOLERANCE


def test_every_denoising_step_equals_the_references(
    engines: Engines, facts: Manifest, case: Case
) -> None:
    t = case.tensors
    fixed = conditions(engines, facts, case)
    sigmas = schedules.sigmas(
        case.facts["num_inference_steps"], facts.model.num_image_tokens, facts.scheduler
    )
    assert np.array_equal(sigmas, t["flux.sigmas"])
    weights = schedules.denoising_plan(sigmas, 1).weights
    scale = np.array([case.facts["controlnet_conditioning_scale"]], np.float32)
    latents = t["flux.latents_init"]
    for step, expected in enumerate(t["flux.latents_steps"]):
        outputs = engines.run(
            "denoise",
            {
                **fixed,
                "latents": np.ascontiguousarray(latents),
                "velocity": np.ones_like(latents),  # an Euler step does not use it
                "step": np.array([step]),
                "step_weights": weights,
                "controlnet_conditioning_scale": scale,
            },
            {},
        )
        assert difference(outputs["next_latents"], expected) < TOLERANCE
        assert difference(outputs["next_velocity"], t["flux.noise_pred"][step]) < TOLERANCE
        latents = expected


@pytest.mark.parametrize("name", ["case_00", "case_01", "case_04"])
def test_vae_float_image(alpha_set: Path, name: str) -> None:
    """The float image is inside the graph, before it is rounded: the output of its last
    convolution."""
    t = load_case(name).tensors
    model = onnx.load(alpha_set / "vae_decode.onnx")
    sample = [node for node in model.graph.node if node.op_type == "Conv"][-1].output[0]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(sample))
    model.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    pixels, image = session.run(None, {"latents": t["flux.latents_steps"][-1]})
    assert difference(image, t["flux.image"]) < TOLERANCE
    assert difference(pixels, t["flux.image_u8"]) <= 1
