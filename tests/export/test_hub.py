"""Models of the Hugging Face hub: the real client against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from export import hub
from export.errors import CheckpointError

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
ID = "org/model"
BLOCK = 1 << 16
CHUNK = 10 << 20  # bytes that the client takes at a time


class Hub:
    """A hub of one model, and what was asked of it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.gated = files, False
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.broken: set[str] = set()  # files whose connection is lost once, half way
        self.lost: set[str] = set()  # files whose bytes cannot be had
        hub_ = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub_.answer(self)

            def do_GET(self) -> None:
                hub_.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def bodies(self) -> list[str]:
        """The files whose bytes were asked for."""
        marks = tuple(f"/{ID}/resolve/{revision}/" for revision in (COMMIT, "main"))
        got = [path for method, path, _ in self.asked if method == "GET"]
        return [path.removeprefix(m) for path in got for m in marks if path.startswith(m)]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append((handler.command, path, handler.headers["Range"]))
        if path.startswith(f"/api/models/{ID}/tree/"):
            listing = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in self.files.items()
            ]
            return self.send(handler, json.dumps(listing).encode())
        if path in (f"/api/models/{ID}", f"/api/models/{ID}/revision/main"):
            return self.send(handler, json.dumps({"id": ID, "sha": COMMIT}).encode())
        if path.startswith(f"/api/models/{ID}/revision/"):
            return self.refuse(handler, 404, "RevisionNotFound")
        name = path.removeprefix(f"/{ID}/resolve/{COMMIT}/").removeprefix(f"/{ID}/resolve/main/")
        if name not in self.files and name != path:
            return self.refuse(handler, 404, "EntryNotFound")
        if name not in self.files:
            return self.refuse(handler, 404, "RepoNotFound")
        if self.gated:
            return self.refuse(handler, 403, "GatedRepo")
        if name in self.lost and handler.command == "GET":
            return self.refuse(handler, 500, "")
        return self.send(handler, self.files[name], name)

    def refuse(self, handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def send(self, handler: BaseHTTPRequestHandler, body: bytes, name: str = "") -> None:
        start, total = 0, len(body)
        if asked := handler.headers["Range"]:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        handler.send_response(206 if asked else 200)
        handler.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(total - start))
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if name in self.broken:
            self.broken.remove(name)
            handler.wfile.write(body[: total // 2])
            handler.wfile.flush()
            handler.close_connection = True
            return
        handler.wfile.write(body[start:])


def shards() -> dict[str, bytes]:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"metadata": {}, "weight_map": {f"t{i}": n for i, n in enumerate(names)}}
    return {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        names[0]: os.urandom(4 * BLOCK),
        names[1]: os.urandom(BLOCK),
        "README.md": b"not read",
        "pytorch_model.bin": b"not read",
        "original/consolidated.safetensors": b"not read",
    }


@pytest.fixture
def served() -> Iterator[Hub]:
    served = Hub(shards())
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def find(served: Hub, tmp_path: Path) -> Any:
    """Look for a model in a process of its own, as the client reads its variables at import."""

    def run(given: str = ID, *, download: bool = True, part: str = "mllm", **more: str) -> str:
        code = (
            "import sys; from export import hub\nfrom export.errors import CheckpointError\n"
            "part, more = sys.argv[2], {'download': sys.argv[3] == 'True'}\n"
            "call = (lambda given: hub.find_file(given, **more)) if part == 'file' else (\n"
            "    lambda given: hub.find(given, part, **more))\n"
            "try: print(call(sys.argv[1]))\n"
            "except CheckpointError as error: print('refused', error.message, '|', error.hint)\n"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": served.address, **more}
        environment["PYTHONPATH"] = str(Path(hub.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", code, given, part, str(download)],
            **{"env": environment, "cwd": tmp_path, "text": True, "timeout": 120},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_what_is_read_is_fetched_once(find: Any, served: Hub, tmp_path: Path) -> None:
    folder = Path(find())
    assert folder == tmp_path / f"home/hub/models--org--model/snapshots/{COMMIT}"
    there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    unread = ("README.md", "pytorch_model.bin", "original/consolidated.safetensors")
    assert there == {n: b for n, b in served.files.items() if n not in unread}
    served.asked.clear()
    for given in (ID, f"{ID}@main", f"{ID}@{COMMIT}", str(folder), str(folder.parents[1])):
        assert find(given) == find(given, download=False) == str(folder)
    assert served.asked == []


def test_nothing_is_fetched_unasked(find: Any, served: Hub, tmp_path: Path) -> None:
    said = find(download=False, HF_HUB_CACHE=str(tmp_path / "elsewhere"))
    assert f"{ID}: not in the hub cache {tmp_path / 'elsewhere'}" in said
    assert "add --download" in said
    assert f"hf download {ID} --include" in said
    assert served.asked == []


def test_a_partial_cache_is_named_and_completed(find: Any, served: Hub) -> None:
    folder = Path(find())
    lost = folder / "model-00002-of-00002.safetensors"
    lost.resolve().unlink()
    said = find(download=False)
    assert f"not complete in the hub cache: {lost.name} missing" in said
    lost.unlink()
    said = find(download=False)
    assert f"{lost.name} missing" in said
    served.asked.clear()
    assert find() == str(folder)
    assert served.bodies() == [lost.name]
    assert lost.read_bytes() == served.files[lost.name]


def test_a_lost_connection_continues_where_it_was(find: Any, served: Hub) -> None:
    name = "model-00001-of-00002.safetensors"
    served.files[name] = os.urandom(BLOCK) * (3 * CHUNK // BLOCK)
    served.broken.add(name)
    folder = Path(find())
    assert (folder / name).read_bytes() == served.files[name]
    ranges = [r for m, p, r in served.asked if m == "GET" and p.endswith(name)]
    assert ranges == [None, f"bytes={CHUNK}-"]


def test_an_interrupted_download_keeps_what_is_complete(find: Any, served: Hub) -> None:
    name = "model-00002-of-00002.safetensors"
    served.lost.add(name)
    said = find()
    assert f"refused {ID}: not fetched from {served.address}: HfHubHTTPError" in said
    assert "run the same command again" in said
    said = find(download=False)
    assert f"not complete in the hub cache: {name} missing" in said
    served.lost.clear()
    served.asked.clear()
    assert (Path(find()) / name).read_bytes() == served.files[name]
    assert served.bodies() == [name]


@pytest.mark.parametrize("part", ["file", "flux"])
def test_a_single_file(find: Any, served: Hub, tmp_path: Path, part: str) -> None:
    name = "split/flux1-dev.safetensors"
    served.files[name] = os.urandom(BLOCK)
    given = f"{ID}/{name}"
    said = find(given, part=part, download=False)
    assert f"refused {ID}: {name} is not in the hub cache {tmp_path / 'home/hub'}" in said
    assert f"`hf download {ID} {name}`" in said
    assert served.asked == []
    file = Path(find(given, part=part))
    assert file.read_bytes() == served.files[name]
    assert served.bodies() == [name]
    served.asked.clear()
    for again in (given, f"{ID}@main/{name}", f"{ID}@{COMMIT}/{name}", str(file)):
        assert find(again, part=part, download=False) == str(file)
    assert served.asked == []
    assert "the model has no such file" in find(f"{ID}/none.safetensors", part=part)
    served.gated = True
    served.files["other.gguf"] = b"GGUF"
    assert f"refused {ID}: gated" in find(f"{ID}/other.gguf", part=part)
    (tmp_path / "org").mkdir()  # now it is a path whose file is not there
    assert find(given, part=part) == given


def test_a_gated_model(find: Any, served: Hub) -> None:
    served.gated = True
    said = find()
    assert f"refused {ID}: gated" in said
    assert f"accept the licence at {served.address}/{ID}" in said
    assert "HF_TOKEN" in said


def test_unknown_names(find: Any, served: Hub) -> None:
    assert "has no revision 'v9'" in find(f"{ID}@v9")
    assert f"org/other: no such model at {served.address}" in find("org/other")


def test_without_a_connection(find: Any) -> None:
    said = find(HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in said
    said = find(HF_ENDPOINT="http://127.0.0.1:9")
    assert f"refused {ID}: not fetched from http://127.0.0.1:9: ConnectError" in said


def test_another_model_than_the_part_needs(find: Any) -> None:
    said = find(part="bifrost")
    assert "fetched, but not a bifrost checkpoint: flux_controlnet/config.json" in said


def test_paths_stay_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/model").mkdir(parents=True)
    for given in ("org/model", "org/typo", "a/b/c", "/none/there", "plain"):
        assert hub.find(given, "mllm") == Path(given)


def test_a_damaged_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json: not JSON"):
        hub.missing(tmp_path, "mllm")


def test_every_file_of_a_checkpoint_is_among_those_fetched(tiny: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    for part in hub.NETWORKS:
        names = [p.relative_to(tiny / part).as_posix() for p in (tiny / part).rglob("*.*")]
        names = [name for name in names if (tiny / part / name).is_file()]
        fetched = list(filter_repo_objects(names, allow_patterns=hub.patterns(part)))
        assert sorted(fetched) == sorted(names)
        assert hub.missing(tiny / part, part) == []
