"""Draw one prompt and save the image."""

import bifrost_rt

with bifrost_rt.Generator() as generator:  # or Generator("path/to/an/engine/set")
    result = generator.run("a red circle above a blue square", seed=7)
    for path in result.save("out/draw.png"):
        print(path)
    print("seed", result.seed, "took", round(result.timings["total"], 2), "s")
