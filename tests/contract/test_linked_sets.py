"""Sets whose files are links: as a hub's cache keeps them, and with weights on another disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import load_from_string

from bifrost_rt import Generator, IntegrityError, manifest
from bifrost_rt.backends import linked
from bifrost_rt.backends.onnxruntime_cuda import OnnxRuntimeCuda
from bifrost_rt.cli import main
from bifrost_rt.errors import BackendError
from tests.linked_layouts import LAYOUTS, Layout, over_two_disks

REQUEST = {"prompt": "a cow", "seed": 1, "num_inference_steps": 2, "output_type": "np"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_linked_set_draws_what_the_set_draws(
    alpha_set: Path,
    generators: Callable[[str], Generator],
    layout: Layout,
    backend: str,
    tmp_path: Path,
) -> None:
    expected = generators(backend).run(**REQUEST)
    with Generator(layout(alpha_set, tmp_path), backend=backend) as generator:
        assert np.array_equal(generator.run(**REQUEST).images, expected.images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linked_set_opens_with_onnxruntime_for_gpus(
    alpha_set: Path, generator: Generator, layout: Layout, tmp_path: Path
) -> None:
    backend = OnnxRuntimeCuda(provider="CPUExecutionProvider", device="cpu")
    with Generator(layout(alpha_set, tmp_path), backend=backend) as opened:
        found = opened.run(**REQUEST).images.astype(int)
    assert abs(found - generator.run(**REQUEST).images).max() <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linked_set_is_inspected_and_verified(
    alpha_set: Path, layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = layout(alpha_set, tmp_path)
    assert main(["inspect", str(folder)]) == 0
    assert "runs on" in capsys.readouterr().out
    assert main(["verify", str(folder)]) == 0
    assert "10 engines load, self-test image within" in capsys.readouterr().out


def test_what_a_link_leads_to_is_checked_against_its_hash(alpha_set: Path, tmp_path: Path) -> None:
    folder = over_two_disks(alpha_set, tmp_path)
    content = bytearray((folder / "denoise.data").read_bytes())
    content[100] ^= 1
    (folder / "denoise.data").resolve().write_bytes(content)
    with pytest.raises(IntegrityError, match=r"denoise\.data: damaged"):
        Generator(folder)
    (folder / "denoise.data").resolve().unlink()
    with pytest.raises(IntegrityError, match=r"denoise\.data: is a link to .*, where there is no"):
        Generator(folder)


def test_a_graph_that_names_a_file_of_the_machine_is_refused(
    alpha_set: Path, tmp_path: Path
) -> None:
    """With the right hash: a foreign set is sealed by whoever made it."""
    folder = over_two_disks(alpha_set, tmp_path)
    spec = manifest.read(folder).engine("denoise")
    path = folder / "denoise.onnx"
    original = path.read_bytes()
    for changes, message in (
        ({"location": "/etc/passwd"}, "reads '/etc/passwd', which is no file of this engine"),
        ({"location": "../disk/vae_decode.data"}, "which is no file of this engine"),
        ({"location": "t5_text.data"}, "which is no file of this engine"),
    ):
        path.write_bytes(linked.with_entries(original, lambda e, c=changes: {**e, **c}))
        for read in (linked.in_memory, lambda *given: linked.for_onnxruntime(*given, Options())):
            with pytest.raises(BackendError, match=message):
                read(folder, spec)
    for change in ({"offset": "99999999"}, {"length": "99999999"}, {"offset": "-8"}):
        path.write_bytes(linked.with_entries(original, lambda e, c=change: {**e, **c}))
        with pytest.raises(BackendError, match=r"denoise\.data, which has \d+"):
            linked.in_memory(folder, spec)


class Options:
    """Of a session that is not made."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        """Take no note."""


def test_a_graph_stays_what_it_is_but_for_the_names(alpha_set: Path) -> None:
    for path in sorted(alpha_set.glob("*.onnx")):
        original = path.read_bytes()
        assert load_from_string(linked.with_entries(original, dict)) == load_from_string(original)
        changed = load_from_string(linked.with_entries(original, lambda e: {**e, "location": "x"}))
        tensors = [t for t in changed.graph.initializer if t.external_data]
        assert tensors
        for tensor in tensors:
            found = {entry.key: entry.value for entry in tensor.external_data}
            assert found.pop("location") == "x"
            assert found.keys() == {"offset", "length"}


def test_a_set_without_links_is_opened_by_its_path(alpha_set: Path, tmp_path: Path) -> None:
    """A link to the folder, or to one above it, changes nothing."""
    (tmp_path / "link").symlink_to(alpha_set.parent)
    spec = manifest.read(alpha_set).engine("denoise")
    for folder in (alpha_set, tmp_path / "link" / alpha_set.name):
        assert linked.in_memory(folder, spec) is None
        assert linked.for_onnxruntime(folder, spec, Options()) == str(folder / "denoise.onnx")
