"""Sampling 64 images of the embedded world in 25 DDIM steps, against diffusers' pipeline with the same weights.

  python -m benchmarks sampling [--rounds 3] [--repeats 3]

Both sides load the same folder, in float32, with the same prompts, guidance and threads (all cores), each in a process
of its own, in the order A B A B. The first call (compilation, thread pools) is timed apart.
"""

from benchmarks import trials

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


SIDES = {"aegis_jax": ours, "diffusers": theirs}


def trial(side: str, repeats: int) -> None:
    """One process: the first call and the median of the following ones."""
    call, images = SIDES[side](), []
    first, *times = trials.seconds(lambda: images.append(call()), 1 + repeats)
    assert images[-1].shape == (IMAGES, 32, 32, 3)
    trials.report(first=first, seconds=trials.spread(times)["median"])


def main(argv) -> None:
    parser = trials.parser(__doc__, "sampling_cpu.json", rounds=3, sides=SIDES)
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per process")
    args = parser.parse_args(argv)
    if args.side:
        return trial(args.side, args.repeats)
    about = trials.about()
    found = trials.by_sides("sampling", SIDES, argv, args.rounds)
    rows = [
        [side, *(trials.shown(spread) for spread in trials.figures(results).values())]
        for side, results in found.items()
    ]
    faster = trials.ratio(found["diffusers"], found["aegis_jax"], "seconds")
    print(trials.table(["side", "first call, s", "later calls, s"], rows))
    print(f"\naegis_jax is faster by {trials.shown(faster)}x; {about}")
    trials.write(args.out, {"about": about, "runs": found, "faster": faster})
