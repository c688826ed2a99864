"""Draw several prompts in one run, two images of each."""

import bifrost_rt

prompts = ["three green triangles", "a yellow circle left of a purple square"]

with bifrost_rt.Generator() as generator:
    result = generator.run(prompts, num_images_per_prompt=2, seed=1, num_inference_steps=8)
    for path in result.save("out/batch.png"):  # out/batch-0.png, out/batch-1.png, …
        print(path)
