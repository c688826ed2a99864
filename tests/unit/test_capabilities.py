"""Which GPU computes what: names, refusals, and what is offered instead."""

from __future__ import annotations

import pytest

from bifrost_rt.manifest import Defaults, Range, TensorSpec
from export.compile import messages
from export.compile.capabilities import ARCHITECTURES, architecture, check, check_pair
from export.compile.profiles import sizes
from export.errors import CompileError

DEFAULTS = Defaults(16, 1.0, 28, 3.5, 0.7)
DIMENSIONS = {
    "images": Range(1, None),
    "prompts": Range(1, None),
    "texts": Range(1, None),
    "branches": Range(1, 2),
    "revealed": Range(1, 16),
    "text_tokens": Range(1, 48),
    "steps": Range(1, None),
}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("sm89", "sm89"),
        ("SM120", "sm120"),
        ("rtx-2080-ti", "sm75"),
        ("rtx-3060-12gb", "sm86"),
        ("rtx-4070-ti-super", "sm89"),
        ("RTX 4090", "sm89"),
        ("NVIDIA GeForce RTX 5090", "sm120"),
        ("rtx5080", "sm120"),
        ("rtx-2000-ada", "sm89"),
        ("rtx-pro-6000", "sm120"),
        ("jetson-orin-nano-super", "sm87"),
        ("jetson-agx-orin-64gb", "sm87"),
        ("jetson-agx-thor", "sm110"),
        ("dgx-spark", "sm121"),
        ("h200", "sm90"),
    ],
)
def test_a_cards_name_leads_to_its_architecture(target: str, expected: str) -> None:
    assert architecture(target) == expected


@pytest.mark.parametrize("target", ["sm70", "rtx-9999", "", "radeon-7900", "rtx-40900"])
def test_an_unknown_target_lists_the_known(target: str) -> None:
    with pytest.raises(CompileError, match=r"(?s)is unknown.*sm75, .*sm121"):
        architecture(target)


def test_cards_of_one_architecture_are_one_target() -> None:
    found = check("tensorrt-rtx", ["rtx-4090", "sm120", "rtx-4060", "rtx-5090"], ["float32"])
    assert found == ("sm89", "sm120")


@pytest.mark.parametrize(
    ("target", "dtype", "message", "instead"),
    [
        ("sm86", "float8_e4m3fn", "sm86 .* has no fp8", "--precision int8"),
        ("sm89", "float4_e2m1fn", "sm89 .* has no nvfp4", "--precision fp8"),
        ("sm80", "float4_e2m1fn", "sm80 .* has no nvfp4", "--precision int8"),
        ("rtx-2080", "int4", "sm75 .* has no int4", "--precision int8"),
        ("rtx-2080", "bfloat16", "sm75 .* has no bf16", "--precision fp16"),
    ],
)
def test_arithmetic_that_is_not_there(target: str, dtype: str, message: str, instead: str) -> None:
    with pytest.raises(CompileError, match=message) as error:
        check("tensorrt", ["sm120", target], ["float32", dtype])
    assert instead in str(error.value.hint)


@pytest.mark.parametrize(
    ("dtypes", "missing", "instead"),
    [
        (["bfloat16", "int8"], "bf16", "--fallback fp16"),
        (["bfloat16", "float8_e4m3fn"], "bf16, fp8", "--precision int8"),
    ],
)
def test_what_else_a_quantized_set_holds(dtypes: list[str], missing: str, instead: str) -> None:
    with pytest.raises(CompileError, match=f"sm75 .* has no {missing} arithmetic") as error:
        check("tensorrt", ["sm75"], dtypes)
    assert instead in str(error.value.hint)


def test_sums_of_int8_overflow_float16_on_rtx_alone() -> None:
    with pytest.raises(CompileError, match=r"`denoise`: int8 .* fp16 overflow.* 65504") as error:
        check_pair("tensorrt-rtx", "denoise", ["int8", "int4"], "float16")
    assert "--compute bf16" in str(error.value.hint)
    for builder, formats, compute in (
        ("tensorrt-rtx", ["int8"], "bfloat16"),
        ("tensorrt-rtx", ["int8"], "float32"),
        ("tensorrt-rtx", ["fp8"], "float16"),
        ("tensorrt", ["int8"], "float16"),
    ):
        check_pair(builder, "denoise", formats, compute)
    # so what a card without bf16 is offered, int8 within fp16, is never for TensorRT-RTX
    rtx = [about for about in ARCHITECTURES.values() if "tensorrt-rtx" in about.builders]
    assert all("bf16" in about.precisions for about in rtx)


@pytest.mark.parametrize("target", ["rtx-2080", "jetson-agx-orin", "jetson-agx-thor", "h100"])
def test_what_tensorrt_rtx_does_not_cover_goes_to_tensorrt(target: str) -> None:
    with pytest.raises(CompileError, match=r"tensorrt-rtx does not compile for sm\d+") as error:
        check("tensorrt-rtx", [target], ["float32"])
    assert "--backend tensorrt" in str(error.value.hint)
    assert check("tensorrt", [target], ["float32"]) == (architecture(target),)


def test_newer_architectures_keep_what_older_ones_had() -> None:
    for name in ("fp32", "fp16", "int8"):
        assert all(name in about.precisions for about in ARCHITECTURES.values())


def test_a_set_without_a_limit_needs_one() -> None:
    with pytest.raises(CompileError, match="any number of images") as error:
        sizes(DIMENSIONS, DEFAULTS, None, None)
    assert "--max-images" in str(error.value.hint)


def test_profiles_follow_the_dimensions() -> None:
    found = sizes(DIMENSIONS, DEFAULTS, 4, None)
    assert found.ranges()["texts"] == Range(1, 5)  # one more, for guidance
    assert found.ranges()["steps"] == Range(1, 28)  # the larger of the two loops' defaults
    sources = TensorSpec("token_sources", "int64", ("steps", "images", 16))
    assert found.of(sources) == ((1, 1, 16), (28, 1, 16), (28, 4, 16))
    places = TensorSpec("reveal_places", "int64", ("steps", "images", "revealed"))
    assert found.of(places) == ((1, 1, 1), (28, 1, 1), (28, 4, 16))


def test_a_size_that_is_not_known_is_refused() -> None:
    with pytest.raises(CompileError, match="a size `frames`, which this version does not know"):
        sizes({**DIMENSIONS, "frames": Range(1, 8)}, DEFAULTS, 1, None)


def test_a_profile_follows_an_expression() -> None:
    found = sizes(DIMENSIONS, DEFAULTS, 4, None)
    both = TensorSpec("both", "float32", ("2*images + 1", "steps"))
    assert found.of(both) == ((3, 1), (3, 28), (9, 28))


def test_a_sets_own_limit_holds() -> None:
    limited = {**DIMENSIONS, "images": Range(1, 2), "prompts": Range(1, 2), "texts": Range(1, 3)}
    assert sizes(limited, DEFAULTS, None, None).ranges()["images"] == Range(1, 2)
    with pytest.raises(CompileError, match="`images` up to 3: the set allows 1 to 2"):
        sizes(limited, DEFAULTS, 3, None)


@pytest.mark.parametrize(
    ("logged", "advice"),
    [
        # as TensorRT-RTX 1.7.1 logs them
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] "
            "Cannot compile for target(s) sm75, because the model contains HW-specific datatypes: "
            "b16. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)",
            "--precision fp16",
        ),
        (
            "[localCheckMacros.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size "
            "was 68720180428 bytes.)",
            "lower --max-images",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (kOPT values for "
            "profile 0 violate shape constraints: x: tensor volume exceeds 1099511627776, "
            "dimensions are [n,1048576])",
            "--max-steps",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([myelin_graph.h:1295: "
            "attachExceptionMsgToGraph] MyelinCheckException: cuda_codegen_pattern.cpp:2713: "
            "CHECK(!exceed_int32_dim(kop)) failed.)",
            "--max-images",
        ),
        ("Unexpected exception std::bad_alloc", "free memory"),
        ("[Errno 12] Cannot allocate memory", "free memory"),
        ("MODEL_DESERIALIZE_FAILED: Assertion failed", "not an ONNX graph"),
        ("something new", "please report"),
    ],
)
def test_what_the_builder_says_comes_with_advice(logged: str, advice: str) -> None:
    noise = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (…)"
    error = messages.builder_error("denoise", "TensorRT-RTX", [noise, logged])
    assert "engine `denoise`: TensorRT-RTX cannot compile it" in error.message
    assert logged[:40] in error.message
    assert "catchCudaError" not in error.message
    assert advice in str(error.hint)


def test_a_layer_that_the_builder_names_is_named() -> None:
    said = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: "
        "check_turing_op_compatibility] Cannot compile operation 'node_linear_2' for Turing "
        "(SM75): FP32 GEMM is not supported.)"
    )
    error = messages.builder_error("denoise", "TensorRT-RTX", [said])
    assert error.message.startswith("engine `denoise`, layer `node_linear_2`: TensorRT-RTX cannot")
