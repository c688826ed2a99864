"""A Qwen2 model as a GGUF file, as llama.cpp and OpenVINO GenAI read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import gguf
from gguf.quants import quantize

from benchmarks.peers.tensor_files import ORDINARY, tensors
from bifrost_rt.files import atomic_write
from export.model.decoder_config import DecoderConfig

CONTEXT = 4096
KINDS = {
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "vision_language_model.lm_head.weight": "output.weight",  # the trained one
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def write(path: Path, folders: Sequence[Path], c: DecoderConfig, kind: str) -> None:
    """Write the text branch of a checkpoint's MLLM folders, with matrices of one kind and a
    vocabulary that has no meaning. Its rotary positions are those of text: all axes equal."""
    number, file_type = KINDS[kind]
    with atomic_write(path) as aside:
        out = gguf.GGUFWriter(aside, "qwen2")
        out.add_name("random")
        out.add_file_type(file_type)
        out.add_context_length(CONTEXT)
        out.add_embedding_length(c.hidden_size)
        out.add_block_count(c.num_hidden_layers)
        out.add_feed_forward_length(c.intermediate_size)
        out.add_head_count(c.num_attention_heads)
        out.add_head_count_kv(c.num_key_value_heads)
        out.add_rope_freq_base(c.rope_theta)
        out.add_layer_norm_rms_eps(c.rms_norm_eps)
        _vocabulary(out, c.vocab_size)
        for name, array in tensors(folders):
            if (renamed := renamed_to(name)) is None:
                continue
            if array.ndim == 1:
                out.add_tensor(renamed, array)
            else:
                out.add_tensor(renamed, quantize(array, number), raw_dtype=number)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()


def renamed_to(name: str) -> str | None:
    """Return GGUF's name of a tensor; None where it is not the text branch's."""
    if name in NAMES:
        return NAMES[name]
    found = _LAYER.fullmatch(name)
    return None if found is None else f"blk.{found[1]}.{PARTS[found[2]]}.{found[3]}"


def _vocabulary(out: gguf.GGUFWriter, size: int) -> None:
    """Byte-level pieces first, then names without a meaning; the last one ends a text."""
    pieces = _bytes()
    pieces += [f"<|{i}|>" for i in range(len(pieces), size)]
    ordinary = [gguf.TokenType.NORMAL] * ORDINARY
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(pieces)
    out.add_token_types([*ordinary, *[gguf.TokenType.CONTROL] * (size - len(ordinary))])
    out.add_token_merges([f"{pieces[0]} {pieces[1]}"])
    for add in (out.add_bos_token_id, out.add_eos_token_id, out.add_pad_token_id):
        add(size - 1)
    out.add_add_bos_token(False)


def _bytes() -> list[str]:
    """Return the 256 characters that stand for bytes in GPT-2's vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(others))]
