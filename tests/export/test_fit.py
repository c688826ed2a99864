"""`--fit`: precisions with which a set stays in memory, at the least measured loss."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from bifrost_rt import manifest as manifests
from bifrost_rt.errors import RequestError
from export import build, fitting, plan, shipped
from export import recipe as recipes
from export.errors import RecipeError
from export.formats import FORMATS, HALF
from export.planning import devices, estimate, fit, losses, recipe_works, work
from export.planning.devices import Device
from export.planning.fit import Fitted
from export.planning.losses import Loss, Losses
from export.planning.storage import Elements, Storage
from export.planning.work import Work
from export.quantize import groups
from export.quantize.policy import Layer

GIB = 1 << 30
WIDTH = 1024
# What a group loses in each format; those of `b` are in a loop.
LOST = {
    "a:blocks.*": {"int8": 1e-6, "int4": 4e-6},
    "a:out": {"int4": 3e-6},
    "b:blocks.*": {"int8": 2e-6, "int4": 9e-6},
    "b:heads.*": {"int8": 5e-7, "int4": 1e-6},
}
LOSSES = Losses(
    "made up",
    {g: {f: Loss(lost, None, 1.0) for f, lost in of.items()} for g, of in LOST.items()},
)


def engine(name: str, layers: Iterable[Layer], calls: int = 1) -> Work:
    elements = Elements(name, tuple(layers), other=WIDTH, kept=100)
    at = elements.bytes_at
    return Work(name, at, calls, 10**9, 0, 1000, 5000, True, elements=elements)


@pytest.fixture(scope="module")
def two() -> list[Work]:
    blocks = [Layer(f"blocks.{i}.{part}", WIDTH, WIDTH) for i in range(3) for part in "qk"]
    heads = [Layer(f"heads.{i}.one", WIDTH, WIDTH // 2) for i in range(2)]
    out = Layer("out", WIDTH, WIDTH, "it writes the answer", "out")
    never = Layer("never", WIDTH, WIDTH, "it must not")
    return [engine("a", [*blocks, out, never]), engine("b", [*blocks, *heads], calls=5)]


def sized(size: int) -> Device:
    return Device("size", "a size", size)


def exhaustive(works: list[Work], budget: int) -> float | None:
    """The least loss of every choice that fits."""
    allowed = [[None, *LOST[group]] for group in LOST]
    best = None
    for names in itertools.product(*allowed):
        chosen = {g: f for g, f in zip(LOST, names, strict=True) if f is not None}
        storage = Storage(HALF, HALF, {}, chosen)
        resident = sum(w.weights(storage) + round(w.scratch / 2) for w in works) + 1000
        lost = sum(LOST[group][name] for group, name in chosen.items())
        if resident <= budget and (best is None or lost < best):
            best = lost
    return best


def test_no_choice_that_fits_loses_less(two: list[Work]) -> None:
    everything = sum(w.weights(Storage(HALF)) for w in two) + 10**5
    shares = [round(everything * share) for share in (1.0, 0.9, 0.7, 0.6, 0.5, 0.4, 0.3)]
    found = [fit.choose(two, sized(size), LOSSES, HALF) for size in shares]
    for size, one in zip(shares, found, strict=True):
        best = exhaustive(two, size)
        assert one.stays == (best is not None)
        if best is not None:
            assert one.image == pytest.approx(best, abs=1e-12)
            assert one.needed <= size
            held = sum(w.weights(one.storage) + 2500 for w in two) + 1000
            assert held == one.needed
            # a budget that is a little larger than what is said loses less
            if one.better is not None:
                more = fit.choose(two, sized(one.better), LOSSES, HALF)
                assert more.image < one.image
    assert found[0].image == 0
    assert found[0].better is None
    assert {one.stays for one in found} == {True, False}
    kept = {layer.path: fmt for layer, fmt in two[0].elements.given(found[-1].storage).items()}
    assert kept["never"] == HALF


def test_what_cannot_stay_loads_least(two: list[Work]) -> None:
    """The larger engine comes for each image where both do not fit, and the other stays, as good as
    it can be beside it."""
    smallest = Storage(FORMATS["int4"], layers={"a:out": "int4"})
    alone = {w.engine: w.weights(smallest) + 2500 + 1000 for w in two}
    assert alone["a"] > alone["b"]
    found = fit.choose(two, sized(alone["a"] + alone["b"] - 1001), LOSSES, HALF)
    assert not found.stays
    assert found.least == alone["a"] + alone["b"] - 1000
    assert "not everything stays in memory, which takes" in fit.describe(found)[0]
    with pytest.raises(RecipeError, match="`a` takes .* by itself with the fewest bits") as caught:
        fit.choose(two, sized(alone["a"] - 1), LOSSES, HALF)
    least = caught.value.hint.rpartition("the smallest that fits is ")[2]
    assert fit.choose(two, fit.device(least), LOSSES, HALF).image > 0


def fitted(release: list[Work], name: str) -> Fitted:
    return fit.choose(release, fit.device(name), losses.read(), HALF)


def test_the_release_stays_on_24_gb(release: list[Work]) -> None:
    found = fitted(release, "rtx-4090")
    plan_ = estimate.plan(release, found.device, found.storage)
    assert found.stays
    assert plan_.fits
    assert plan_.load_bytes == 0
    assert not any(stage.evict for stage in plan_.stages)
    assert plan_.peak_bytes <= plan_.budget_bytes <= 21.6 * GIB
    assert found.needed == plan_.resident_bytes
    text = "\n".join(fit.describe(found))
    assert "everything stays in memory" in text
    assert f"losses: {losses.read().source}" in text
    json.dumps(found.record())


def test_more_memory_loses_less(release: list[Work]) -> None:
    lost = [fitted(release, name).image for name in ("21GiB", "32GiB", "70GiB")]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] == 0
    # a better choice, with the memory that was said to allow it
    found = fitted(release, "rtx-4090")
    assert found.better is not None
    assert fitted(release, str(found.better)).image < found.image


def test_the_release_does_not_stay_on_12_gb_and_says_so(release: list[Work]) -> None:
    found = fitted(release, "rtx-4070-12gb")
    plan_ = estimate.plan(release, found.device, found.storage)
    assert not found.stays
    assert plan_.fits
    assert plan_.peak_bytes <= 10.8 * GIB
    assert 0 < plan_.load_bytes < 17 * GIB
    with pytest.raises(RecipeError, match=r"`\w+` takes 5.* GiB by itself"):
        fitted(release, "5GiB")


def test_loops_multiply_what_the_device_multiplies_fastest(release: list[Work]) -> None:
    """Weights alone are quantized in a loop only where a device has no products of four bits, and
    of what stays in 16 bit otherwise, weights alone are."""
    calls = {one.engine: one.calls for one in release}
    for name in ("rtx-5090", "rtx-3060-12gb"):
        given = {g.name: FORMATS[g.fmt] for g in fitted(release, name).groups}
        device = devices.find(name)
        for group, fmt in given.items():
            assert not fmt.quantized or device.value(fmt.rate) is not None
            if calls[group.partition(":")[0]] > 1 and device.value("fp4") is not None:
                assert not fmt.quantized or fmt.runtime.rounds_activations
            if group.endswith(("modulation.*", "*.wo")):
                assert not fmt.runtime.rounds_activations


def test_every_group_was_measured_in_every_format(release: list[Work]) -> None:
    found = {
        group
        for one in release
        for layer in one.elements.layers
        if (group := groups.of(one.engine, layer)) is not None
    }
    measured = losses.read().groups
    assert measured.keys() == found
    quantized = {name for name, fmt in FORMATS.items() if fmt.quantized}
    assert all(measured[group].keys() == quantized for group in found)


FOLDERS = {"mllm": "m", "bifrost": "b", "flux": "f", "output": "o"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, "fit '8GiB' chooses .* and precision would choose too"),
        ({"stages": {"x": "bf16"}, "quality_budget": 40.0}, "quality_budget and stages would"),
    ],
)
def test_a_recipe_chooses_or_lets_choose(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load({**FOLDERS, "fit": "8GiB", **changes}, "recipe")


def test_what_is_to_be_fitted_is_a_device_or_a_size() -> None:
    assert fit.device("12GiB").memory == 12 * GIB
    assert fit.device("rtx-4090") == devices.find("rtx-4090")
    with pytest.raises(RecipeError, match="did you mean 'rtx-4090'"):
        fit.device("rtx-409")
    with pytest.raises(RequestError, match="--fit '12 gibi' is not a size"):
        fit.device("12 gibi")


def test_a_set_that_is_fitted_has_a_folder_of_its_own() -> None:
    read = recipes.read(shipped.find("default"), {"fit": "12 GiB"})
    assert Path(read.output).name == "default-12GiB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "7b"], "neither was given"),
        (["--like", "7b", "--fit", "rtx-4090", "--device", "rtx-4090"], "both was given"),
        (["--like", "7b", "--fit", "rtx-4090", "--precision", "fp8"], "--precision goes with"),
        (["--engines", "x", "--fit", "rtx-4090"], "--engines goes with --device"),
    ],
)
def test_mistakes_of_the_planner_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "losses.json").write_text('{"source": "x", "groups": {"a": {"b": {}}}}')
    with pytest.raises(RecipeError, match=r"losses.json: .* groups.a.b: missing key 'image'"):
        losses.read(tmp_path / "losses.json")


@pytest.mark.slow
def test_what_is_built_is_what_was_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo model, in a memory that it does not fit into in 16 bit."""
    output = tmp_path / "set"
    assert build.main(["--fit", "76MB", "--output", str(output)]) == 0
    assert "everything stays in memory" in capsys.readouterr().err
    recipe = recipes.read(shipped.find("default"), {"fit": "76MB", "output": str(output)})
    recipe, found = fitting.fitted(recipe)
    given = {group.name: group.fmt for group in found.groups}
    assert len(set(given.values())) > 2
    works = recipe_works.of_recipe(recipe, fitting.checkpoint_of(recipe))
    planned = {one.engine: one.weights(found.storage) for one in works}
    manifest = manifests.read(output)
    held = {one.engine: one.weights(None) for one in work.of_set(output, manifest, 28)}
    assert sum(planned.values()) == pytest.approx(sum(held.values()), rel=0.005)
    planned["clip_text"] += 77 * 77  # the causal mask, which is no weight
    assert planned == {name: pytest.approx(size, rel=0.01) for name, size in held.items()}
    report = json.loads((output / "report.json").read_text())
    assert all(layer["given"] == layer["asked"] for layer in report["layers"].values())
    # with scratch memory, which the planner counts from modules, and the set from its graphs
    of_set = plan.of_set(output, found.device)
    assert of_set.resident_bytes == pytest.approx(found.needed, rel=0.05)
