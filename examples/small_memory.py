"""Draw within a memory budget: engines leave and come back, the image stays the same."""

import numpy as np

import bifrost_rt

settings = {"prompt": "a blue square", "seed": 2, "output_type": "np", "num_inference_steps": 8}

with bifrost_rt.Generator() as generator:
    free = generator.run(**settings)
with bifrost_rt.Generator(memory_budget="60MiB") as generator:
    tight = generator.run(**settings)
print("equal to the bit:", np.array_equal(free.images, tight.images))
