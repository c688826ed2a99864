"""Conversations, and what transformers answers to them: the judge of the text engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from bifrost_rt import text_inputs
from bifrost_rt.answering import Conversation
from bifrost_rt.engines import Engines

CAPACITY = 256


@dataclass(frozen=True)
class Turns:
    """What a conversation is made of: runs of text tokens, and images of h x w patches between."""

    name: str
    parts: tuple[int | tuple[int, int], ...]


TURNS = (
    Turns("a word", (1,)),
    Turns("short text", (9,)),
    Turns("text", (40,)),
    Turns("long text", (150,)),
    Turns("an image first", ((4, 4), 12)),
    Turns("an image within", (7, (4, 6), 9)),
    Turns("a wide image", (5, (2, 12), 6)),
    Turns("a tall image at the end", (20, (10, 4), 1)),
    Turns("the smallest image", (3, (2, 2), 3)),
    Turns("two images", (4, (4, 4), 3, (6, 4), 8)),
    Turns("two images side by side", (4, (4, 4), (4, 4), 5)),
    Turns("several turns", (12, (6, 6), 10, 25, 9)),
    Turns("several turns and images", (8, (4, 6), 14, (6, 2), 20, (4, 4), 7)),
)


@dataclass(frozen=True)
class Asked:
    """One conversation as both sides take it."""

    conversation: Conversation
    inputs: dict[str, Any]


class Judge:
    """transformers' model of a checkpoint: the text branch that was trained over the base model."""

    def __init__(self, mllm: Path, bifrost: Path) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(mllm, dtype=torch.float32)
        prefix, text = "vision_language_model.", model.model.language_model
        text_names = set(text.state_dict())
        trained: dict[str, torch.Tensor] = {}
        for file in sorted(bifrost.glob("*.safetensors")):
            trained |= load_file(file)
        found = {name.removeprefix(f"{prefix}model."): t for name, t in trained.items()}
        text.load_state_dict({n: found[n] for n in text_names & found.keys()}, strict=False)
        if f"{prefix}lm_head.weight" in trained and not model.config.tie_word_embeddings:
            model.lm_head.weight.data.copy_(trained[f"{prefix}lm_head.weight"])
        self.model = model.eval()

    def asks(self, turns: Turns, seed: int) -> Asked:
        """Random words and images of a conversation."""
        rng = np.random.default_rng(seed)
        config = self.model.config
        vision, image_id = config.vision_config, config.image_token_id
        special = {image_id, config.vision_start_token_id, config.video_token_id}
        plain = sorted(set(range(config.get_text_config().vocab_size)) - special)
        ids: list[int] = []
        grids: list[list[int]] = []
        for part in turns.parts:
            if isinstance(part, int):
                ids += rng.choice(plain, part).tolist()
                continue
            grids.append([1, *part])
            merged = part[0] * part[1] // vision.spatial_merge_size**2
            ids += [config.vision_start_token_id, *[image_id] * merged]
        row = torch.tensor([ids])
        inputs: dict[str, Any] = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if not grids:
            positions = np.tile(np.arange(len(ids)), (3, 1))
            return Asked(Conversation(row[0].numpy(), positions), inputs)
        patch = int(np.prod(self.model.model.visual.patch_embed.proj.weight.shape[1:]))
        patches = sum(height * width for _, height, width in grids)
        pixels = rng.standard_normal((patches, patch)).astype(np.float32)
        inputs |= {
            "pixel_values": torch.from_numpy(pixels),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": (row == image_id).int(),
        }
        with torch.no_grad():
            images = self.model.model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"]
            ).pooler_output
            positions, _ = self.model.model.get_rope_index(
                row, inputs["mm_token_type_ids"], inputs["image_grid_thw"]
            )
        return Asked(
            Conversation(
                row[0].numpy(),
                positions[:, 0].numpy(),
                torch.cat(tuple(images)).numpy(),
                np.flatnonzero(row[0].numpy() == image_id),
            ),
            inputs,
        )

    def answer(self, asked: Asked, tokens: int, **options: Any) -> list[int]:
        """The ids that greedy generation chooses."""
        with torch.no_grad():
            found = self.model.generate(
                **asked.inputs,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        return list(found[0, asked.inputs["input_ids"].shape[1] :].tolist())

    def logits(self, asked: Asked, answer: Sequence[int]) -> NDArray[np.float32]:
        """Of every token of an answer, [A, V], when it is what was said."""
        row = torch.tensor([answer[:-1]])
        ids = torch.cat((asked.inputs["input_ids"], row), dim=1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in asked.inputs:
            kinds = torch.cat((asked.inputs["mm_token_type_ids"], torch.zeros_like(row)), dim=1)
            more["mm_token_type_ids"] = kinds.int()
        with torch.no_grad():
            self.model.model.rope_deltas = None
            found = self.model(**{**asked.inputs, **more}).logits
        return np.asarray(found[0, -len(answer) :].numpy())


def forced_logits(
    engines: Engines, conversation: Conversation, answer: Sequence[int], pieces: int = 1
) -> NDArray[np.float32]:
    """Of every token of an answer, [A, V], when it is what was said: the prompt in `pieces`, then
    row by row, in one cache that is written in place."""
    spec = engines.spec(text_inputs.NAME)
    cache = text_inputs.empty_cache(spec, CAPACITY)
    width = spec.input("image_tokens").shape[1]  # type: ignore[union-attr]
    length = len(conversation.ids)
    end = int(conversation.positions.max()) + 1
    ids = np.concatenate([conversation.ids, np.array(answer[:-1], np.int64)])
    said = np.tile(np.arange(end, end + len(answer) - 1), (3, 1))
    positions = np.concatenate([conversation.positions, said], axis=1)
    images = dict(
        zip(conversation.image_places.tolist(), conversation.image_tokens, strict=True)
        if conversation.image_tokens is not None
        else ()
    )
    cuts = [*np.linspace(0, length, min(pieces, length) + 1).astype(int)]
    cuts += range(length + 1, len(ids) + 1)
    found = []
    for first, last in pairwise(cuts):
        here = {place - first: images[place] for place in images if first <= place < last}
        inputs = {
            **text_inputs.prompts(spec, [ids[first:last]], last - first),
            **text_inputs.state(spec, ids, first, 1),
            **text_inputs.rows(
                ids[first:last], positions[:, first:last], here, last - first, int(width)
            ),
            **cache,
        }
        into = text_inputs.written(spec, cache)
        logits = engines.run(text_inputs.NAME, inputs, {}, into=into)["logits"]
        if last >= length:
            found.append(np.array(logits[0]))
    return np.stack(found)
