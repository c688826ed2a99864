"""Keep the CLIP latents of an image, and draw them again with another control scale."""

import bifrost_rt
from bifrost_rt import latents_file

with bifrost_rt.Generator() as generator:
    first = generator.run("a green circle", seed=5)
    first.save_tokens("out/tokens.safetensors")

    again = latents_file.load(
        "out/tokens.safetensors"
    ).request()  # arguments of `run`, the seed too
    for scale in (0.3, 0.7, 1.0):
        result = generator.run(**{**again, "controlnet_conditioning_scale": scale})
        print(*result.save(f"out/keep-tokens-{scale}.png"))
