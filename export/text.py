"""The three tokenizers of a checkpoint -> files of the set and the facts that the runtime needs.

Truncation, padding and the chat template are not in a tokenizer.json; they become numbers in the
manifest, so that the runtime needs neither jinja nor transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bifrost_rt.manifest import EncoderText, MllmText, Text
from export.checkpoint import Checkpoint, read_json
from export.errors import CheckpointError

POSTFIX = "<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
_PLACEHOLDER = "\ue000"  # private use: no template and no vocabulary has it


def write(checkpoint: Checkpoint, folder: Path, mllm_max_length: int, t5_max_length: int) -> Text:
    """Write `tokenizers/{mllm,clip,t5}.json` into `folder`.

    Raises:
        CheckpointError: a tokenizer is missing or unusable, or the template is not Qwen's.
    """
    (folder / "tokenizers").mkdir()
    clip, t5 = checkpoint.flux / "tokenizer", checkpoint.flux / "tokenizer_2"
    # FLUX's reference builds CLIP's tokenizer from vocabulary and merges, T5's from tokenizer.json
    names = {
        "mllm": _write(checkpoint.mllm, folder / "tokenizers/mllm.json", convert=False),
        "clip": _write(clip, folder / "tokenizers/clip.json", convert=True),
        "t5": _write(t5, folder / "tokenizers/t5.json", convert=False),
    }
    return Text(
        mllm=_mllm(checkpoint.mllm, names["mllm"], mllm_max_length),
        clip=EncoderText(
            "tokenizers/clip.json", clip_length(checkpoint), _pad_id(clip, names["clip"])
        ),
        t5=EncoderText("tokenizers/t5.json", t5_max_length, _pad_id(t5, names["t5"])),
    )


def clip_length(checkpoint: Checkpoint) -> int:
    """Tokens that CLIP is padded to."""
    config = read_json(checkpoint.flux / "tokenizer" / "tokenizer_config.json")
    return min(
        int(config.get("model_max_length", 77)),
        int(checkpoint.clip.config.max_position_embeddings),
    )


def _write(source: Path, target: Path, *, convert: bool) -> Tokenizer:
    published = source / "tokenizer.json"
    vocabulary = (source / "vocab.json").exists() and (source / "merges.txt").exists()
    try:
        if published.exists() and not (convert and vocabulary):
            shutil.copyfile(published, target)
        else:
            converted = AutoTokenizer.from_pretrained(source, local_files_only=True)
            target.write_text(converted.backend_tokenizer.to_str(), encoding="utf-8")
        return Tokenizer.from_file(str(target))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{source}: no usable tokenizer: {error}",
            hint="the folder needs tokenizer.json, or vocab.json with merges.txt, or spiece.model",
        ) from error


def _mllm(source: Path, tokenizer: Tokenizer, max_length: int) -> MllmText:
    shell = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    rendered = shell.apply_chat_template(
        [{"role": "user", "content": f"Generate an image of {_PLACEHOLDER}"}],
        chat_template=_chat_template(source),
        tokenize=False,
        add_generation_prompt=True,
    )
    head, _, tail = f"{rendered}<|vision_start|>".partition(_PLACEHOLDER)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    start = max((head.rfind(t) + len(t) for t in added if t in head), default=0)
    if tail != POSTFIX or not start or not {"<|im_end|>", "<|vision_start|>"} <= added:
        raise CheckpointError(
            f"{source}: the chat template gives {rendered!r}",
            hint=f"expected Qwen2.5-VL's, whose user turn ends with {POSTFIX!r}",
        )
    prefix = _encode(tokenizer, head[:start])
    postfix = _encode(tokenizer, tail)
    lead = head[start:]
    shortest = len(prefix) + len(_encode(tokenizer, lead)) + len(postfix)
    if max_length < shortest:
        raise CheckpointError(
            f"mllm_max_length {max_length} does not hold the chat template itself "
            f"({shortest} tokens)",
            hint="the release uses 300",
        )
    return MllmText("tokenizers/mllm.json", prefix, lead, postfix, max_length)


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def _chat_template(source: Path) -> str:
    """From wherever the many versions of transformers have put it."""
    if (path := source / "chat_template.jinja").exists():
        return path.read_text(encoding="utf-8")
    found: Any = None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if found is None and (source / name).exists():
            found = read_json(source / name).get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((t["template"] for t in found if t.get("name") == "default"), None)
    if not isinstance(found, str):
        raise CheckpointError(
            f"{source}: no chat template",
            hint="expected chat_template.jinja, chat_template.json or the key in "
            "tokenizer_config.json",
        )
    return found


def _pad_id(source: Path, tokenizer: Tokenizer) -> int:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = source / name
        token = json.loads(path.read_text("utf-8")).get("pad_token") if path.exists() else None
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None and (found := tokenizer.token_to_id(content)) is not None:
            return int(found)
    raise CheckpointError(f"{source}: no pad_token in tokenizer_config.json")
