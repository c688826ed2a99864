"""Checkpoints of the Hugging Face hub: found in the local cache, fetched only when asked for.

What is given for a part of a checkpoint is a path, or `org/name`, or `org/name@revision`; for a
single file, one of these with the file's path behind it: `org/name/folder/file.safetensors`. The
cache is that of huggingface_hub: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_TOKEN count as they do
there.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from export import foreign
from export.configs import read_json
from export.errors import CheckpointError

_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILE = re.compile(
    r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w.-]+))?/(?P<file>.+)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"
# Of a folder: everything that is no weights and that a build may read.
TEXTS = ("*.json", "*.jinja", "*.txt", "*.model")
# part -> its folders that hold a network, with the stems of their weights; its other folders
NETWORKS: dict[str, dict[str, tuple[str, ...]]] = {
    "mllm": {"": ("model",)},
    "bifrost": {"": ("model",), "flux_controlnet/": ("diffusion_pytorch_model", "model")},
    "flux": {
        "transformer/": ("diffusion_pytorch_model",),
        "vae/": ("diffusion_pytorch_model",),
        "text_encoder/": ("model",),
        "text_encoder_2/": ("model",),
    },
}
TEXT_FOLDERS = {"mllm": (), "bifrost": (), "flux": ("tokenizer/", "tokenizer_2/", "scheduler/")}
LISTED = 4  # missing files that an error names


@dataclass(frozen=True)
class Repository:
    """A model of the hub, at a branch, tag or commit."""

    id: str
    revision: str = MAIN

    def __str__(self) -> str:
        return self.id if self.revision == MAIN else f"{self.id}@{self.revision}"

    @property
    def folder(self) -> str:
        """Its folder in a cache."""
        return "models--" + self.id.replace("/", "--")


def find(given: str, part: str, *, download: bool = False) -> Path:
    """Return the folder of a part of a checkpoint.

    Args:
        given: a path, the root of a model in a hub cache, or a hub id that is no path.
        part: mllm, bifrost or flux.
        download: whether what the cache lacks of a hub id is fetched.

    Raises:
        CheckpointError: the cache does not hold the model, or not all of it; or it cannot be
            fetched: gated, unknown, no connection, no room.
    """
    path = Path(given)
    if given.endswith(foreign.SINGLE_FILE_ENDINGS):
        return find_file(given, download=download)
    if os.path.lexists(path):
        if not (path / "snapshots").is_dir() or (path / "config.json").exists():
            return path
        return snapshot(path, MAIN) or path
    match = _ID.fullmatch(given)
    if match is None or path.parent.exists():
        return path  # no hub id: what is wrong with it is said where it is opened
    import huggingface_hub
    from huggingface_hub import constants

    repository = Repository(match["repository"], match["revision"] or MAIN)
    cache = Path(constants.HF_HUB_CACHE)
    folder = snapshot(cache / repository.folder, repository.revision)
    lacking = None if folder is None else missing(folder, part)
    if folder is not None and not lacking:
        return folder
    if not download:
        raise _not_there(repository, part, cache, folder, lacking)
    folder = _fetch(
        repository,
        cache,
        lambda: huggingface_hub.snapshot_download(
            repository.id, revision=repository.revision, allow_patterns=patterns(part)
        ),
    )
    if lacking := missing(folder, part):
        raise CheckpointError(
            f"{repository}: fetched, but not a {part} checkpoint: {_named(lacking)} missing in "
            f"{folder}",
            hint=f"give --{part} the model that it is published as; if the connection was lost, "
            "run the same command again",
        )
    return folder


def find_file(given: str, *, download: bool = False) -> Path:
    """Return a single file.

    Args:
        given: a path, or a file of a model of the hub that is no path: `org/name/file`,
            `org/name@revision/file`.
        download: whether it is fetched where the cache lacks it.

    Raises:
        CheckpointError: the cache does not hold it, or it cannot be fetched.
    """
    path = Path(given)
    match = _FILE.fullmatch(given)
    if match is None or os.path.lexists(path) or Path(path.parts[0]).exists():
        return path  # what is wrong with it is said where it is opened
    import huggingface_hub
    from huggingface_hub import constants

    repository = Repository(match["repository"], match["revision"] or MAIN)
    cache, name = Path(constants.HF_HUB_CACHE), match["file"]
    folder = snapshot(cache / repository.folder, repository.revision)
    if folder is not None and (folder / name).exists():
        return folder / name
    if not download:
        revision = "" if repository.revision == MAIN else f" --revision {repository.revision}"
        raise CheckpointError(
            f"{repository}: {name} is not in the hub cache {cache}",
            hint=f"add --download to fetch it, or run `hf download {repository.id} {name}"
            f"{revision}`; of a path, check that its folder is there",
        )
    return _fetch(
        repository,
        cache,
        lambda: huggingface_hub.hf_hub_download(repository.id, name, revision=repository.revision),
    )


def snapshot(root: Path, revision: str) -> Path | None:
    """Return the folder of a revision below a model's folder in a cache; None where there is none.

    Without `main`, a sole snapshot stands for it.
    """
    snapshots = root / "snapshots"
    if _COMMIT.fullmatch(revision):
        commit = revision
    elif (root / "refs" / revision).is_file():
        text = (root / "refs" / revision).read_text(encoding="utf-8", errors="replace")
        commit = text.strip()
    else:
        there = sorted(p for p in snapshots.glob("*") if p.is_dir())
        return there[0] if revision == MAIN and len(there) == 1 else None
    return snapshots / commit if commit and (snapshots / commit).is_dir() else None


def missing(folder: Path, part: str) -> list[str]:
    """Return the files that a snapshot lacks to be built from: configs, weights, shards of an
    index, and links whose file is not there.

    Raises:
        CheckpointError: an index is damaged.
    """
    return sorted(set(_missing(folder, part)))


def _missing(folder: Path, part: str) -> Iterator[str]:
    for place, stems in NETWORKS[part].items():
        if not (folder / place / "config.json").is_file():
            yield f"{place}config.json"
        weights = [
            path.relative_to(folder).as_posix()
            for stem in stems
            for path in sorted((folder / place).glob(f"{stem}*.safetensors*"))
        ]
        if not weights:
            yield f"{place}{stems[0]}.safetensors"
        for name in weights:
            if not (folder / name).exists():
                yield name  # a link to a blob that was not fetched, or was removed
            elif ".safetensors.index" in name:
                listed = read_json(folder / name).get("weight_map")
                shards = listed.values() if isinstance(listed, dict) else ()
                yield from (f"{place}{s}" for s in shards if not (folder / place / s).exists())
    for place in TEXT_FOLDERS[part]:
        if not any((folder / place).glob("*")):
            yield place


def patterns(part: str) -> list[str]:
    """Return the files of a repository that a build reads, as globs whose * also matches a
    slash."""
    places = [*NETWORKS[part], *TEXT_FOLDERS[part]]
    weights = [f"{p}{s}*.safetensors*" for p, stems in NETWORKS[part].items() for s in stems]
    texts = [f"{place}{text}" for place in places for text in TEXTS]
    return [*weights, *texts, "model_index.json"]


def command(repository: Repository, part: str) -> str:
    """Return the command line that completes the cache."""
    revision = "" if repository.revision == MAIN else f" --revision {repository.revision}"
    included = " ".join(f"--include '{pattern}'" for pattern in patterns(part))
    return f"hf download {repository.id}{revision} {included}"


def _not_there(
    repository: Repository, part: str, cache: Path, folder: Path | None, lacking: list[str] | None
) -> CheckpointError:
    found = (
        f"not in the hub cache {cache}"
        if folder is None
        else f"not complete in the hub cache: {_named(lacking or [])} missing in {folder}"
    )
    return CheckpointError(
        f"{repository}: {found}",
        hint=f"add --download to fetch what is missing, or run `{command(repository, part)}`",
    )


def _fetch(repository: Repository, cache: Path, call: Callable[[], str]) -> Path:
    """Let the client fetch what the cache lacks. A connection that is lost continues within `call`;
    after it, files that are complete stay.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    page = f"{constants.ENDPOINT}/{repository.id}"
    try:
        return Path(call())
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repository}: gated: its authors give it to those who accept its licence",
            hint=f"accept the licence at {page}, then set HF_TOKEN to a token of that account, or "
            "run `hf auth login`",
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository}: no such model at {constants.ENDPOINT}, or a private one",
            hint="check the name; of a private model, set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{repository}: the model has no revision {repository.revision!r}",
            hint=f"see its branches and tags at {page}",
        ) from None
    except errors.LocalEntryNotFoundError as error:
        # what the client raises for every failed connection, and for HF_HUB_OFFLINE
        raise _unreachable(repository, cache, error.__cause__ or error) from None
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: the model has no such file: {str(error).strip().splitlines()[-1]}",
            hint=f"see its files at {page}",
        ) from None
    except Exception as error:  # the connection's, the disk's, the transfer library's
        raise _unreachable(repository, cache, error) from None


def _unreachable(repository: Repository, cache: Path, error: BaseException) -> CheckpointError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return CheckpointError(
            f"{repository}: not complete in the hub cache {cache}, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE to fetch it",
        )
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return CheckpointError(
        f"{repository}: not fetched from {constants.ENDPOINT}: {type(error).__name__}: {reason}",
        hint="run the same command again: what is there already is not fetched again",
    )


def _named(files: list[str]) -> str:
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    return ", ".join(files[:LISTED]) + more
