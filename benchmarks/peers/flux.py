"""The work of FLUX: a denoising step at 512 pixels, ControlNet and transformer."""

from __future__ import annotations

from benchmarks.peers import flux_files
from benchmarks.peers.candidates import PROGRAMS, Candidate, Work
from benchmarks.peers.environments import Environment

DIFFUSERS = Environment(
    "diffusers",
    (
        *("torch==2.13.0", "diffusers==0.42.1", "transformers==5.24.0", "safetensors==0.8.0"),
        *("openvino==2026.4.1", "nncf==3.4.0", "numpy==2.4.6"),
    ),
)
REFERENCE = "diffusers float32"
FORMS = ("bf16", "int8")


def work(like: str, blocks: int | None) -> Work:
    """Make the networks and name who runs them.

    Args:
        blocks: of each kind, in each network, at most; None: as the preset has them.
    """
    shapes = flux_files.shapes(like, blocks)
    folder = str(flux_files.made(shapes, FORMS))

    def own(precision: str, form: str, backend: str, name: str) -> Candidate:
        settings = {"folder": folder, "form": form, "backend": backend}
        program = f"{PROGRAMS}.own_step"
        return Candidate(f"bifrost-rt {name}, {backend}", precision, program, None, settings)

    def torch(precision: str, dtype: str, compiled: bool) -> Candidate:
        name = f"diffusers {dtype}" + (", compiled" if compiled else "")
        settings = {"folder": folder, "dtype": dtype, "compiled": compiled}
        return Candidate(name, precision, f"{PROGRAMS}.torch_step", DIFFUSERS, settings)

    def openvino(precision: str, weights: str, arithmetic: str, name: str) -> Candidate:
        settings = {"folder": folder, "weights": weights, "arithmetic": arithmetic}
        program = f"{PROGRAMS}.openvino_step"
        return Candidate(f"OpenVINO {name}", precision, program, DIFFUSERS, settings)

    networks = {"transformer": shapes.transformer, "controlnet": shapes.controlnet}
    return Work(
        name=f"flux at {'true' if like == '7b' else like} width",
        figures={"step": "a step"},
        sizes={
            **{"like": like, "image_tokens": 4 * shapes.visual_tokens},
            "text_tokens": flux_files.TEXT_TOKENS,
            **{
                name: {
                    **{"width": net.inner, "heads": net.heads},
                    **{"double": net.double_blocks, "single": net.single_blocks},
                }
                for name, net in networks.items()
            },
        },
        reference=REFERENCE,
        candidates=(
            own("float32", "bf16", "onnxruntime", "float32"),
            own("float32", "bf16", "openvino", "float32"),
            torch("float32", "float32", False),
            torch("float32", "float32", True),
            openvino("float32", "fp32", "f32", "float32"),
            own("16 bit", "bf16", "openvino-bf16", "bfloat16"),
            torch("16 bit", "bfloat16", False),
            torch("16 bit", "bfloat16", True),
            openvino("16 bit", "fp32", "bf16", "bfloat16"),
            own("8 bit", "int8", "onnxruntime", "int8"),
            own("8 bit", "int8", "openvino-bf16", "int8"),
            openvino("8 bit", "int8", "bf16", "int8 weights, bfloat16"),
        ),
    )
