"""Trains the bundled Bifrost-1 from nothing: `python -m training.run --out DIR`.

Order: VAE and its decoder → captioner (vision tower and text branch) → FLUX with its text
encoders → visual branch and latent ControlNet on the frozen rest → publish in the official
three-folder layout.
"""
