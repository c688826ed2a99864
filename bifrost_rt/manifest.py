"""The manifest: the only contract between export and runtime.

One frozen object, written by the builder and read by the runtime; the object that was tested is
the object that was saved. Everything that changes bytes or behaviour of a set stands in it.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from bifrost_rt import serialization
from bifrost_rt.errors import EngineSetError, IntegrityError

FORMAT = 4
FILENAME = "manifest.json"
REBUILD = "rebuild the set with `python -m export.build`"
# Types of tables and sizes, in which no layer computes.
INDICES = frozenset({"int64", "int32", "bool"})


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of an engine's inputs and outputs. A dimension is a number or the name of a
    symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a symbolic dimension; `max` is None where the engine sets no limit."""

    min: int
    max: int | None


@dataclass(frozen=True)
class Precision:
    """What was asked for, and what the engine really holds and computes in.

    `weights` is the type of most of its bytes, `INDICES` apart. `layers` counts the layers with a
    weight by their format, as read back from the file; it is empty in sets that do not state it.
    """

    requested: str
    weights: str
    compute: str
    layers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """Where the scales of quantized layers come from: a file of the set, the fingerprint of the
    checkpoint that it was made with, the number of its prompts, and how ranges were chosen."""

    file: str
    checkpoint: str
    prompts: int
    scales: str


@dataclass(frozen=True)
class Lora:
    """A LoRA whose products were added to the weights: the name and hash of its file, and what the
    products were multiplied by beside what the file says itself."""

    file: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class BoundWeight:
    """An input that is a weight: `size` bytes at `offset` of a file of the set, as they are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class Compiled:
    """How an engine was compiled. It runs with this version of this library on these GPUs alone.

    `source_sha256` is that of the ONNX graph that it was compiled from. `weights` are those that
    the engine does not hold: it gets their addresses when it is opened. `activation_bytes` and
    `weight_bytes` are the builder's own figures of GPU memory: what the arithmetic takes in the
    largest run of the engine's profile, from its opening on, and what the engine itself holds; 0 in
    sets that do not state them.
    """

    builder: str
    version: str
    targets: tuple[str, ...]
    flags: tuple[str, ...]
    source_sha256: str
    weights: tuple[BoundWeight, ...] = ()
    activation_bytes: int = 0
    weight_bytes: int = 0


@dataclass(frozen=True)
class State:
    """Loop state: what a step leaves in `output` is `input` of the next.

    `kind` says how a step writes it. "swap": all of it anew, into another buffer; the two change
    places from step to step. "append": rows behind those that are there, which stay as they are, so
    a step that is repeated leaves the same. "in_place": single elements of it. The last two may be
    written where they are read, on backends that allow it.
    """

    output: str
    input: str
    kind: Literal["swap", "append", "in_place"] = "swap"


@dataclass(frozen=True)
class EngineSpec:
    """One compiled graph with named, typed inputs and outputs.

    `state` is what its loop hands from step to step; empty where it has no loop.
    `scratch_bytes` is what its arithmetic needs between its inputs and outputs for one image at
    the default steps and the longest prompt, counted from the graph; 0 in sets that do not state
    it. `square_bytes` is what comes beside where all rows of a larger run see each other: that much
    for the square of its growth.
    `piece_scratch_bytes` is the same for `dims.CHUNK` tokens of a conversation behind
    a cache of `dims.CONTEXT`; 0 for engines that read none.
    `compiled` is None where the file is an ONNX graph.
    `backend` is the engine's own, where it is not the set's.
    `shared` are files of other engines whose weights it reads too, with the bytes of them that it
    reads.
    """

    name: str
    graph: str
    files: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[State, ...]
    precision: Precision
    scratch_bytes: int = 0
    compiled: Compiled | None = None
    piece_scratch_bytes: int = 0
    square_bytes: int = 0
    backend: str | None = None
    shared: dict[str, int] = field(default_factory=dict)

    def input(self, name: str) -> TensorSpec | None:
        """Return the input called `name`, or None where this engine has none of that name."""
        return next((t for t in self.inputs if t.name == name), None)

    def output(self, name: str) -> TensorSpec:
        """Return the output called `name`."""
        return next(t for t in self.outputs if t.name == name)

    @property
    def next_inputs(self) -> dict[str, str]:
        """The input that each output of the loop state becomes in the next step."""
        return {state.output: state.input for state in self.state}


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the model that the set was built from."""

    hidden_size: int
    num_visual_tokens: int
    num_image_tokens: int
    latent_channels: int
    image_height: int
    image_width: int
    guidance_embeds: bool


@dataclass(frozen=True)
class Scheduler:
    """Flow-matching sigmas, with the names of diffusers' FlowMatchEulerDiscreteScheduler."""

    num_train_timesteps: int
    use_dynamic_shifting: bool
    shift: float
    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise."""

    decoding_steps: int
    cfg_weight: float
    num_inference_steps: int
    guidance_scale: float
    controlnet_conditioning_scale: float


@dataclass(frozen=True)
class MllmText:
    """The MLLM's prompt: `prefix_ids`, the user's turn (`lead` + prompt, as ordinary text),
    `postfix_ids`; never longer than `max_length` tokens."""

    tokenizer: str
    prefix_ids: tuple[int, ...]
    lead: str
    postfix_ids: tuple[int, ...]
    max_length: int


@dataclass(frozen=True)
class EncoderText:
    """A text encoder's prompt: truncated and padded to `max_length` with `pad_id`."""

    tokenizer: str
    max_length: int
    pad_id: int


@dataclass(frozen=True)
class Text:
    """The three tokenizers."""

    mllm: MllmText
    clip: EncoderText
    t5: EncoderText


@dataclass(frozen=True)
class Chat:
    """How conversations are written: Qwen2.5-VL's chat template, in ids.

    Attributes:
        turn_start, turn_end: around every message; a line break follows the end.
        vision_start, image_pad, vision_end: around an image, and each of its tokens.
        stop_ids: tokens that end an answer.
        default_system: what the system says where no message does; None: nothing.
        think: what the MLLM is asked where it thinks before it draws, with `{prompt}` in the
            place of the prompt; None in sets that do not state it.
    """

    turn_start: int
    turn_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    stop_ids: tuple[int, ...]
    default_system: str | None = None
    think: str | None = None


@dataclass(frozen=True)
class Vision:
    """How images become the vision tower's patches.

    Attributes:
        patch_size: pixels of a patch's side; `temporal_patch_size` times the same patch are read.
        merge_size: patches of a token's side.
        window: tokens of a window's side, which most layers do not look beyond.
        min_pixels, max_pixels: smaller images are made larger, larger ones smaller.
        rescale_factor, image_mean, image_std: pixels (0 to 255) times the factor, less the mean,
            over the deviation.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window: int
    min_pixels: int
    max_pixels: int
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


@dataclass(frozen=True)
class File:
    """A file of the set, beside the manifest."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Deviation:
    """How far one image is from another: the peak signal to noise ratio in dB, and the mean
    difference of a pixel's channel, of 255."""

    psnr: float
    mean: float


class SetSpec(Protocol):
    """What a run reads of an engine set: of a manifest, or of the plan of a build that has none
    yet. The fields are those of `Manifest`."""

    @property
    def name(self) -> str:
        """Name the set in errors."""
        ...

    @property
    def model(self) -> ModelFacts:
        """Give the sizes of the model."""
        ...

    @property
    def scheduler(self) -> Scheduler:
        """Give the schedule of noise levels."""
        ...

    @property
    def defaults(self) -> Defaults:
        """Give what a request gets that does not say otherwise."""
        ...

    @property
    def text(self) -> Text:
        """Give the three tokenizers."""
        ...

    @property
    def vision(self) -> Vision | None:
        """Say how images become patches; None where the set reads none."""
        ...

    @property
    def chat(self) -> Chat | None:
        """Say how conversations are written; None where the set holds none."""
        ...

    @property
    def dimensions(self) -> Mapping[str, Range]:
        """Give the bounds of the sizes that callers choose."""
        ...

    @property
    def engines(self) -> tuple[EngineSpec, ...]:
        """List the engines, in the order in which a run uses them."""
        ...

    @property
    def files(self) -> Mapping[str, File]:
        """List the files whose sizes and hashes are known."""
        ...

    def engine(self, name: str) -> EngineSpec:
        """Find an engine by its name."""
        ...


@dataclass(frozen=True)
class Manifest:
    """An engine set. `files` lists every file beside the manifest. `vision` is None where the set
    reads no images, `chat` where it holds no conversations. `selftest` is how far the self-test's
    image was from the builder's when the engines were simulated on a CPU, where they were."""

    format: int
    name: str
    backend: str
    builder: dict[str, str]
    model: ModelFacts
    scheduler: Scheduler
    defaults: Defaults
    text: Text
    dimensions: dict[str, Range]
    engines: tuple[EngineSpec, ...]
    files: dict[str, File]
    calibration: Calibration | None = None
    selftest: Deviation | None = None
    vision: Vision | None = None
    chat: Chat | None = None
    loras: tuple[Lora, ...] = ()

    def engine(self, name: str) -> EngineSpec:
        """Find an engine by its name.

        Raises:
            EngineSetError: the set has no such engine.
        """
        return engine_of(self, name)

    def dumps(self) -> bytes:
        """Return the file's bytes: readable JSON whose last key is the sha256 of everything before
        it."""
        data = dataclasses.asdict(self)
        for engine in data["engines"]:
            for optional in ("compiled", "backend", "shared"):
                if not engine[optional]:
                    del engine[optional]
        for optional in ("calibration", "selftest", "vision", "chat", "loras"):
            if not data[optional]:
                del data[optional]
        return _render(data, hashlib.sha256(_render(data, None)).hexdigest())


def engine_of(spec: SetSpec, name: str) -> EngineSpec:
    """Find an engine of a set by its name.

    Raises:
        EngineSetError: the set has no such engine.
    """
    for engine in spec.engines:
        if engine.name == name:
            return engine
    raise EngineSetError(f"the set {spec.name!r} has no engine {name!r}", hint=REBUILD)


def stored_bytes(spec: SetSpec, engine: EngineSpec) -> int:
    """Count the bytes that an engine is opened from: its files, and what it reads of others'."""
    return sum(spec.files[name].size for name in engine.files) + sum(engine.shared.values())


def _render(data: Mapping[str, Any], digest: str | None) -> bytes:
    sealed = dict(data) if digest is None else {**data, "sha256": digest}
    return (json.dumps(sealed, indent=1, ensure_ascii=False) + "\n").encode()


def read(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        EngineSetError: there is none, it is of another format, or it does not fit this version.
        IntegrityError: its bytes were changed after the build.
    """
    path = folder / FILENAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        found = "no such folder" if not folder.is_dir() else (error.strerror or str(error))
        raise EngineSetError(
            f"{path}: cannot read an engine set here: {found}",
            hint="build one with `python -m export.build --output DIR` and pass that folder",
        ) from None
    try:
        raw = raw.removeprefix(codecs.BOM_UTF8)
        data = json.loads(raw)
        found_format = data["format"]
        digest = data.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: not a manifest ({error})", hint=REBUILD) from None
    if found_format != FORMAT:
        raise EngineSetError(
            f"{path}: manifest format {found_format}, this version reads format {FORMAT}",
            hint="upgrade bifrost-rt" if _newer(found_format) else REBUILD,
        )
    if raw != _render(data, hashlib.sha256(_render(data, None)).hexdigest()):
        raise IntegrityError(
            f"{path}: changed after the build (its sha256 {str(digest)[:12]}… does not fit)",
            hint=REBUILD,
        )
    try:
        return serialization.load(Manifest, data)
    except serialization.SerializationError as error:
        raise EngineSetError(f"{path}: {error}", hint=REBUILD) from None


def _newer(found: Any) -> bool:
    return isinstance(found, int) and found > FORMAT


def sha256(path: Path) -> str:
    """Digest of one file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_file(folder: Path, name: str, expected: File) -> None:
    """Check one file of a set: there, of the right size, and the very bytes that were built.

    Raises:
        IntegrityError: naming the file, what was expected and what was found.
    """
    path = folder / name
    if path.is_symlink() and not path.is_file():
        raise IntegrityError(
            f"{path}: is a link to {os.readlink(path)}, where there is no file",
            hint="copy the set with the files that its links lead to: cp -rL SET COPY",
        )
    if not path.is_file():
        raise IntegrityError(f"{path}: missing from the engine set", hint=REBUILD)
    size = path.stat().st_size
    if size != expected.size:
        raise IntegrityError(
            f"{path}: expected {expected.size} bytes, found {size}: truncated or foreign",
            hint=REBUILD,
        )
    found = sha256(path)
    if found != expected.sha256:
        raise IntegrityError(
            f"{path}: damaged: expected sha256 {expected.sha256[:12]}…, found {found[:12]}…",
            hint=REBUILD,
        )
