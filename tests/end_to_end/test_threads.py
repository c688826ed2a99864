"""One generator in several threads, in its own callback, and after its end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bifrost_rt import Generator, GeneratorStateError, backends
from bifrost_rt.backends.onnxruntime import OnnxRuntime

SETTINGS: dict[str, Any] = {"output_type": "np", "num_inference_steps": 6, "decoding_steps": 4}
CPU = sorted(
    name for name, backend in backends.BACKENDS.items() if backend.exact and not backend.gpu
)


def draw(generator: Generator, seed: int, **changes: Any) -> NDArray[np.uint8]:
    images: NDArray[np.uint8] = generator.run(
        "a red circle", seed=seed, **{**SETTINGS, **changes}
    ).images
    return images


@pytest.mark.parametrize("backend", CPU)
def test_every_image_of_four_threads_is_its_seeds(generators: Any, backend: str) -> None:
    generator = generators(backend)
    expected = [draw(generator, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: draw(generator, i % 4), range(12)))
    for i, image in enumerate(found):
        assert np.array_equal(image, expected[i % 4])


def test_requests_of_other_sizes_in_other_threads(generator: Generator) -> None:
    """Prompts, guidance and steps of one run must not reach another."""
    asked: list[dict[str, Any]] = [
        {"prompt": "a cow", "seed": 1},
        {"prompt": ["a cow", "a long sentence about two dogs"], "seed": 2, "cfg_weight": 2.0},
        {"prompt": "", "seed": 3, "num_images_per_prompt": 3, "num_inference_steps": 3},
        {"prompt": "a blue van", "seed": 4, "cache_interval": 2, "decoding_steps": 9},
    ]
    expected = [generator.run(**{**SETTINGS, **one}) for one in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: generator.run(**{**SETTINGS, **one}), asked * 2))
    for one, other in zip(found, expected * 2, strict=True):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("previews", [None, 1])
@pytest.mark.parametrize("call", ["run()", "draw()", "close()"])
def test_a_callback_that_uses_its_own_generator_is_told_so(
    alpha_set: Path, generator: Generator, call: str, previews: int | None
) -> None:
    expected = draw(generator, 1)
    with Generator(alpha_set) as opened:
        checked = _checked(opened)
        calls = {
            "run()": lambda: draw(opened, 5),
            "draw()": lambda: opened.draw(checked),
            "close()": opened.close,
        }

        def again(g: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
            if previews is None or "preview" in tensors:
                calls[call]()

        with pytest.raises(GeneratorStateError, match="callback_on_step_end") as raised:
            draw(opened, 1, callback_on_step_end=again, preview_every=previews)
        assert raised.value.message.startswith(call)
        assert "second Generator" in str(raised.value.hint)
        assert np.array_equal(draw(opened, 1), expected)  # nothing of it is left


def test_a_callback_that_swallows_the_refusal_spoils_nothing(generator: Generator) -> None:
    def again(*_: Any) -> None:
        with pytest.raises(GeneratorStateError):
            draw(generator, 5)

    assert np.array_equal(draw(generator, 1, callback_on_step_end=again), draw(generator, 1))


def test_a_callback_may_draw_with_another_generator(alpha_set: Path, generator: Generator) -> None:
    with Generator(alpha_set) as other:
        inner: list[NDArray[np.uint8]] = []

        def draw_other(g: Any, step: int, timestep: float | None, tensors: Any) -> None:
            if step == 1:
                inner.append(draw(other, 5))

        outer = draw(generator, 1, callback_on_step_end=draw_other)
    assert np.array_equal(outer, draw(generator, 1))
    assert all(np.array_equal(image, draw(generator, 5)) for image in inner)
    assert len(inner) == 2


def test_a_closed_generator_says_so(alpha_set: Path) -> None:
    with Generator(alpha_set) as closed:
        checked = _checked(closed)
    closed.close()  # once more does nothing
    for call in (lambda: draw(closed, 1), lambda: closed.draw(checked), closed.no_previews):
        with pytest.raises(GeneratorStateError, match="this Generator is closed"):
            call()
    with pytest.raises(GeneratorStateError, match="closed"), closed:
        pass


def test_closing_waits_for_the_image_of_another_thread(
    alpha_set: Path, generator: Generator
) -> None:
    opened, inside, go = Generator(alpha_set), threading.Event(), threading.Event()
    drawn: list[NDArray[np.uint8]] = []

    def hold(g: Any, step: int, timestep: float | None, tensors: Any) -> None:
        inside.set()
        go.wait()

    drawing = threading.Thread(
        target=lambda: drawn.append(draw(opened, 1, callback_on_step_end=hold))
    )
    closing = threading.Thread(target=opened.close)
    drawing.start()
    inside.wait()
    closing.start()
    closing.join(timeout=0.2)
    assert closing.is_alive()
    go.set()
    drawing.join()
    closing.join()
    assert np.array_equal(drawn[0], draw(generator, 1))
    with pytest.raises(GeneratorStateError, match="closed"):
        draw(opened, 1)


def test_a_thread_that_waits_while_the_generator_is_closed_is_told(alpha_set: Path) -> None:
    opened, inside, go = Generator(alpha_set), threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        go.wait()

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(draw, opened, 1, callback_on_step_end=hold)
        inside.wait()
        closing = pool.submit(opened.close)
        second = pool.submit(draw, opened, 1)
        go.set()
        closing.result()
    # whoever comes first: a right image, or the refusal
    if (refusal := second.exception()) is None:
        assert np.array_equal(second.result(), first.result())
    else:
        assert isinstance(refusal, GeneratorStateError)
        assert "closed" in refusal.message


def test_an_error_in_a_run_gives_the_turn_away(generator: Generator) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(generator, 1, callback_on_step_end=stop)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(draw, generator, 1).result(timeout=60)
    assert np.array_equal(found, draw(generator, 1))


class OneQueue(OnnxRuntime):
    """A backend that, like a GPU's stream, cannot be used by two threads."""

    opens_in_threads = False

    def __init__(self) -> None:
        super().__init__()
        self.users: set[int] = set()
        self.most = 0

    def open(self, *arguments: Any) -> Any:
        engine = super().open(*arguments)
        bind = engine.bind

        def watched(*buffers: Any) -> Any:
            call = bind(*buffers)

            def counted() -> None:
                self.users.add(threading.get_ident())
                self.most = max(self.most, len(self.users))
                call()
                self.users.discard(threading.get_ident())

            return counted

        engine.bind = watched  # type: ignore[method-assign]
        return engine


def test_generators_that_share_a_gpus_driver_take_turns(
    alpha_set: Path, generator: Generator
) -> None:
    backend = OneQueue()
    with (
        Generator(alpha_set, backend=backend) as one,
        Generator(alpha_set, backend=backend) as two,
        ThreadPoolExecutor(4) as pool,
    ):
        found = list(pool.map(lambda i: draw((one, two)[i % 2], i), range(6)))
    assert backend.most == 1
    for i, image in enumerate(found):
        assert np.array_equal(image, draw(generator, i))


def _checked(generator: Generator) -> Any:
    from bifrost_rt import request

    asked = {"prompt": "a cow", "seed": 1, "output_type": "np"}
    return request.check(generator.manifest, **asked)
