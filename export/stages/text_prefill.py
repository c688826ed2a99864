"""`text_prefill`: the MLLM's text -> the K/V cache that every decoding step reads."""

from __future__ import annotations

from torch import Tensor, nn

from bifrost_rt.dims import BRANCHES, IMAGES, TEXT_TOKENS, TEXTS
from bifrost_rt.manifest import TensorSpec
from export import sources
from export.model.decoder_config import DecoderConfig
from export.model.text_branch import TextBranch
from export.model.visual_branch import VisualBranch
from export.stages import Stage


class TextPrefill(nn.Module):
    """Each distinct text is computed once; images that share it share the computation. Of the
    visual branch it holds the mask token."""

    def __init__(self, branch: TextBranch, visual: VisualBranch) -> None:
        super().__init__()
        self.branch = branch
        self.mask_token = visual.mask_token
        if source := sources.lazy(visual).get("mask_token"):
            sources.attach(self, "mask_token", source)
        self.num_tokens = visual.learnable_pos_emb.shape[1]

    def forward(self, input_ids: Tensor, text_index: Tensor) -> tuple[Tensor, ...]:
        """input_ids [U, S]; text_index [G, B]: which text each image of each branch reads."""
        keys, values = self.branch(input_ids)
        rows = text_index.flatten()
        cache = [
            cached.index_select(0, rows).unflatten(0, text_index.shape)
            for layer in zip(keys, values, strict=True)
            for cached in layer
        ]
        tokens = self.mask_token.expand(text_index.shape[1], self.num_tokens, -1)
        return (tokens, *cache)


def cache_specs(c: DecoderConfig) -> tuple[TensorSpec, ...]:
    """The K/V cache: two tensors per layer, as this stage writes and `visual_decode` reads them."""
    shape = (BRANCHES, IMAGES, c.num_key_value_heads, TEXT_TOKENS, c.head_dim)
    return tuple(
        TensorSpec(f"text_{kind}.{layer}", "float32", shape)
        for layer in range(c.num_hidden_layers)
        for kind in ("keys", "values")
    )


def stage(branch: TextBranch, visual: VisualBranch, c: DecoderConfig) -> Stage:
    """ids [U, S] -> masked tokens [B, N, D] and the cache [G, B, kv_heads, S, head_dim]"""
    module = TextPrefill(branch, visual)
    return Stage(
        name="text_prefill",
        module=module,
        inputs=(
            TensorSpec("input_ids", "int64", (TEXTS, TEXT_TOKENS)),
            TensorSpec("text_index", "int64", (BRANCHES, IMAGES)),
        ),
        outputs=(
            TensorSpec("tokens", "float32", (IMAGES, module.num_tokens, c.hidden_size)),
            *cache_specs(c),
        ),
        tolerance=1e-4,
    )
