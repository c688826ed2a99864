"""Watch both loops, save a preview now and then, and stop early if you like."""

from pathlib import Path

from PIL import Image

import bifrost_rt


def on_step_end(generator, step, timestep, tensors):
    """Print the step: after every decoding step (timestep is None) and every denoising step."""
    loop = "decoding" if timestep is None else "denoising"
    print(loop, step)
    if "preview" in tensors:  # uint8 [n, H, W, 3]: what the image will be
        Image.fromarray(tensors["preview"][0]).save(f"out/watch-{step}.png")
    # an exception from here ends the run and leaves the generator usable


Path("out").mkdir(exist_ok=True)
with bifrost_rt.Generator() as generator:
    result = generator.run(
        "a red circle",
        seed=3,
        num_inference_steps=8,
        callback_on_step_end=on_step_end,
        preview_every=4,
    )
    print(*result.save("out/watch.png"))
