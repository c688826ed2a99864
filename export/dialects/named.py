"""A network's tensors by our names, whatever their file calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from export.configs import MOST_LAYERS
from export.dialects.place import Place
from export.errors import CheckpointError
from export.weights import Weights


@dataclass(frozen=True)
class Named:
    """The tensors of one network.

    Attributes:
        place: a name of diffusers or transformers -> where its values stand.
        spoken: whose names the file has, for the report.
    """

    weights: Weights
    place: Callable[[str], Place]
    spoken: str

    def find(self, name: str) -> tuple[Weights, Place]:
        """Say where a parameter stands, as `export.weights.fill` asks."""
        return self.weights, self.place(name)

    def __contains__(self, name: str) -> bool:
        return self.place(name).key in self.weights

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of the file's tensor that holds a parameter.

        Raises:
            CheckpointError: there is none, or it has not `rank` dimensions.
        """
        return self.weights.shape(self.place(name).key, rank)

    def layers(self, name: str) -> int:
        """Say how many layers there are: one more than the highest `{}` for which `name` is
        there."""
        return max((i + 1 for i in range(MOST_LAYERS) if name.format(i) in self), default=0)

    def unknown(self, what: str, config: str) -> CheckpointError:
        """Say what tensors alone do not tell."""
        return CheckpointError(
            f"{self.weights.folder}: {what}",
            hint=f"give its config.json: --flux-configs DIR, with DIR/{config}/config.json",
        )
