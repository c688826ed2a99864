"""Recipes by name: where their files and their checkpoints are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from export import build, recipe, shipped
from export.errors import MissingPackageError, RecipeError
from export.extras import needed


@pytest.fixture
def no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in an installed wheel, in an empty folder."""
    monkeypatch.setattr(shipped, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", shipped.names())
def test_every_recipe_that_ships_is_found_by_its_name(name: str) -> None:
    assert recipe.read(shipped.find(name), {}).output.endswith(f"sets/{name}")


def test_the_default_recipe_builds_the_checkouts_checkpoint_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read = recipe.read(build.DEFAULT_RECIPE, {})
    shipped.check_checkpoint(build.DEFAULT_RECIPE, read.folders)
    assert Path(read.output) == shipped.CHECKOUT / "engines" / "sets" / "default"


def test_in_the_checkout_its_paths_name_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped.CHECKOUT)
    assert recipe.read(build.DEFAULT_RECIPE, {}).mllm == "engines/checkpoints/scenes/mllm"


def test_without_a_checkout_paths_are_in_the_current_folder(no_checkout: Path) -> None:
    path = shipped.find("rtx-4090-fp8")
    read = recipe.read(path, {})
    assert read.flux == "engines/checkpoints/FLUX.1-dev"
    with pytest.raises(RecipeError, match="recipe rtx-4090-fp8: no checkpoint in engines") as told:
        shipped.check_checkpoint(path, read.folders)
    assert "--mllm DIR --bifrost DIR --flux DIR --output DIR" in str(told.value.hint)
    for folder in (read.mllm, read.bifrost, read.flux):
        Path(folder).mkdir(parents=True)
    shipped.check_checkpoint(path, read.folders)


def test_only_what_is_missing_is_asked_for(no_checkout: Path) -> None:
    path = shipped.find("rtx-4090-fp8")
    here = str(no_checkout)
    read = dataclasses.replace(recipe.read(path, {}), mllm=here, flux=here)
    with pytest.raises(RecipeError, match="no checkpoint in engines/checkpoints/Bifrost-1") as told:
        shipped.check_checkpoint(path, read.folders)
    assert str(told.value.hint).endswith("name yours: --bifrost DIR --output DIR")


@pytest.mark.parametrize("name", shipped.CHECKOUTS)
def test_a_checkpoint_of_the_checkout_is_not_in_the_wheel(no_checkout: Path, name: str) -> None:
    path = shipped.find(name)
    with pytest.raises(RecipeError, match="in a checkout of the source, not in the wheel"):
        shipped.check_checkpoint(path, recipe.read(path, {}).folders)


def test_a_file_counts_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # a folder is no recipe
    assert shipped.find("demo") == shipped.FOLDER / "demo.toml"
    Path("bench").write_text("")
    assert shipped.find("bench") == Path("bench")


def test_an_unknown_recipe_names_those_that_ship() -> None:
    with pytest.raises(RecipeError, match="no such recipe .did you mean 'rtx-4090-fp8'") as told:
        shipped.find("engines/rtx-4090-fp8.toml")
    assert all(name in str(told.value.hint) for name in shipped.names())


def test_a_missing_module_of_our_own_is_not_blamed_on_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"export\.nothing"), needed("export"):
        __import__("export.nothing")


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(MissingPackageError, match="`absent` is not inst") as told, needed("export"):
        __import__("absent.part")
    assert told.value.hint == "pip install 'bifrost-rt[export]'"
