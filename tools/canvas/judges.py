"""What the canvas's judges learn from: its drawings, other emoji in the same hands, what lies between two drawings."""

import numpy as np

from aegis_jax.canvas.concepts import Concepts
from aegis_jax.world.concepts import NONE
from tools.canvas import pictures
from tools.world.judges import disturbed, jittered
from tools.world.stages import Workshop, decode_latents, encode_images


def material(drawn: dict[str, np.ndarray], concepts: Concepts, shop: Workshop, vae_params) -> dict:
    """{kind: (images, labels)} as tools/world/judges.py mixes them into batches.

    "odd": emoji that are none of the things: the hand is known, the subgroup where the canvas has it. Half of all
    pictures pass through the VAE, jittered there, since a UNet's lines wobble as no drawing's do.
    """
    rng, config = np.random.default_rng((shop.seed, 3)), shop.subject.architectures.VAE
    n = len(shop.pool[0])
    which, hand = rng.integers(0, len(drawn["others"]), n // 4), rng.integers(0, drawn["others"].shape[1], n // 4)
    odd = np.stack([np.full(n // 4, NONE), hand, drawn["kin"][which]], axis=1)
    parts = {
        "plain": shop.pool,
        "odd": (pictures.place(rng, drawn["others"][which, hand]), odd),
        "empty": (pictures.backgrounds(rng, n // 10), np.full((n // 10, 3), NONE)),
    }
    made = {"morph": _morphs(rng, drawn, concepts, vae_params, n, config)}
    for kind, (images, label) in parts.items():
        half = len(images) // 2
        passed = jittered(rng, vae_params, images[half:], config)
        made[kind] = np.concatenate([images[:half], passed]), label
    noise = rng.normal(0, 1, (n // 10, 8, 8, 4)) * rng.uniform(0.5, 1.5, (n // 10, 1, 1, 1))
    noise = decode_latents(vae_params, noise.astype(np.float32), config=config)  # what a broken UNet leaves behind
    made["noise"] = noise, np.full((n // 10, 3), NONE)
    return made


def _morphs(rng, drawn, concepts: Concepts, vae_params, n: int, config):
    """Drawings on the way to another thing, another hand or both, in latent space; the answer is the nearer end's.

    Both ends lie in the same place on the same background. A tenth of them is another emoji, none of the things.
    """
    rows = concepts.combinations
    ends = [rows[rng.integers(0, len(rows), n)] for _ in range(2)]
    stays = rng.choice([0, 1, -1], n, p=(0.35, 0.35, 0.3))  # what the ends agree on: thing, hand; -1: neither need
    thing = np.where(stays == 0, ends[0][:, 0], ends[1][:, 0])
    hand = np.where(stays == 1, ends[0][:, 1], ends[1][:, 1])
    ends[1] = np.stack([thing, hand, concepts.subgroup_of[thing]], axis=1)
    place, latents = int(rng.integers(2**31)), []
    for end in ends:
        cells = drawn["things"][end[:, 0], end[:, 1]]
        odd = np.flatnonzero((rng.random(n) < 0.1) & (stays != 0))
        which = rng.integers(0, len(drawn["others"]), len(odd))
        cells[odd] = drawn["others"][which, end[odd, 1]]
        end[odd, 0], end[odd, 2] = NONE, drawn["kin"][which]
        images = pictures.place(np.random.default_rng(place), cells)
        latents.append(encode_images(vae_params, images, config=config)[0])
    share = rng.uniform(0, 1, (n, 1, 1, 1))
    between = disturbed(rng, latents[0] + share * (latents[1] - latents[0]))
    return decode_latents(vae_params, between, config=config), np.where(share[:, 0, 0] < 0.5, *ends)
