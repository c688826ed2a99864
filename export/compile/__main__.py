"""`python -m export.compile`: a built set -> engines for the GPUs that it shall run on."""

from __future__ import annotations

import argparse
from pathlib import Path

from bifrost_rt import command
from export import extras
from export.build import INTERRUPTED, Progress
from export.compile.options import COMPUTE, TITLES, WEIGHTS


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)

    @extras.needed("compile")
    def compiled() -> int:
        # what reads graphs: not before the command line is understood
        from export.compile.compiled_set import compile_set

        folder = compile_set(
            options.set,
            options.output,
            backend=options.backend,
            targets=options.target,
            max_images=options.max_images,
            max_steps=options.max_steps,
            compute=options.compute,
            weights=options.weights,
            measure=options.measure,
            on_cpu=options.on_cpu,
            progress=Progress(),
        )
        print(folder)
        return 0

    return command.run(compiled, debug=options.debug, interrupted=INTERRUPTED)


def parts(text: str) -> tuple[str, ...]:
    """`sm89,rtx-5090` -> its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def positive(text: str) -> int:
    """Return a number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.compile",
        description="Compile the ONNX graphs of an engine set for GPUs. TensorRT-RTX needs no GPU "
        "for that; TensorRT compiles on the device itself.",
    )
    parser.add_argument("set", type=Path, help="a set built for onnxruntime")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the new set")
    parser.add_argument(
        "--backend", choices=tuple(TITLES), default="tensorrt-rtx", help="default: tensorrt-rtx"
    )
    parser.add_argument(
        "--target",
        metavar="NAMES",
        type=parts,
        default=(),
        help="sm86,sm89,sm120 or rtx-4090,rtx-5090 …; default: the architecture of this machine's "
        "GPU; current: that very card",
    )
    parser.add_argument("--max-images", metavar="N", type=positive, help="images per run")
    parser.add_argument(
        "--max-steps", metavar="N", type=positive, help="steps of a loop; default: the set's own"
    )
    parser.add_argument(
        "--compute",
        choices=tuple(COMPUTE),
        help="arithmetic of what is not quantized; default: the set's precision",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="baked into the engines, or bound at run time; default: bound from 1 GiB an engine; "
        "weights of 4 bits are always baked",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="compute 16-bit graphs here, beside the float32 ones, and refuse what differs by more "
        "than it should",
    )
    parser.add_argument(
        "--on-cpu",
        metavar="ENGINES",
        type=parts,
        default=(),
        help="engines that stay ONNX graphs and run on the CPU, names with commas: the GPU's "
        "memory is for the others",
    )
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
