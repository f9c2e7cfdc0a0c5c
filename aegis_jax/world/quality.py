"""How good the world is: generations of every combination, judged; and a picture of them.

`python -m aegis_jax.world.quality [--world DIR] [--out FILE.json] [--png FILE.png]`
"""

import argparse
import json
import pathlib
import time

import numpy as np

from aegis_jax.world import WEIGHTS, captions, clip, judge
from aegis_jax.world.concepts import ATTRIBUTES, COMBINATIONS

REPEATS = 3  # of the 192 combinations: 576 prompts
GUIDANCE = 3.0  # strong enough that attributes hold, weak enough that colours do not saturate
STEPS = 25


def measure(
    pipeline,
    folder: pathlib.Path = WEIGHTS,
    *,
    repeats: int = REPEATS,
    seed: int = 0,
    guidance=GUIDANCE,
) -> dict:
    """Generate `repeats` images of every combination and judge them.

    Returns shares in [0, 1]: by attribute for `judge`, `second_judge`, `agreement` of the two and
    `clip` (zero-shot), the mean `clip_score` (cosine of image and prompt), and the judge's shares
    by value.
    """
    from aegis_jax.diffusion.sample import sample

    prompts, label = captions.every_combination(repeats, np.random.default_rng(seed))
    began = time.perf_counter()
    images = sample(pipeline, prompts, seed=seed, steps=STEPS, guidance=guidance)
    seconds = time.perf_counter() - began
    first, second = (judge.load(name, folder)(images) for name in judge.NAMES)
    scorer = clip.load(folder)
    zero_shot = scorer.zero_shot(images)
    score = (scorer.embed_images(images) * scorer.embed_texts(pipeline.tokenizer.ids(prompts))).sum(-1)
    result = {
        "prompts": len(prompts),
        "steps": STEPS,
        "guidance": guidance,
        "seed": seed,
        "seconds_per_image": round(seconds / len(prompts), 4),
        "clip_score": float(score.mean()),
    }
    for name, answer in (("judge", first), ("second_judge", second), ("clip", zero_shot)):
        result[name] = {a: float((answer[a] == label[:, k]).mean()) for k, a in enumerate(ATTRIBUTES)}
    result["agreement"] = {a: float((first[a] == second[a]).mean()) for a in ATTRIBUTES}
    result["by_value"] = {
        a: {v.name: float((first[a] == i)[label[:, k] == i].mean()) for i, v in enumerate(values)}
        for k, (a, values) in enumerate(ATTRIBUTES.items())
    }
    return result


def table(result: dict) -> str:
    """The measurements as aligned text."""
    how = f"{result['steps']} DDIM steps, guidance {result['guidance']:g}"
    lines = [f"{result['prompts']} prompts, {how}"]
    lines.append(f"{'':14}" + "".join(f"{a:>10}" for a in ATTRIBUTES))
    for row in ("judge", "second_judge", "agreement", "clip"):
        lines.append(f"{row:14}" + "".join(f"{result[row][a]:>10.1%}" for a in ATTRIBUTES))
    for attribute, shares in result["by_value"].items():
        lines.append(f"{attribute:14}" + "  ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return "\n".join(lines)


def grid(pipeline, *, seed: int = 0, guidance: float = GUIDANCE, scale: int = 2):
    """A labelled picture, of Pillow: one row per shape and texture, one column per colour."""
    from PIL import Image, ImageDraw

    from aegis_jax.diffusion.sample import sample

    images = sample(pipeline, captions.canonical(COMBINATIONS), seed=seed, steps=STEPS, guidance=guidance)
    shapes, colours, textures = (len(v) for v in ATTRIBUTES.values())
    size = images.shape[1]
    tiles = images.reshape(shapes, colours, textures, size, size, 3).transpose(0, 3, 2, 1, 4, 5)
    picture = Image.fromarray(np.ascontiguousarray(tiles.reshape(shapes * size, textures * colours * size, 3)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    left, top = 64, 34
    sheet = Image.new("RGB", (picture.width + left, picture.height + top), "white")
    sheet.paste(picture, (left, top))
    draw = ImageDraw.Draw(sheet)
    for row, value in enumerate(ATTRIBUTES["shape"]):
        draw.text((6, top + (row + 0.5) * size * scale - 6), value.name, fill="black")
    for block, texture in enumerate(ATTRIBUTES["texture"]):
        draw.text((left + block * colours * size * scale + 4, 4), texture.name, fill="black")
        for column, colour in enumerate(ATTRIBUTES["colour"]):
            draw.text(
                (left + (block * colours + column) * size * scale + 4, 18),
                colour.name,
                fill="black",
            )
    return sheet


def main(argv=None) -> None:
    from aegis_jax.io.pipeline import load_pipeline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=pathlib.Path, default=WEIGHTS, help="an exported world")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the measurements")
    parser.add_argument("--png", type=pathlib.Path, help="picture of all combinations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    arguments = parser.parse_args(argv)
    pipeline = load_pipeline(arguments.world)
    result = measure(pipeline, arguments.world, seed=arguments.seed, guidance=arguments.guidance)
    print(table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.png:
        grid(pipeline, seed=arguments.seed, guidance=arguments.guidance).save(arguments.png)


if __name__ == "__main__":
    main()
