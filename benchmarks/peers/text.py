"""The work of text: a prompt of a few hundred tokens, and an answer, at the 7B model's widths."""

from __future__ import annotations

from benchmarks.peers import text_files
from benchmarks.peers.candidates import PROGRAMS, Candidate, Work
from benchmarks.peers.environments import Environment

LAYERS, PROMPT, NEW_TOKENS = 4, 300, 16
# GCC before 12.4 and 13.3 drops what AMX's tiles are configured with (its bug 114098): llama.cpp
# would end with an illegal instruction.
LLAMA = Environment(
    "llama-cpp",
    ("llama-cpp-python==0.3.36", "numpy==2.4.6"),
    {"CXXFLAGS": "-fno-tree-dse -fno-dse"},
)
REFERENCE = "bifrost-rt float32, onnxruntime"
GENAI = Environment(
    "openvino-genai",
    ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "nncf==3.4.0", "numpy==2.4.6"),
)
FORMS, GGUF = ("bf16", "int8"), ("q8_0", "bf16", "f16")


def work(
    like: str = "7b", layers: int = LAYERS, tokens: int = PROMPT, new: int = NEW_TOKENS
) -> Work:
    """Make the models and name who runs them."""
    shapes = text_files.shapes(like, layers)
    folder = text_files.made(shapes, FORMS, GGUF)
    asked = {"prompt": text_files.prompt(tokens).tolist(), "new_tokens": new}

    def own(precision: str, form: str, backend: str, name: str) -> Candidate:
        settings = {"folder": str(folder), "form": form, "backend": backend, **asked}
        program = f"{PROGRAMS}.own_text"
        return Candidate(f"bifrost-rt {name}", precision, program, None, settings)

    def peer(precision: str, kind: str, name: str, **settings: str | bool) -> Candidate:
        llama = "flash_attention" in settings
        program = f"{PROGRAMS}.{'llama_text' if llama else 'genai_text'}"
        given = {"file": str(folder / f"{kind}.gguf"), **asked, **settings}
        return Candidate(name, precision, program, LLAMA if llama else GENAI, given)

    decoder = shapes.decoder
    return Work(
        name="text",
        figures={"token": "a token", "prefill": f"prefill of {tokens} tokens"},
        sizes={
            **{"like": like, "layers": layers, "vocabulary": decoder.vocab_size},
            **{"hidden": decoder.hidden_size, "mlp": decoder.intermediate_size},
            **{"prompt_tokens": tokens, "new_tokens": new},
        },
        reference=REFERENCE,
        candidates=(
            own("8 bit", "int8", "onnxruntime", "int8, onnxruntime"),
            own("8 bit", "int8", "openvino", "int8, openvino"),
            own("8 bit", "int8", "openvino-bf16", "int8, openvino-bf16"),
            peer("8 bit", "q8_0", "llama.cpp Q8_0", flash_attention=False),
            peer("8 bit", "q8_0", "OpenVINO GenAI Q8_0", weights="q8_0", arithmetic=""),
            peer("8 bit", "f16", "OpenVINO GenAI int8", weights="int8", arithmetic=""),
            own("16 bit", "bf16", "openvino-bf16", "bfloat16, openvino-bf16"),
            peer("16 bit", "bf16", "llama.cpp BF16", flash_attention=False),
            peer("16 bit", "f16", "OpenVINO GenAI bfloat16", weights="f16", arithmetic="bf16"),
            own("float32", "bf16", "onnxruntime", REFERENCE.removeprefix("bifrost-rt ")),
            peer("float32", "f16", "OpenVINO GenAI float32", weights="f16", arithmetic="f32"),
        ),
    )
