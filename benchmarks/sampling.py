"""Sampling 64 images of the embedded world in 25 DDIM steps, against diffusers' pipeline with the same weights.

  python benchmarks/sampling.py [--rounds 3] [--repeats 3] [--out FILE.json]

Both sides load the same folder, in float32, with the same prompts, guidance and threads (all cores), each in a process
of its own, in the order A B A B. The first call (compilation, thread pools) is timed apart.
"""

import argparse
import pathlib
import sys
import time

import trials

IMAGES, STEPS, GUIDANCE = 64, 25, 3.0
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "cyan") for shape in ("star", "ring", "heart")]


def prompts() -> list[str]:
    return (PROMPTS * IMAGES)[:IMAGES]


def ours():
    from aegis_jax.diffusion.sample import sample
    from aegis_jax.io.pipeline import load_pipeline

    pipeline = load_pipeline("world")
    return lambda: sample(pipeline, prompts(), steps=STEPS, guidance=GUIDANCE)


def theirs():
    import torch
    from diffusers import StableDiffusionPipeline

    from aegis_jax.world import WEIGHTS

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return lambda: pipeline(prompts(), output_type="np", **arguments).images


def work(side: str, repeats: int) -> None:
    """One process: the first call and the median of the following ones."""
    call = {"aegis_jax": ours, "diffusers": theirs}[side]()
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        images = call()
        times.append(time.perf_counter() - began)
    assert images.shape == (IMAGES, 32, 32, 3)
    trials.report(first=times[0], seconds=trials.spread(times[1:])["median"])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per process")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the result")
    parser.add_argument("--side", choices=("aegis_jax", "diffusers"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        return work(args.side, args.repeats)
    about = trials.about()
    command = [sys.executable, __file__, "--repeats", args.repeats, "--side"]
    found = trials.alternate({side: [*command, side] for side in ("aegis_jax", "diffusers")}, args.rounds)
    rows = [
        [side, *(trials.shown(spread) for spread in trials.figures(results).values())]
        for side, results in found.items()
    ]
    faster = trials.ratio(found["diffusers"], found["aegis_jax"], "seconds")
    print(trials.table(["side", "first call, s", "later calls, s"], rows))
    print(f"\naegis_jax is faster by {trials.shown(faster)}x; {about}")
    trials.write(args.out, {"about": about, "runs": found, "faster": faster})


if __name__ == "__main__":
    main()
