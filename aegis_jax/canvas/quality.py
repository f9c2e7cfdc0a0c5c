"""How good the canvas is: generations of things in all hands, judged; and pictures of them.

`python -m aegis_jax.canvas.quality [--canvas DIR] [--out FILE.json] [--png FILE.png]`
"""

import argparse
import json
import pathlib
import time

import numpy as np

from aegis_jax.canvas import WEIGHTS
from aegis_jax.canvas.concepts import STYLES
from aegis_jax.canvas.embedded import canvas
from aegis_jax.errors import AegisError
from aegis_jax.world.interface import EmbeddedWorld
from aegis_jax.world.quality import GUIDANCE, STEPS

PROMPTS = 1008  # of either kind; to reach: things 90 %, styles 95 %, agreement 95 %, held-out synonyms 80 %
ROWS = 16  # things on a page of the picture's columns


def prompts(world: EmbeddedWorld, n: int, seed: int, *, held_out: bool) -> tuple[list[str], np.ndarray]:
    """n fully stated prompts over all things and hands in turn, and their labels (n, 3).

    Words are seen ones; held_out: the things' held-out ones, in hands by seen names.
    """
    from aegis_jax.canvas.captions import phrase

    rng, rows = np.random.default_rng((seed, held_out)), world.combinations
    labels = np.concatenate([rng.permutation(rows) for _ in range(-(-n // len(rows)))])[:n]
    things, styles, _ = world.attributes.values()
    words = [things[row[0]].held_out if held_out else things[row[0]].seen for row in labels]
    texts = [phrase(rng.choice(w), rng.choice(styles[row[1]].seen)) for w, row in zip(words, labels, strict=True)]
    return texts, labels


def measure(pipeline, world: EmbeddedWorld, *, n: int = PROMPTS, seed: int = 0, guidance: float = GUIDANCE) -> dict:
    """Shares in [0, 1] of n images to seen and n to held-out words.

    For each kind: by attribute for `judge`, `second_judge` and the `agreement` of the two; for seen words `clip`
    (zero-shot), the mean `clip_score`, and the judge's shares `by_thing` and `by_style`.
    """
    from aegis_jax.diffusion.sample import sample

    result: dict = {"prompts": n, "steps": STEPS, "guidance": guidance, "seed": seed}
    for held_out, kind in enumerate(("seen", "held_out")):
        texts, label = prompts(world, n, seed, held_out=bool(held_out))
        began = time.perf_counter()
        images = sample(pipeline, texts, seed=seed, steps=STEPS, guidance=guidance)
        seconds = time.perf_counter() - began
        first, second = (world.judge(name)(images) for name in ("judge", "second_judge"))
        found = {name: _right(world, answer, label) for name, answer in (("judge", first), ("second_judge", second))}
        found["agreement"] = {a: float((first[a] == second[a]).mean()) for a in world.attributes}
        found["seconds_per_image"] = round(seconds / n, 4)
        result[kind] = found
        if not held_out:
            scorer = world.clip()
            found["clip"] = _right(world, scorer.zero_shot(images), label)
            cosines = (scorer.embed_images(images) * scorer.embed_texts(pipeline.tokenizer.ids(texts))).sum(-1)
            found["clip_score"] = float(cosines.mean())
            for name, a in (("by_thing", "thing"), ("by_style", "style")):
                k = list(world.attributes).index(a)
                rows = {v.name: (first[a] == i)[label[:, k] == i] for i, v in enumerate(world.attributes[a])}
                found[name] = {value: float(right.mean()) for value, right in rows.items() if len(right)}
    return result


def _right(world: EmbeddedWorld, answer: dict, label: np.ndarray) -> dict[str, float]:
    return {a: float((answer[a] == label[:, k]).mean()) for k, a in enumerate(world.attributes)}


def table(result: dict) -> str:
    """The measurements as aligned text, with the ten things that are drawn worst."""
    how = f"{result['steps']} DDIM steps, guidance {result['guidance']:g}"
    lines = [f"2 x {result['prompts']} prompts, {how}"]
    attributes = list(result["seen"]["judge"])
    for kind in ("seen", "held_out"):
        lines.append(f"{kind.replace('_', ' ') + ' words':18}" + "".join(f"{a:>10}" for a in attributes))
        for row in ("judge", "second_judge", "agreement", "clip"):
            if row in result[kind]:
                lines.append(f"{row:18}" + "".join(f"{result[kind][row][a]:>10.1%}" for a in attributes))
    worst = sorted(result["seen"]["by_thing"].items(), key=lambda pair: pair[1])[:10]
    lines.append("worst  " + "  ".join(f"{name} {share:.0%}" for name, share in worst))
    return "\n".join(lines)


def grid(pipeline, world: EmbeddedWorld, path: pathlib.Path, *, seed: int = 0, guidance: float = GUIDANCE) -> None:
    """Write a labelled PNG: every thing in the six hands, in columns of `ROWS` things."""
    from PIL import Image, ImageDraw

    from aegis_jax.canvas.captions import phrase
    from aegis_jax.diffusion.sample import sample

    names = [value.name for value in world.attributes["thing"]]
    texts = [phrase(name, style) for name in names for style in STYLES]
    images = sample(pipeline, texts, seed=seed, steps=STEPS, guidance=guidance)
    side, label = images.shape[1], 72
    width, columns = label + len(STYLES) * side, -(-len(names) // ROWS)
    sheet = Image.new("RGB", (columns * width, min(ROWS, len(names)) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, strip) in enumerate(zip(names, images.reshape(len(names), len(STYLES), side, side, 3), strict=True)):
        left, top = i // ROWS * width, i % ROWS * side
        draw.text((left + 4, top + side // 2 - 6), name, fill="black")
        row = np.ascontiguousarray(strip.transpose(1, 0, 2, 3).reshape(side, -1, 3))
        sheet.paste(Image.fromarray(row), (left + label, top))
    sheet.save(path)


def main(argv=None) -> None:
    from aegis_jax.io.pipeline import load_pipeline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--canvas", type=pathlib.Path, help="an exported canvas, in place of the package's")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the measurements")
    parser.add_argument("--png", type=pathlib.Path, help="picture of every thing in every hand")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"of either kind ({PROMPTS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    arguments = parser.parse_args(argv)
    try:
        pipeline, world = load_pipeline(arguments.canvas or "canvas"), canvas(arguments.canvas or WEIGHTS)
    except AegisError as error:
        parser.error(str(error))
    how = {"seed": arguments.seed, "guidance": arguments.guidance}
    result = measure(pipeline, world, n=arguments.prompts, **how)
    print(table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.png:
        grid(pipeline, world, arguments.png, **how)


if __name__ == "__main__":
    main()
