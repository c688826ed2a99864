"""LoRA files: products of two small matrices that are added to the weights of linear layers.

A layer's weight becomes `W + scale * alpha / rank * up @ down`, computed in float32 and rounded
once to the type that the checkpoint has the weight in. Names of `down` and `up` of a layer `a`:

    a.lora_A.weight       a.lora_B.weight       PEFT, and diffusers with `transformer.` before it
    a.lora.down.weight    a.lora.up.weight      diffusers, formerly
    a.lora_down.weight    a.lora_up.weight      kohya, with underscores for the points of `a`

A layer is called as diffusers and transformers call it, or as FLUX's authors do. Of their joined
tensors (`qkv`, `linear1`), each part gets its rows of `up`.

alpha is `a.alpha`, or stands in PEFT's adapter_config.json, or in the file's header where diffusers
puts the same; a file without any was trained with alpha = rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from bifrost_rt.manifest import Lora
from export import lazy_tensors
from export.configs import Config, Flag, Real
from export.dialects import clip, flux
from export.dialects.place import Place
from export.errors import CheckpointError
from export.lazy_tensors import LazyTensor
from export.lora_files import LoraFile
from export.stored import FLOATS, of_safetensors
from export.weights import Weights, is_finite, listed

DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down", "lora_A.default")
UP = ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up", "lora_B.default")
PEFT, PEFT_CONFIG = "base_model.model.", "adapter_config.json"
HEADER = "lora_adapter_metadata"
ALPHA = Real(-1e6, 1e6)
# What PEFT can do to a layer beside adding a product, by the value that does not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    # others begin with a changed base model
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_OF_THE_MLLM = re.compile(r"(^|[._])(language_model|model[._]layers|visual)[._]")
# Part of FLUX -> what tools write before its layers' names. Behind what ends in an underscore, so
# do the names' own parts.
PREFIXES = {
    "transformer": ("", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_"),
    "text_encoder": ("", "text_encoder.", "lora_te1_"),
    "text_encoder_2": ("", "text_encoder_2.", "lora_te2_", "lora_te3_"),
}


@dataclass(frozen=True)
class Layer:
    """What a file adds to one layer.

    Attributes:
        down, up: names of its tensors, [rank, in] and [out, rank].
        factor: of their product, the asked scale included.
    """

    down: str
    up: str
    rank: int
    factor: float


@dataclass
class Adapter:
    """One opened file.

    Attributes:
        said: what the manifest says of it.
        layers: a layer, as the file calls it -> what is added to it.
        taken: the layers that were found in a network.
    """

    said: Lora
    weights: Weights
    layers: Mapping[str, Layer]
    taken: set[str] = dataclasses.field(default_factory=set)


def load(asked: LoraFile) -> Adapter:
    """Open a file and check what can be checked without the networks.

    Raises:
        CheckpointError: it is damaged or no LoRA; or, naming the tensors, half of a pair, a wrong
            rank, alpha or type, or something beside the product.
    """
    said = asked.described()
    weights = Weights(asked.path, of_safetensors(asked.path))
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in weights.entries:
        path, kind = _split(name)
        if kind is None:
            others.append(name)
        else:
            found.setdefault(path, {})[kind] = name
    if not any({"down", "up"} & parts.keys() for parts in found.values()):
        raise CheckpointError(
            f"{asked.path}: holds no LoRA, but {listed(sorted(weights.entries), 3)}",
            hint="--lora takes the file of an adapter, such as pytorch_lora_weights.safetensors",
        )
    if others:
        raise CheckpointError(
            f"{asked.path}: holds more than the products of a LoRA: {listed(sorted(others))}",
            hint="DoRA, LoHa, LoKr, biases and whole layers are not added here: merge the adapter "
            "into its model with what trained it, and give the merged model",
        )
    _check_types(weights)
    if half := [p for p, parts in found.items() if not {"down", "up"} <= parts.keys()]:
        raise CheckpointError(
            f"{asked.path}: a LoRA has two matrices for each layer, and one is missing of "
            + listed(sorted(half)),
            hint="the file is not complete: copy or download it again",
        )
    settings = _settings(asked.path, weights)
    return Adapter(
        said,
        weights,
        {
            path: _layer(weights, path, parts, settings, asked.scale)
            for path, parts in sorted(found.items())
        },
    )


def adapt(
    adapters: Sequence[Adapter], part: str, net: nn.Module
) -> Callable[[str, LazyTensor], LazyTensor]:
    """Return what adds all files' products to a network's weights.

    Args:
        part: of FLUX, its folder in a pipeline.
        net: the network, with its weights or on the meta device.

    Returns:
        A parameter's name and source -> its source with the products.

    Raises:
        CheckpointError: naming the layers that have other shapes, or that one file has twice.
    """
    known = _known(part, net) if adapters else {}
    added: dict[str, list[tuple[Adapter, str, Place]]] = {}
    for adapter in adapters:
        misshapen, here = [], dict[str, str]()
        for path, layer in adapter.layers.items():
            for name, place in known.get(path, ()):
                adapter.taken.add(path)
                out, inner = net.get_parameter(name).shape
                for key, expected in (
                    (layer.up, place.stored_shape([out, layer.rank])),
                    (layer.down, [layer.rank, inner]),
                ):
                    shape = list(adapter.weights.shape(key))
                    if shape != expected and (key, expected, shape) not in misshapen:
                        misshapen.append((key, expected, shape))
                if (other := here.setdefault(name, path)) != path:
                    raise CheckpointError(
                        f"{adapter.weights.folder}: adds to {name} as {other} and as {path}",
                        hint="give a file that has each layer once",
                    )
                added.setdefault(name, []).append((adapter, path, place))
        if misshapen:
            found = [f"{key}: expected {wanted}, found {is_}" for key, wanted, is_ in misshapen]
            raise CheckpointError(
                f"{adapter.weights.folder}: tensors of a wrong shape: {listed(found)}",
                hint="the LoRA was trained on another model",
            )

    def with_products(name: str, source: LazyTensor) -> LazyTensor:
        parts = added.get(name)
        return source if parts is None else _sum(name, source, parts)

    return with_products


def refuse_left_overs(adapters: Sequence[Adapter]) -> None:
    """After all networks were adapted: raise for layers that are in none of them.

    Raises:
        CheckpointError: naming them.
    """
    left = {a.weights.folder: [p for p in a.layers if p not in a.taken] for a in adapters}
    missing = {file: paths for file, paths in left.items() if paths}
    if not missing:
        return
    of_mllm = any(_OF_THE_MLLM.search(path) for paths in missing.values() for path in paths)
    raise CheckpointError(
        "no such layers in FLUX's transformer and text encoders: "
        + "; ".join(f"{file}: {listed(paths)}" for file, paths in missing.items()),
        hint="a LoRA of the MLLM is not added here: merge it (`merge_and_unload()` of peft) and "
        "give the merged folder as --mllm"
        if of_mllm
        else "the LoRA was trained on another model than FLUX.1",
    )


def _split(name: str) -> tuple[str, str | None]:
    """Return a tensor's layer, and which of the layer's tensors it is."""
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    for kind, spellings in (("down", DOWN), ("up", UP)):
        for spelling in spellings:
            if name.endswith(f".{spelling}.weight"):
                return name.removesuffix(f".{spelling}.weight"), kind
    return name, None


def _check_types(weights: Weights) -> None:
    if wrong := sorted(n for n, entry in weights.entries.items() if entry.dtype not in FLOATS):
        kinds = sorted({weights.entries[name].dtype for name in wrong})
        raise CheckpointError(
            f"{weights.folder}: tensors of a LoRA are {', '.join(kinds)}, expected "
            f"{', '.join(FLOATS)}: {listed(wrong)}",
            hint="save the LoRA in one of these types",
        )


def _layer(
    weights: Weights,
    path: str,
    parts: Mapping[str, str],
    settings: Mapping[str, Config],
    scale: float,
) -> Layer:
    """Check one layer's tensors, and read its alpha.

    Raises:
        CheckpointError: two ranks, or an alpha that is none.
    """
    down, up = (weights.shape(parts[kind]) for kind in ("down", "up"))
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise CheckpointError(
            f"{weights.folder}: {parts['down']} {list(down)} and {parts['up']} {list(up)} have no "
            "rank in common, expected [rank, in] and [out, rank]",
            hint="the file is damaged, or no LoRA of linear layers",
        )
    rank = down[0]
    if "alpha" in parts:
        factor = _alpha(weights, parts["alpha"]) / rank
    elif path.startswith(PEFT) and PEFT not in settings:
        raise CheckpointError(
            f"{weights.folder}: alpha of its layers is unknown: no {PEFT_CONFIG} beside it",
            hint=f"put the {PEFT_CONFIG} there that peft saved with the file",
        )
    else:
        factor = _stated(path, rank, settings)
    return Layer(parts["down"], parts["up"], rank, scale * factor)


def _alpha(weights: Weights, name: str) -> float:
    value = weights.source(name).read().float()
    if value.numel() != 1 or not value.item() > 0:
        raise CheckpointError(
            f"{weights.folder}: {name} is {value.tolist()}, expected one number above 0",
            hint="the file is damaged, or no LoRA",
        )
    return value.item()


def _settings(file: Path, weights: Weights) -> dict[str, Config]:
    """Return what PEFT says of layers whose names begin with a prefix.

    Raises:
        CheckpointError: it cannot be read, or says that more than a product was added.
    """
    found: dict[str, Config] = {}
    beside = file.parent / PEFT_CONFIG
    if any(name.startswith(PEFT) for name in weights.entries) and beside.exists():
        found[PEFT] = Config.read(beside)
    with safe_open(file, framework="pt") as stream:
        text = (stream.metadata() or {}).get(HEADER)
    if text is not None:
        try:
            values = json.loads(text)
            values.items()
        except (ValueError, AttributeError, RecursionError):
            raise CheckpointError(
                f"{file}: {HEADER} in its header is no JSON object", hint="save the LoRA again"
            ) from None
        for prefix in sorted({p for prefixes in PREFIXES.values() for p in prefixes}):
            if prefix and not prefix.endswith("."):
                continue
            own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
            if "lora_alpha" in own:
                found[prefix] = Config(file, own, {key: f"{HEADER}: {prefix}{key}" for key in own})
    for config in found.values():
        for key, plain in PLAIN.items():
            config.only(key, *plain)
    return found


def _stated(path: str, rank: int, settings: Mapping[str, Config]) -> float:
    """alpha / rank of a layer that has no tensor alpha."""
    prefix = max((p for p in settings if path.startswith(p)), key=len, default=None)
    if prefix is None:
        return 1.0
    config, name = settings[prefix], path.removeprefix(prefix)
    alpha: float = config.get("lora_alpha", ALPHA)
    patterns = config.table("alpha_pattern")
    for pattern in patterns.values if patterns is not None else ():
        assert patterns is not None
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error:
            raise patterns.error(pattern, "but the key is no regular expression") from None
        if fits:
            alpha = patterns.get(pattern, ALPHA)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora", Flag(), False) else rank)


def _known(part: str, net: nn.Module) -> dict[str, list[tuple[str, Place]]]:
    """Every name that a file may have for a network's linear layers -> the parameters that the
    layer is or holds, and what of it they are."""
    places: list[Callable[[str], Place]] = [Place]
    if part == "transformer":
        places.append(flux.places(net.get_parameter("x_embedder.weight").shape[0]))
    elif part == "text_encoder":
        places = [lambda name: Place(name.removeprefix(clip.PREFIX)),
                  lambda name: Place(clip.PREFIX + name.removeprefix(clip.PREFIX))]  # fmt: skip
    found: dict[str, dict[str, Place]] = {}
    for path, module in net.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        for place_of in places:
            place = place_of(f"{path}.weight")
            for spoken in _spoken(part, place.key.removesuffix(".weight")):
                found.setdefault(spoken, {})[f"{path}.weight"] = place
    return {spoken: list(parameters.items()) for spoken, parameters in found.items()}


def _spoken(part: str, path: str) -> Iterator[str]:
    for prefix in PREFIXES[part]:
        if prefix.endswith("_"):
            yield prefix + path.replace(".", "_")
        else:
            yield prefix + path
            yield f"{PEFT}{prefix}{path}"


def _sum(name: str, source: LazyTensor, parts: Sequence[tuple[Adapter, str, Place]]) -> LazyTensor:
    """Return a weight with products added in their order; read anew, one at a time."""
    products = [_product(*part) for part in parts]

    def total(stored: Tensor) -> Tensor:
        result = products[0].read().add_(stored)
        for product in products[1:]:
            result.add_(product.read())
        result = result.to(stored.dtype)
        if not is_finite(result):
            files = ", ".join(str(adapter.weights.folder) for adapter, _, _ in parts)
            raise CheckpointError(
                f"{files}: with it, {name} has values beyond {stored.dtype}",
                hint="give a smaller scale",
            )
        return result

    return source.map("; ".join(product.identity for product in products), total)


def _product(adapter: Adapter, path: str, place: Place) -> LazyTensor:
    layer, weights = adapter.layers[path], adapter.weights
    rows = None if place.rows is None else place.rows[:2]
    up, down = place.take(weights.source(layer.up, rows)), weights.source(layer.down)

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        return (left.float() @ right.float()).mul_(layer.factor)

    product = lazy_tensors.join("product", [up, down], multiply, shape=(up.shape[0], down.shape[1]))
    facts = (path, place.rows, place.swapped, layer.factor)
    # by its content: a copy of the file adds the same
    return dataclasses.replace(product, identity=f"{adapter.said.sha256}{facts}")
