"""The three tokenizers of a checkpoint -> files of the set and the facts that the runtime needs.

Truncation, padding and the chat template are not in a tokenizer.json; they become numbers in the
manifest, so that the runtime needs neither jinja nor transformers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bifrost_rt.manifest import EncoderText, MllmText, Text
from export import foreign, identity
from export.checkpoint import Checkpoint
from export.configs import Config, Optional, Whole, read_text
from export.errors import CheckpointError
from export.identity import Part

POSTFIX = "<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
_PLACEHOLDER = "\ue000"  # private use: no template and no vocabulary has it


def write(checkpoint: Checkpoint, folder: Path, mllm_max_length: int, t5_max_length: int) -> Text:
    """Write `tokenizers/{mllm,clip,t5}.json` into `folder`.

    Raises:
        CheckpointError: a tokenizer is missing or unusable, or the template is not Qwen's.
    """
    (folder / "tokenizers").mkdir()
    clip, t5 = checkpoint.flux.pipeline / "tokenizer", checkpoint.flux.pipeline / "tokenizer_2"
    for source, part in (
        (checkpoint.mllm, identity.MLLM_TOKENIZER),
        (clip, identity.CLIP_TOKENIZER),
        (t5, identity.T5_TOKENIZER),
    ):
        _config(source, part)
    # FLUX's reference builds CLIP's tokenizer from vocabulary and merges, T5's from tokenizer.json
    names = {
        "mllm": _write(checkpoint.mllm, folder / "tokenizers/mllm.json", convert=False),
        "clip": _write(clip, folder / "tokenizers/clip.json", convert=True),
        "t5": _write(t5, folder / "tokenizers/t5.json", convert=False),
    }
    for name, source, network, vocabulary in (
        ("mllm", checkpoint.mllm, "the MLLM", checkpoint.decoder.vocab_size),
        ("clip", clip, "CLIP", checkpoint.clip.config.vocab_size),
        ("t5", t5, "T5", checkpoint.t5.config.vocab_size),
    ):
        _refuse_larger(names[name], source, network, vocabulary)
    _check_clip_end(checkpoint, names["clip"])
    return Text(
        mllm=_mllm(checkpoint.mllm, names["mllm"], mllm_max_length),
        clip=EncoderText(
            "tokenizers/clip.json", clip_length(checkpoint), _pad_id(clip, names["clip"])
        ),
        t5=EncoderText("tokenizers/t5.json", t5_max_length, _pad_id(t5, names["t5"])),
    )


def _check_clip_end(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """CLIP's image of a prompt is the output at its end token: the first one of `eos_token_id`,
    or where that is 2, as the published config says, the highest id."""
    end = checkpoint.clip.config.eos_token_id
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode("a").ids
    if ids[-1] != (max(ids) if end == 2 else end):
        raise CheckpointError(
            f"{checkpoint.flux.pipeline / 'text_encoder' / 'config.json'}: eos_token_id is {end}, "
            f"but the tokenizer ends prompts with {ids[-1]}",
            hint="tokenizer and text_encoder must be of one model",
        )


def clip_length(checkpoint: Checkpoint) -> int:
    """Tokens that CLIP is padded to."""
    config = _config(checkpoint.flux.pipeline / "tokenizer", identity.CLIP_TOKENIZER)
    # transformers writes 1e30 for "no limit"
    stated = config.get("model_max_length", Optional(Whole(2, 10**31)), None)
    positions = int(checkpoint.clip.config.max_position_embeddings)
    return min(77 if stated is None else int(stated), positions)


def _config(folder: Path, part: Part) -> Config:
    """Return a tokenizer's config, after checking whose tokenizer it is; an empty one where there
    is none."""
    path = folder / "tokenizer_config.json"
    if not os.path.lexists(path):
        return Config(path, {})
    return identity.check(Config.read(path), part)


def _write(source: Path, target: Path, *, convert: bool) -> Tokenizer:
    published = source / "tokenizer.json"
    vocabulary = all(os.path.lexists(source / name) for name in ("vocab.json", "merges.txt"))
    with tempfile.TemporaryDirectory() as temporary:
        copies = Path(temporary)
        if os.path.lexists(published) and not (convert and vocabulary):
            _refuse_foreign(published)
            document = read_text(published)
        else:
            document = None
            _copy_plain(source, copies)
        try:
            if document is None:
                converted = AutoTokenizer.from_pretrained(copies, local_files_only=True)
                document = converted.backend_tokenizer.to_str()
            target.write_text(document, encoding="utf-8")
            return Tokenizer.from_str(document)
        except Exception as error:  # tokenizers raises bare Exception
            reason = str(error).replace(str(copies), str(source))
            raise CheckpointError(
                f"{source}: no usable tokenizer: {reason}",
                hint="the folder needs tokenizer.json, or vocab.json with merges.txt, or "
                "spiece.model",
            ) from error


def _copy_plain(source: Path, target: Path) -> None:
    """Copy a tokenizer's files as transformers reads them: without byte order marks."""
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if path.suffix in (".json", ".txt") and not path.name.endswith(".index.json"):
            _refuse_foreign(path)
            (target / path.name).write_text(read_text(path), encoding="utf-8")
        elif path.suffix == ".model":
            _refuse_foreign(path)
            shutil.copyfile(path, target / path.name)


def _refuse_foreign(path: Path) -> None:
    if found := foreign.file(path):
        raise CheckpointError(f"{path}: {found.what}", hint=found.hint)


def _refuse_larger(tokenizer: Tokenizer, source: Path, network: str, vocabulary: int) -> None:
    """Refuse a tokenizer that gives ids which its network has no embedding for. Tokens that were
    added behind the vocabulary are no text of a prompt."""
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if largest >= vocabulary:
        raise CheckpointError(
            f"{source}: the tokenizer's largest id is {largest}, {network} has {vocabulary} "
            "embeddings",
            hint="tokenizer and network are of different models",
        )


def _mllm(source: Path, tokenizer: Tokenizer, max_length: int) -> MllmText:
    shell = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    place, template = chat_template(source)
    try:
        rendered = shell.apply_chat_template(
            [{"role": "user", "content": f"Generate an image of {_PLACEHOLDER}"}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # a template is a program, and raises what it runs into
        raise CheckpointError(
            f"{place}: the chat template cannot be rendered: {error}",
            hint="copy it from the model that the training started from",
        ) from error
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


def chat_template(source: Path) -> tuple[Path, str]:
    """Return the file that holds it, and the template; from wherever the many versions of
    transformers have put it."""
    path = source / "chat_template.jinja"
    if os.path.lexists(path):
        return path, read_text(path)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = source / name
        if not os.path.lexists(path):
            continue
        config = Config.read(path)
        found: Any = config.values.get("chat_template")
        if isinstance(found, list):  # several by name
            named = (t for t in found if isinstance(t, dict) and t.get("name") == "default")
            found = next((t.get("template") for t in named), None)
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return path, found
        if config.values.get("chat_template") is not None:
            raise config.error("chat_template", "expected a string, or a list with one 'default'")
    raise CheckpointError(
        f"{source}: no chat template",
        hint="expected chat_template.jinja, chat_template.json or the key in tokenizer_config.json",
    )


def _pad_id(source: Path, tokenizer: Tokenizer) -> int:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = source / name
        if not os.path.lexists(path):
            continue
        config = Config.read(path)
        token = config.values.get("pad_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            continue
        if not isinstance(content, str):
            raise config.error("pad_token", "expected a token")
        if (found := tokenizer.token_to_id(content)) is not None:
            return int(found)
    raise CheckpointError(f"{source}: no pad_token in tokenizer_config.json")
