"""Bifrost's own networks in torch: what transformers and diffusers do not have."""
