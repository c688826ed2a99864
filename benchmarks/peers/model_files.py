"""Models that are made once, in the cache folder, for every candidate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from bifrost_rt import cache, serialization
from bifrost_rt.files import atomic_write
from bifrost_rt.manifest import EngineSpec
from export.synthetic.shapes import Shapes

if TYPE_CHECKING:
    from export.quantize.statistics import Statistics
    from export.stages import Stage

CLIP_TOKENS = 77
ENGINES = "engines.json"  # written when everything else is there


def made(
    name: str, of: Shapes, forms: tuple[str, ...], write: Callable[[Path], Mapping[str, EngineSpec]]
) -> Path:
    """Return the folder of a model, after making what is not there yet.

    Args:
        forms: whatever decides the files beside the shapes.
        write: fills the folder; returns our engines in it.
    """
    about = json.dumps([dataclasses.asdict(of), forms, _sources()], default=str)
    digest = hashlib.sha256(about.encode()).hexdigest()[:12]
    folder = cache.folder() / "peers" / f"{name}-{digest}"
    if (folder / ENGINES).exists():
        return folder
    print(f"making the models of {name} in {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    engines = {name: dataclasses.asdict(spec) for name, spec in write(folder).items()}
    with atomic_write(folder / ENGINES) as aside:
        aside.write_text(json.dumps(engines, indent=1) + "\n")
    return folder


def read(folder: Path) -> dict[str, EngineSpec]:
    """Return our engines in the folder of a model."""
    found = json.loads((folder / ENGINES).read_text())
    return {name: serialization.load(EngineSpec, engine) for name, engine in found.items()}


def stages(checkpoint: Path, *names: str, text_tokens: int, read: bool) -> dict[str, Stage]:
    """Return some engines of a checkpoint before they are graphs, by name.

    Args:
        text_tokens: that T5 reads.
        read: whether their weights are read now.
    """
    from export import assemble
    from export.checkpoint import Checkpoint

    parts = [checkpoint / part for part in ("mllm", "bifrost", "flux")]
    opened = Checkpoint(parts[0], parts[1], parts[2], read=read)
    facts, longest = assemble.facts(opened), opened.max_seq_length
    every = assemble.stages(opened, facts, longest, CLIP_TOKENS, text_tokens)
    return {stage.name: stage for stage in every if stage.name in names}


def calibrated(stage: Stage, given: Mapping[str, NDArray[Any]]) -> Statistics:
    """Return what the layers of a stage see of one call."""
    from export.quantize import calibrate
    from export.quantize.statistics import Statistics
    from export.torch_pipeline import evaluate
    from export.weight_offloading import streamed

    seen = Statistics("", ())
    with streamed(stage.module, 0), calibrate.watching([stage], seen.layers):
        evaluate(stage, given)
    return seen


def _sources() -> str:
    """Digest what decides the files beside the shapes."""
    here = Path(__file__).parent
    paths = [*sorted((here.parents[1] / "export").rglob("*.py")), *sorted(here.glob("*_files.py"))]
    digest = hashlib.sha256()
    for path in (*paths, here.parent / "truncated_models.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()
