"""A number format is named in its own file: others ask it what it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from bifrost_rt import formats
from bifrost_rt.formats import FORMATS
from export import formats as exported

ROOT = Path(__file__).parents[2]
PACKAGES = ("bifrost_rt", "export", "benchmarks")
# What else has these names, and is no format: file -> why.
ALLOWED = {
    "benchmarks/bare.py": "the backend openvino-bf16, and OpenVINO's own word",
    "benchmarks/ceilings.py": "a figure of the table of devices",
    "benchmarks/compiling.py": "the cases of an experiment",
    "benchmarks/cpu.py": "the cases of an experiment",
    "benchmarks/gpu.py": "the cases of an experiment",
    "benchmarks/peers/flux.py": "cases of an experiment, peers' own words",
    "benchmarks/peers/flux_files.py": "cases of an experiment, peers' own words",
    "benchmarks/peers/gguf_files.py": "cases of an experiment, peers' own words",
    "benchmarks/peers/programs/genai_text.py": "cases of an experiment, peers' own words",
    "benchmarks/peers/programs/openvino_step.py": "cases of an experiment, peers' own words",
    "benchmarks/peers/text.py": "cases of an experiment, peers' own words",
    "bifrost_rt/backends/__init__.py": "the backend openvino-bf16",
    "bifrost_rt/backends/openvino.py": "the backend openvino-bf16, and OpenVINO's own word",
    "bifrost_rt/processor.py": "features of processors as Linux calls them, and products of bytes",
    "export/compile/plan_text.py": "types of whole numbers that plans may have",
    "export/compile/quantized.py": "operators of TensorRT for layers of each format",
    "export/dialects/float8.py": "the type of torch that holds every float8",
    "export/dialects/gguf_file.py": "types of GGUF, and torch's for them",
    "export/quantize/rounding.py": "element types of torch",
    "export/stages/__init__.py": "what an engine may differ by in each 16-bit type",
    "export/stages/vae_decode.py": "what this engine may differ by in each 16-bit type",
    "export/weights.py": "a type of GGUF, in a hint",
}


def vocabulary() -> set[str]:
    """Every format's name and dtypes; float32 is the dtype of all inputs and outputs too."""
    found = {n for f in FORMATS.values() for n in (f.name, f.dtype, f.computes_in) if n}
    return found - {formats.FULL.dtype}


def words(source: str) -> set[str]:
    """The words of a module's texts and identifiers, in small letters; comments and docstrings
    are prose."""
    tree = ast.parse(source)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str() as text) if id(node) not in prose:
                found.update(re.findall(r"\w+", text.lower()))
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.arg(arg=name):
                found |= {name.lower(), *name.lower().split("_")}
            case ast.alias(name=name):
                found.update(name.lower().split("."))
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                found |= {name.lower(), *name.lower().split("_")}
            case ast.keyword(arg=str() as name):
                found |= {name.lower(), *name.lower().split("_")}
    return found


def naming() -> dict[str, set[str]]:
    """File -> the formats that it names."""
    known = vocabulary()
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        if names := words(path.read_text()) & known:
            found[path.relative_to(ROOT).as_posix()] = names
    return found


def test_a_format_is_named_in_its_own_file_alone() -> None:
    own = {f"{package}/formats/{name}.py" for package in PACKAGES for name in FORMATS}
    elsewhere = {file: names for file, names in naming().items() if file not in own}
    assert elsewhere.keys() - ALLOWED.keys() == set(), elsewhere
    assert ALLOWED.keys() - elsewhere.keys() == set(), "no longer needed"


def test_both_halves_of_a_declaration_are_there() -> None:
    assert list(FORMATS) == list(exported.FORMATS)
    for name, declared in exported.FORMATS.items():
        assert declared.runtime is FORMATS[name]


def test_what_the_files_of_a_format_hold_tells_it_from_all_others() -> None:
    held = [(f.stored, given) for f in exported.FORMATS.values() for given in f.inputs]
    assert len(held) == len(set(held))
    named = [word for f in exported.FORMATS.values() for word in f.plan]
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    "code",
    [
        'x = "int8"',
        'raise ValueError(f"--precision bf16, or {x}")',
        "y = np.float16",
        "FP8 = 3",
    ],
)
def test_a_name_in_code_is_found(code: str) -> None:
    assert words(code) & vocabulary()


def test_prose_is_not_code() -> None:
    assert not words('"""int8 and fp8."""\n# bf16\nx = "a half"') & vocabulary()


def test_every_format_says_what_belongs_together() -> None:
    for declared in FORMATS.values():
        assert (declared.computes_in is None) == (declared.deviation is None), declared.name
        assert declared.quantized or not (declared.kernels or declared.session_entries)
    assert formats.HALF.largest is None  # the range of float32
    assert len({declared.order for declared in FORMATS.values()}) == len(FORMATS)


def test_a_format_of_a_newer_build_changes_nothing() -> None:
    assert formats.of_layers(["int5", "float8/float"]) == []
    assert formats.of_type("float6") is None
    assert formats.in_memory("float6", "onnxruntime", 1.5) == 1.5
