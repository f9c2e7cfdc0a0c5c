"""Where an erasure on the embedded world has not reached: how much of the concept is left in theta's predictions.

  python benchmarks/concept_shares.py square star [preserve.empty=0.35 ...]

With d = eps0(c) - eps0(without c), what the concept adds for theta0, the share of d in a prediction eps of theta is
<eps - eps0(without c), d> / <d, d>: 1 for prompts with the concept and 0 for those without before erasure. Printed for
the concept alone and the empty prompt, for captions with and without the concept's word, and for random words with and
without it (words.py: what the recipe erases from in context), on trajectories of theta0 at several denoising steps.
"guided" is what sampling makes of the captions, u + g (c - u) with the empty prompt's share u; "added" d's mean square.
"""

import argparse
import dataclasses

import cells
import jax
import jax.numpy as jnp
import numpy as np
from trials import table

STAGES = (0, 5, 10, 20, 30, 40)  # denoising steps done, of 50
LATENTS = 64


def shares(concept: str, overrides: dict, seed: int = 0) -> dict[str, list[float]]:
    """{row: value at each of STAGES} after an erasure of the concept by the world's config with overrides."""
    import aegis_jax
    from aegis_jax.diffusion.sample import encode_text
    from aegis_jax.erasure import latents, networks, words
    from aegis_jax.erasure.setup import freeze
    from aegis_jax.evaluation import world

    run = cells.config_of({"overrides": overrides, "concept": concept, "seed": seed})
    pipeline = cells.original()
    erased = aegis_jax.erase(pipeline, run.concepts, config=run).pipeline
    frozen = freeze(pipeline, list(run.concepts), run.erase)
    found, rng = world.find(concept), np.random.default_rng(seed)
    said = [world._prompt(rng, found.axis, concept) for _ in range(LATENTS)]
    unsaid = [prompt.replace(concept, "thing" if found.attribute == "shape" else "") for prompt in said]
    pairs = {
        ("concept alone", "empty prompt"): (frozen.concept_emb[0], frozen.empty_emb),
        ("captions with it", "captions without"): tuple(encode_text(pipeline, prompts) for prompts in (said, unsaid)),
    }
    if frozen.vocabulary is not None:
        among = words.random_prompts(
            frozen.text_graph, frozen.text, frozen.vocabulary, jax.random.key(123), jnp.array([0]), batch=LATENTS
        )
        pairs["random words with it", "random words without"] = among[LATENTS:], among[:LATENTS]
    fill = dataclasses.replace(run.erase.latents, trajectories=LATENTS)
    buffer = latents.fill(frozen, frozen.unet, jax.random.key(seed), config=fill)[0]
    rows: dict[str, list[float]] = {}
    added: dict[str, list[float]] = {}
    for s in STAGES:
        t = jnp.full((LATENTS,), 20 * (49 - s) + 10, jnp.int32)
        for names, embeddings in pairs.items():
            before, after = (
                [networks.predict(frozen.unet_graph, params, frozen.schedule, buffer[s], t, e) for e in embeddings]
                for params in (frozen.unet, erased.unet.params)
            )
            d = before[0] - before[1]
            added.setdefault(f"added: {names[0]}", []).append(float(jnp.mean(d * d)))
            for name, eps in zip(names, after):
                rows.setdefault(name, []).append(float(jnp.vdot(eps - before[1], d) / jnp.vdot(d, d)))
    g = run.picture.guidance
    rows["captions, guided"] = [u + g * (c - u) for u, c in zip(rows["empty prompt"], rows["captions with it"])]
    return rows | added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("concepts_and_settings", nargs="+", metavar="concept|key=value")
    given = parser.parse_args().concepts_and_settings
    overrides = dict(setting.split("=", 1) for setting in given if "=" in setting)
    for concept in (word for word in given if "=" not in word):
        lines = [[name, *(f"{x:.2g}" for x in row)] for name, row in shares(concept, overrides).items()]
        print(table([f'"{concept}": steps done', *STAGES], lines), flush=True)


if __name__ == "__main__":
    main()
