"""How many bytes a weight takes: of a whole set in one precision, or of one whose recipe says
otherwise of some engines and layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from export.formats import FORMATS, FULL, HALF
from export.formats.base import Format
from export.precision import SMALL
from export.quantize import policy
from export.quantize.policy import Layer
from export.recipe import Recipe


@dataclass(frozen=True)
class Storage:
    """What a set is asked to be stored in.

    Attributes:
        precision: where nothing else is said.
        fallback: of what is not quantized in a set that is.
        stages: engine -> its precision, as in a recipe.
        layers: pattern of `engine:path` -> precision, as in a recipe.
    """

    precision: Format
    fallback: Format = HALF
    stages: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Storage:
        """Return what a recipe asks for."""
        precision, fallback = FORMATS[recipe.precision], FORMATS[recipe.fallback]
        return cls(precision, fallback, recipe.stages, recipe.layers)

    @property
    def formats(self) -> tuple[Format, ...]:
        """All that are asked for, in the order of `FORMATS`."""
        asked = {self.precision.name, *self.stages.values(), *self.layers.values()}
        return tuple(declared for name, declared in FORMATS.items() if name in asked)

    @property
    def mixed(self) -> bool:
        """Whether more than one precision is asked for."""
        return len(self.formats) > 1

    @property
    def name(self) -> str:
        """As a report calls it."""
        return self.precision.name if not self.mixed else "as the recipe says"

    def check(self, elements: Iterable[Elements]) -> None:
        """Refuse what is said of engines and layers that are not there.

        Raises:
            RecipeError: an override that names no engine or fits no layer.
        """
        policy.check({one.engine: one.layers for one in elements}, self.stages, self.layers)

    def of(self, engine: str) -> Format:
        """Return what an engine is asked to be."""
        return FORMATS[self.stages.get(engine, self.precision.name)]


@dataclass(frozen=True)
class Elements:
    """The numbers that an engine stores.

    Attributes:
        engine: its name.
        layers: its linear layers whose weights are stored.
        other: weights of embeddings and convolutions.
        kept: bytes of what stays in float32 at every precision: norms, biases, tables, and whatever
            is too small to be worth a conversion.
    """

    engine: str
    layers: tuple[Layer, ...]
    other: int
    kept: int

    @property
    def linear(self) -> int:
        """Weights of linear layers that are quantized where that is asked for."""
        return sum(layer.weights for layer in self.layers if not layer.exception)

    def given(self, storage: Storage) -> dict[Layer, Format]:
        """Return what every linear layer becomes, as far as that is known without values."""
        choices = policy.of_layers(
            *(self.engine, self.layers, storage.of(self.engine).name),
            *(storage.fallback.name, storage.layers),
        )
        return {
            layer: FORMATS[choice.fmt] for layer, choice in zip(self.layers, choices, strict=True)
        }

    def most(self, storage: Storage) -> Format:
        """Return the format of most weights of the linear layers, or of what there is beside them
        where there are none."""
        found: Counter[str] = Counter()
        for layer, fmt in self.given(storage).items():
            found[fmt.name] += layer.weights
        return FORMATS[found.most_common(1)[0][0]] if found else self.rest(storage)

    def held(self, storage: Storage) -> Format:
        """Return the format of most bytes, which a manifest names."""
        found = Counter({self.rest(storage).name: self.other * self.rest(storage).other_bytes})
        found[FULL.name] += self.kept
        for layer, fmt in self.given(storage).items():
            found[fmt.name] += bytes_of(layer, fmt)
        return FORMATS[found.most_common(1)[0][0]]

    def rest(self, storage: Storage) -> Format:
        """Return what it stores that is no linear layer."""
        asked, given = storage.of(self.engine), self.given(storage).values()
        return policy.rest(asked, given, storage.fallback)

    def bytes_at(self, storage: Storage | None) -> int:
        """Return bytes of all of them; None is float32."""
        storage = storage or Storage(FULL)
        linear = sum(bytes_of(layer, fmt) for layer, fmt in self.given(storage).items())
        return linear + self.other * self.rest(storage).other_bytes + self.kept


def bytes_of(layer: Layer, fmt: Format) -> int:
    """Return bytes of a linear layer's weight and its scales."""
    full = FULL.other_bytes * layer.weights
    if not fmt.quantized and full < SMALL:
        return full
    return round(layer.weights * fmt.linear_bits / 8) + layer.outputs * fmt.channel_bytes
