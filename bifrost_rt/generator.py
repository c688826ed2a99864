"""The public face: open an engine set, run prompts, get images."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from bifrost_rt import (
    chat,
    composition,
    dims,
    engines,
    image_latents,
    image_processor,
    images,
    latents_file,
    manifest,
    masks,
    memory_plan,
    notes,
    numerics,
    pipeline,
    request,
    thinking,
    vision,
)
from bifrost_rt import messages as conversation
from bifrost_rt.backends.base import Backend
from bifrost_rt.backends.choice import start
from bifrost_rt.chat import ChatResult, OnText
from bifrost_rt.chat_params import ChatOptions, ChatParameters
from bifrost_rt.engines import Carried
from bifrost_rt.errors import BudgetError, EngineSetError, RequestError, RequestTypeError
from bifrost_rt.images import ImageLike
from bifrost_rt.opened import OpenedFiles
from bifrost_rt.params import Options, names_options
from bifrost_rt.previews import Previews
from bifrost_rt.prompt_cache import default_bytes
from bifrost_rt.result import Result
from bifrost_rt.tokenizers import Tokenizers
from bifrost_rt.turns import Turns, lock_of

DEFAULT_SET = Path("engines/sets/default")
SHIPPED_SET = Path(__file__).parent / "demo"  # `make wheel` puts it there, and nothing else

QUESTION = "Describe the scene."  # of an image about which nobody asks anything else

log = logging.getLogger("bifrost_rt")

StepCallback = Callable[["Generator", int, float | None, dict[str, Any]], Mapping[str, Any] | None]


class Generator:
    """An opened engine set. May be used by several threads: they draw one after another.

    What was opened is what draws. A set that is replaced or overwritten later does not mix with it:
    a run that would need the new files is refused, and a link to a set is followed once.

    Args:
        path: the set's folder, as written by `python -m export.build`. None opens the default
            model's set: see `default_set`.
        backend: a backend's name, or one that is already started. Default: the one that the set was
            compiled for; for ONNX graphs, the fastest exact one that is installed for the CPU.
            "openvino,ENGINE=onnxruntime" gives an engine its own, in the place of that which the
            set names for it.
        memory_budget: what engines and their tensors may take together, as bytes or as text
            ("8GiB"); the Python process itself comes on top. Engines leave and come back as it
            demands, and the images stay the same. Default: what the device has free when the
            set is opened, less a tenth. Where everything fits, everything stays open.
        prompt_cache: how much of the budget may hold what the text models gave for earlier prompts,
            as bytes or as text; 0 keeps nothing. A prompt that comes again is then not read again,
            and its images are the same bits. Default: 256 MiB, at most a sixteenth of the budget.

    Attributes:
        backend: the backend's name, and why it was taken.

    Raises:
        EngineSetError, IntegrityError: the set is missing, foreign, damaged, or changed while it
            was opened; every file is checked against its hash.
        BackendError: the backend is not available here, with the reason.
        BudgetError: an engine exceeds the budget by itself.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        backend: str | Backend | None = None,
        memory_budget: int | str | None = None,
        prompt_cache: int | str | None = None,
    ) -> None:
        given = None if memory_budget is None else memory_plan.parse(memory_budget)
        prompts = (
            None if prompt_cache is None else memory_plan.parse(prompt_cache, "prompt_cache", 0)
        )
        self.path = default_set() if path is None else Path(path)
        folder = self.path.resolve()
        self.manifest = manifest.read(folder)
        files = OpenedFiles(folder, self.manifest)
        files.verify(self.manifest)
        self.backend, started = start(self.manifest, backend)
        log.info("backend %s: %s", self.backend.name, self.backend.reason)
        text = self.manifest.text
        self._tokenizers = Tokenizers(folder, text)
        files.same(part.tokenizer for part in (text.mllm, text.clip, text.t5))
        budget = memory_plan.default_budget(started.free_memory()) if given is None else given
        if prompts is None:
            prompts = default_bytes(budget)
        lock = lock_of(started)
        with lock:
            self._engines = engines.Engines(folder, self.manifest, started, budget, files, prompts)
        self._turns = Turns(lock)
        self._speaker = chat.Speaker(self._engines, self._tokenizers, self.manifest)

    @names_options
    def run(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: ImageLike | None = None,
        mask: ImageLike | None = None,
        compose: Sequence[composition.Part] | None = None,
        height: int | None = None,
        width: int | None = None,
        order: ArrayLike | None = None,
        latents: ArrayLike | None = None,
        tokens: ArrayLike | None = None,
        think: bool | str | None = None,
        output_type: request.OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        preview_every: int | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw one prompt or several. Names and meanings follow diffusers' FluxPipeline; a value of
        None takes the set's default.

        Other threads wait for their turn. A prompt that is longer than the text models read, and an
        argument without effect, are logged and stand in `Result.warnings`.

        Args:
            prompt: a text, or a list of texts of any lengths. Images come prompt by prompt. None
                takes what the MLLM says of `image`.
            {options}
            image: to be drawn again, or varied by prompt, seed and control scale: its CLIP latents
                take the place of those that the MLLM would predict. See `encode`.
            mask: an image, white or transparent where `image` or `tokens` are drawn anew under the
                prompt: a visual token that it touches is predicted, all others are kept. It is cut
                as the image is, and first stretched to its size. See `keep_pixels`.
            compose: parts of one image, `[(part, (left, top, right, bottom)), …]`, boxes in shares
                of its sides; the later of two that overlap counts. A text is a prompt of that part
                alone; of an image (a path, a `PIL.Image`, pixels, the bytes of a file) or of CLIP
                latents, what lies in the box is kept. Parts with prompts, and what no box holds,
                are decoded together, the latter under `prompt`, which says what all of it shows.
            height, width: must be the set's own, where given.
            order: [n, N], per image a permutation of its places, instead of the seed's.
            latents: [n, S, C] packed starting noise, instead of the seed's.
            tokens: [n, N, D] CLIP latents of an earlier result: the MLLM is not run, and seed,
                steps and control scale may differ.
            think: have the MLLM answer each prompt in words first, and draw its answer; see
                `Result.thoughts`. True asks what the set states for it. A text is the instruction,
                with `{prompt}` in the place of the prompt, or before it. The answer is the
                likeliest, of no more tokens than the MLLM reads of a prompt.
            output_type: "pil" for `PIL.Image`s, "np" for uint8 [n, H, W, 3], "latent" to stop
                before the VAE.
            callback_on_step_end: called as (generator, step, timestep, tensors) after every step of
                both loops: decoding with `{"tokens": [n, N, D]}` and timestep None, then denoising
                with `{"latents": [n, S, C]}`. The arrays are copies and may be kept; a returned
                dict replaces them. An exception ends the run and leaves the generator usable. It
                must not draw with the same generator, nor wait for a thread that does. With
                `think` it is called first after every piece of an answer, with `{"thought": …,
                "prompt": …}`: the text so far, and the prompt that it is of.
            preview_every: after every so many denoising steps the callback's dict also has
                `"preview"`, uint8 [n, H, W, 3]: what the image will be, estimated from the step,
                for the price of one VAE decode.

        Raises:
            RequestError, RequestTypeError: an argument that cannot be served.
            BudgetError: so many images do not fit into the memory budget, or previews need
                engines that it does not keep.
            NumericsError: values between two engines are not finite, from an argument that is far
                too large or from arithmetic in 16 bit; no image is made of them.
            EngineSetError: the set's files changed since it was opened.
            GeneratorStateError: the generator is closed, or this is its own callback.
        """
        self._turns.require_open("run()")
        checked = self._asked(
            prompt=prompt,
            image=image,
            mask=mask,
            compose=compose,
            height=height,
            width=width,
            order=order,
            latents=latents,
            tokens=tokens,
            think=think,
            output_type=output_type,
            **options,
        )
        (out,) = self._draw(
            "run()", [checked], [callback_on_step_end], preview_every, of_caller=True
        )
        return _result(checked.thought(out.thoughts), out)

    def run_several(
        self,
        runs: Sequence[Mapping[str, Any]],
        callbacks: Sequence[StepCallback | None] | None = None,
        preview_every: int | None = None,
    ) -> list[Result]:
        """Draw several runs, whose arguments may differ. Where engines must leave for others, each
        is opened once for all of them, and not once for each; the images are those of `run`.

        Args:
            runs: the arguments of `run`, without callback and previews.
            callbacks: one for each run.
            preview_every: as in `run`.

        Raises:
            Errors as in `run`; the first ends all runs.
        """
        self._turns.require_open("run_several()")
        checked = [self._asked(**one) for one in runs]
        callbacks = [None] * len(checked) if callbacks is None else callbacks
        drawn = self._draw("run_several()", checked, callbacks, preview_every, of_caller=True)
        return [
            _result(one.thought(out.thoughts), out) for one, out in zip(checked, drawn, strict=True)
        ]

    def ask(self, **arguments: Any) -> request.Request:
        """Make a request for `draw` of arguments of `run`, without its callback and previews. An
        image is read by the MLLM now; errors are those of `run`."""
        self._turns.require_open("ask()")
        return self._asked(**arguments)

    def _asked(
        self,
        *,
        prompt: str | Sequence[str] | None = None,
        image: ImageLike | None = None,
        mask: ImageLike | None = None,
        compose: Sequence[composition.Part] | None = None,
        tokens: ArrayLike | None = None,
        think: bool | str | None = None,
        **others: Any,
    ) -> request.Request:
        """Check the arguments of a run. Its image is looked at when all else can be served."""
        if compose is not None:
            others["keep_pixels"] = self._keeps(None, None, others)
            others["think"] = thinking.instruction(self.manifest, think)
            return self._composed(prompt, compose, image, mask, tokens, others)
        if prompt is None and image is None:
            raise RequestError("run() needs a prompt or an image")
        if tokens is not None and image is not None:
            raise RequestError("image and tokens are two sources of CLIP latents; give one")
        if mask is not None and tokens is None and image is None:
            raise RequestError("mask says what to draw anew of an image or of tokens; give one")
        others["think"] = thinking.instruction(self.manifest, think)
        others["keep_pixels"] = self._keeps(image, mask, others)
        if prompt is None and others["think"] is not None:
            raise RequestError(
                "think needs a prompt to think of", hint="prompt=None draws what describe() says"
            )
        shown = None if image is None else images.read(image)
        painted = None if mask is None else images.painted(mask)
        pixels = {
            name: latents_file.digest(np.asarray(given))
            for name, given in (("image", shown), ("mask", painted))
            if given is not None
        }
        check = functools.partial(request.check, self.manifest, **others)
        side = math.isqrt(self.manifest.model.num_visual_tokens)
        size = None if shown is None else shown.size
        masked = None if painted is None else masks.touched(painted, side, size).ravel()
        if shown is None:
            checked = check(prompt="" if prompt is None else prompt, tokens=tokens, masked=masked)
            return dataclasses.replace(checked, pixels=pixels)
        # all else is checked before the image is looked at
        checked = check(prompt="" if prompt is None else prompt, masked=np.zeros(side**2, bool))
        said = self.describe(shown).text if prompt is None else prompt
        if extend := checked.parameters.extend:
            shown, painted = masks.canvas(shown, painted or Image.new("L", shown.size), extend)
            masked = masks.touched(painted, side).ravel()
        seen = np.repeat(self.encode(shown), checked.images, axis=0)
        checked = check(prompt=said, tokens=seen, masked=masked)
        known = None
        if others["keep_pixels"]:
            assert painted is not None
            with self._turns.turn("run()"):
                known = image_latents.known_region(self._engines, self.manifest, shown, painted)
        if known is not None:
            known = known.repeated(checked.images)
        return dataclasses.replace(checked, pixels=pixels, known=known)

    def _composed(
        self,
        prompt: str | Sequence[str] | None,
        parts: Sequence[composition.Part],
        image: ImageLike | None,
        mask: ImageLike | None,
        tokens: ArrayLike | None,
        others: dict[str, Any],
    ) -> request.Request:
        given = {"image": image, "mask": mask, "tokens": tokens}
        if names := [name for name, value in given.items() if value is not None]:
            raise RequestError(
                f"compose says where all tokens come from; {names[0]} is another source",
                hint="give it as a part of compose",
            )
        if prompt is None:
            raise RequestError("compose needs a prompt: what the whole image shows")
        model = self.manifest.model
        nothing = np.zeros(model.num_visual_tokens, bool)
        if others.get("extend"):
            raise RequestError("extend draws a canvas around an image; compose has none")
        request.check(self.manifest, prompt=prompt, masked=nothing, **others)
        shape = (model.num_visual_tokens, model.hidden_size)
        made = composition.read(parts, shape, self.encode)
        checked = request.check(
            self.manifest,
            prompt=prompt,
            masked=made.masked,
            regions=made.regions,
            region_prompts=made.prompts,
            **others,
        )
        repeated = np.tile(made.tokens, (checked.images, 1, 1))
        return dataclasses.replace(checked, tokens=repeated, pixels={"compose": made.digest})

    def _keeps(
        self, image: ImageLike | None, mask: ImageLike | None, given: dict[str, Any]
    ) -> bool:
        """Return the option `keep_pixels`, filled in.

        Args:
            given: the options of the run.

        Raises:
            RequestError: it was asked for, and there are none, or the set cannot read them.
        """
        in_part = image is not None and bool(mask is not None or given.get("extend"))
        asked: bool | None = given.get("keep_pixels")
        if asked is None:
            return in_part and image_latents.can_keep(self.manifest)
        if asked:
            if not in_part:
                raise RequestError(
                    "keep_pixels keeps what lies outside the mask of an image; pass image and "
                    "mask, or extend"
                )
            image_latents.require(self.manifest)
        return asked  # a value of another type is refused with the other options

    def encode(self, image: ImageLike) -> NDArray[np.float32]:
        """Read an image into the CLIP latents that the ControlNet reads, [1, N, D]: pass them to
        `run` as `tokens`. What is not square is cut at its middle.

        Args:
            image: a path, the bytes of a file, a `PIL.Image` or an array.

        Raises:
            RequestError, RequestTypeError: no image, or the set reads none.
            BudgetError: it does not fit into the memory budget.
            NumericsError: a token is not finite.
            GeneratorStateError: the generator is closed, or this is its own callback.
        """
        self._turns.require_open("encode()")
        facts = vision.facts(self.manifest)
        side = math.isqrt(self.manifest.model.num_visual_tokens)
        seen = image_processor.square_patches(images.read(image), side, facts)
        with self._turns.turn("encode()"):
            return vision.encode(self._engines, self.manifest, seen, {})[None]

    def draw(
        self,
        checked: request.Request,
        callback_on_step_end: StepCallback | None = None,
        preview_every: int | None = None,
    ) -> pipeline.Output:
        """Draw a request that `request.check` or `request.merge` made; the rest is as in `run`."""
        (out,) = self._draw("draw()", [checked], [callback_on_step_end], preview_every)
        return out

    def draw_several(
        self,
        requests: Sequence[request.Request],
        callbacks: Sequence[StepCallback | None] | None = None,
        preview_every: int | None = None,
    ) -> list[pipeline.Output]:
        """Draw requests whose settings may differ. Where engines must leave for others, each is
        opened once for all of them, and not once for each; the images stay the same.

        Args:
            callbacks: one for each request; the rest is as in `run`, and so are the errors. The
                first error ends all.
        """
        callbacks = [None] * len(requests) if callbacks is None else callbacks
        return self._draw("draw_several()", requests, callbacks, preview_every)

    def reloads(self) -> bool:
        """Say whether engines leave for others during a run, so that drawing several requests
        together is faster.

        Raises:
            GeneratorStateError: the generator is closed.
        """
        self._turns.require_open("reloads()")
        return not set(dims.drawing(self.manifest.engines)) <= set(self._engines.resident)

    def _draw(
        self,
        call: str,
        requests: Sequence[request.Request],
        callbacks: Sequence[StepCallback | None],
        preview_every: int | None,
        *,
        of_caller: bool = False,
    ) -> list[pipeline.Output]:
        """Args:
        of_caller: whether notes name a prompt by its place among those that the caller passed;
            otherwise among the different ones.
        """
        with self._turns.turn(call):
            self._check_previews(callbacks, preview_every)
            thought = [self._thoughts(*one) for one in zip(requests, callbacks, strict=True)]
            requests = [
                one.thought(found) for one, (found, _) in zip(requests, thought, strict=True)
            ]
            places = [_places(one) if of_caller else None for one in requests]
            said = [tuple(self._notes(*one)) for one in zip(requests, places, strict=True)]
            for note in itertools.chain(*said):
                log.warning("%s", note)
            drawn = self._drawn(requests, callbacks, preview_every)
        for out, (_, seconds) in zip(drawn, thought, strict=True):
            if seconds:
                out.timings["think"] = seconds
                out.timings["total"] += seconds
        drawn = [
            dataclasses.replace(out, thoughts=found)
            for out, (found, _) in zip(drawn, thought, strict=True)
        ]
        return [self._noted(*one) for one in zip(requests, drawn, said, strict=True)]

    def _thoughts(
        self, checked: request.Request, callback: StepCallback | None
    ) -> tuple[dict[str, request.Thought], float]:
        """Have the MLLM think of every prompt where it is asked to.

        Returns:
            Its thoughts by prompt, and the seconds that they took.
        """
        found: dict[str, request.Thought] = {}
        seconds = 0.0
        for prompt in checked.prompts if checked.think is not None else ():
            assert checked.think is not None
            result = self._speaker.answer(
                thinking.turns(checked.think, prompt),
                thinking.parameters(self.manifest),
                self._tells(prompt, callback),
            )
            seconds += result.timings["total"]
            text = result.text.strip()
            if not text:
                raise RequestError(
                    f"think: the MLLM answered nothing to {prompt!r}",
                    hint="draw it without think, or give another instruction",
                )
            whole = result.finish_reason == "stop"
            found[prompt] = request.Thought(prompt, checked.think, text, whole)
        return found, seconds

    def _tells(self, prompt: str, callback: StepCallback | None) -> OnText:
        """Return what passes a thought on to a callback as it comes."""
        pieces: list[str] = []

        def on_text(piece: str) -> None:
            if callback is None or not piece:
                return
            pieces.append(piece)
            tensors = {"thought": "".join(pieces), "prompt": prompt}
            self._turns.in_callback = True
            returned = callback(self, len(pieces) - 1, None, tensors)
            self._turns.in_callback = False
            if returned is not None:
                raise RequestError(
                    "callback_on_step_end returned something for a thought, which it can only read"
                )

        return on_text

    def _noted(
        self, checked: request.Request, out: pipeline.Output, said: tuple[notes.Note, ...]
    ) -> pipeline.Output:
        """Return the output with its notes, those on its images among them."""
        if out.images is not None:
            last = self.manifest.engine(pipeline.used_engines(checked)[-1])
            for note in (seen := tuple(notes.one_value(out.images, last))):
                log.warning("%s", note)
            said += seen
        return dataclasses.replace(out, notes=said)

    def _notes(
        self, checked: request.Request, places: Sequence[int] | None
    ) -> Iterator[notes.Note]:
        yield from notes.without_effect(self.manifest, checked)
        for text in checked.region_prompts:
            for found in self._tokenizers.truncations([text], mllm=True):
                if found.encoder == "mllm":
                    yield notes.Note(text=f"compose: {text[:40]!r}…: {found.text}")
        cut = self._tokenizers.truncations(checked.prompts, mllm=checked.decodes)
        for one in (*notes.cut_thoughts(checked), *cut):
            assert one.prompt is not None
            yield one if places is None else dataclasses.replace(one, prompt=places[one.prompt])

    def _drawn(
        self,
        requests: Sequence[request.Request],
        callbacks: Sequence[StepCallback | None],
        preview_every: int | None,
    ) -> list[pipeline.Output]:
        previews = [
            None if preview_every is None else self._previews(checked, preview_every)
            for checked in requests
        ]
        ends = [
            callback and self._adapter(callback, seen)
            for callback, seen in zip(callbacks, previews, strict=True)
        ]
        drawn = pipeline.generate_several(
            self._engines, self._tokenizers, self.manifest, requests, ends
        )
        for out, seen in zip(drawn, previews, strict=True):
            if seen is not None:
                out.timings["preview"] = seen.seconds
        return drawn

    def _check_previews(
        self, callbacks: Sequence[StepCallback | None], preview_every: int | None
    ) -> None:
        if preview_every is not None and None in callbacks:
            raise RequestError("preview_every without callback_on_step_end: nobody would see them")

    def _previews(self, checked: request.Request, every: int) -> Previews:
        if reason := self.no_previews():
            raise BudgetError(reason, hint="leave previews out, or give a larger memory budget")
        # too many images are refused before their noise is drawn
        self._engines.begin(pipeline.used_engines(checked), pipeline.sizes(self.manifest, checked))
        return Previews(self._engines, self.manifest, checked, every)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Callable[[str], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatResult:
        """Answer a conversation in words. What it begins with in common with the one before, the
        same images among it, is not computed again.

        Args:
            messages: as transformers and OpenAI write them: `{"role": "user", "content": "…"}`, or
                a list of `{"type": "text", "text": "…"}` and `{"type": "image", "image": …}` as
                content. An image is a path, the bytes of a file, a `PIL.Image` or an array;
                `image_url` takes a data URI. Roles are system, user and assistant.
            stream: called with every piece of the text, which never splits a character. An
                exception ends the answer and leaves the generator usable. It must not use the
                same generator.
            options: `max_new_tokens` (512), `temperature` (0: the likeliest token), `top_p`,
                `top_k`, `repetition_penalty`, `seed`.

        Raises:
            RequestError, RequestTypeError: a message or an option that cannot be served, an image
                for a set that reads none, or a conversation that is too long.
            BudgetError: it does not fit into the memory budget.
            NumericsError: an image's tokens are not finite.
            EngineSetError: the set's files changed since it was opened.
            GeneratorStateError: the generator is closed, or this is its own callback.
        """
        self._turns.require_open("chat()")
        asked = ChatParameters.fill(options)
        chat.facts(self.manifest)
        turns = conversation.read(messages)
        return self.answer(turns, asked, lambda piece: stream(piece) if stream and piece else None)

    def answer(
        self,
        turns: Sequence[conversation.Turn],
        asked: ChatParameters,
        on_text: OnText,
    ) -> ChatResult:
        """Answer turns that `messages.read` made; the rest is as in `chat`.

        Args:
            on_text: called after every token, with an empty piece where a character is not whole;
                and with empty pieces while images are looked at and a long prompt is read. What it
                raises ends the answer.
        """

        def guarded(piece: str) -> None:
            self._turns.in_callback = True
            on_text(piece)
            self._turns.in_callback = False

        with self._turns.turn("chat()"):
            return self._speaker.answer(turns, asked, guarded)

    def describe(
        self,
        image: Any,
        question: str = QUESTION,
        *,
        stream: Callable[[str], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatResult:
        """Answer a question about an image; stream, options and errors are those of `chat`.

        Args:
            image: a path, the bytes of a file, a `PIL.Image` or an array.
        """
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self.chat([{"role": "user", "content": parts}], stream=stream, **options)

    def no_previews(self) -> str | None:
        """Say why `preview_every` cannot be served, or None where it can.

        Raises:
            GeneratorStateError: the generator is closed.
        """
        self._turns.require_open("no_previews()")
        if not self.reloads():
            return None
        return "previews need every engine in memory at once, and the memory budget is smaller"

    def _adapter(self, callback: StepCallback, previews: Previews | None) -> pipeline.StepEnd:
        def on_step_end(name: str, step: int, timestep: float | None, loop: Carried) -> None:
            current = loop.copy(name)
            tensors: dict[str, Any] = {name: current}
            if (
                previews
                and name == "latents"
                and (preview := previews.after(step, current)) is not None
            ):
                tensors["preview"] = preview
            self._turns.in_callback = True
            returned = callback(self, step, timestep, tensors)
            self._turns.in_callback = False
            if returned is None:
                return
            if not isinstance(returned, Mapping):
                raise RequestTypeError(
                    "callback_on_step_end must return a dict or None, "
                    f"got {type(returned).__name__}"
                )
            if unknown := set(returned) - {name}:
                raise RequestError(
                    f"callback_on_step_end returned {sorted(map(str, unknown))}; "
                    f"this loop can replace {name!r} only"
                )
            if name in returned:
                new = _replacement(name, returned[name], current, step)
                loop.replace(name, new)
                if previews and name == "latents":
                    previews.replaced(new)

        return on_step_end

    def close(self) -> None:
        """Free the engines' memory. Waits for the run of another thread; runs that wait for their
        turn, and all later ones, are refused. Without effect on a closed generator.

        Raises:
            GeneratorStateError: a callback of this generator's run called it.
        """
        with self._turns.last("close()") as first:
            if first:
                self._engines.close()

    def __enter__(self) -> Generator:
        self._turns.require_open("with")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _places(checked: request.Request) -> list[int]:
    """Say where the different prompts stand first among those that were passed."""
    return [checked.parameters.prompts.index(text) for text in checked.prompts]


def _result(checked: request.Request, out: pipeline.Output) -> Result:
    images: Any = out.latents if out.images is None else out.images
    if checked.output_type == "pil":
        images = [Image.fromarray(image) for image in images]
    seed = checked.parameters.seed
    return Result(
        images,
        out.tokens,
        out.latents,
        out.timings,
        seed,
        checked.as_dict(),
        out.notes,
        checked.thoughts,
    )


def _replacement(name: str, returned: ArrayLike, current: NDArray[Any], step: int) -> NDArray[Any]:
    """Return what a callback returned for `current`, checked."""
    try:
        given = np.asarray(returned)
    except (TypeError, ValueError) as error:  # rows of different lengths, a tensor of a GPU
        raise RequestTypeError(
            f"callback_on_step_end returned {name} that cannot be read as an array: {error}"
        ) from None
    if given.dtype.kind not in "fiu":
        raise RequestTypeError(
            f"callback_on_step_end returned {name} of type {given.dtype}, expected {current.dtype}"
        )
    if given.shape != current.shape:
        raise RequestError(
            f"callback_on_step_end returned {name} of shape {list(given.shape)}, "
            f"expected {list(current.shape)}"
        )
    with np.errstate(over="ignore"):
        new: NDArray[Any] = given.astype(current.dtype)
    if found := numerics.problem(new, "image"):
        raise RequestError(f"callback_on_step_end, step {step}: the {name} it returned {found}")
    return new


def default_set() -> Path:
    """Return the default model's set: `engines/sets/default`, where `python -m export.build` writes
    it, in the current folder or in this package's checkout; else the one that came with the wheel.

    Raises:
        EngineSetError: it has not been built, and did not come with the wheel.
    """
    places = [Path.cwd(), Path(__file__).parents[1]]
    for path in (*(place / DEFAULT_SET for place in places), SHIPPED_SET):
        if (path / manifest.FILENAME).is_file():
            log.info("default engine set: %s", path)
            return path
    raise EngineSetError(
        f"no default engine set: looked for {DEFAULT_SET} in {places[0]} and {places[1]}, and none "
        "came with this package",
        hint="`python -m export.build` in a checkout builds it, `make wheel` there puts it into a "
        "wheel; or pass the folder of another set",
    )
