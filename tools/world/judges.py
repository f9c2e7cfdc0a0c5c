"""What the judges learn from: clean renders, what lies between two of them, and much that is none of the values."""

import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.world import judge, renderer
from aegis_jax.world.concepts import NONE
from aegis_jax.world.towers import Committee
from tools.world.architectures import VAE
from tools.world.stages import Workshop, decode_latents, encode_images, start

MIX = {"plain": 21, "odd": 8, "empty": 4, "morph": 21, "blend": 5, "broken": 5}  # images per batch of 64
JITTER = 0.35  # of latents that are decoded again, at most, in their deviations: edges as a UNet draws them
WARP = 1.2  # pixels by which an outline bends, at most (root mean square)
IGNORE = -2  # a label that counts neither way


def material(shop: Workshop, vae_params) -> dict:
    """The judges' training images: of renders half as they are, half passed through the VAE, jittered there; the others
    ("morph", "noise") are all decoded from latents.

    A UNet's objects wobble as no render does; judges that know only straight edges call them "none" at random.
    """
    rng = np.random.default_rng((shop.seed, 3))
    n = len(shop.pool[0])
    odd = renderer.labels(rng, n // 4)
    odd[np.arange(len(odd)), rng.integers(0, 3, len(odd))] = NONE  # in one attribute each
    parts = {
        "plain": shop.pool,
        "odd": (renderer.render(rng, odd), odd),
        "empty": (renderer.backgrounds(rng, n // 10), np.full((n // 10, 3), NONE)),
    }
    made = {"morph": _morphs(rng, vae_params, n)}
    for kind, (images, label) in parts.items():
        half = len(images) // 2
        passed = jittered(rng, vae_params, images[half:])
        made[kind] = np.concatenate([images[:half], passed]), label
    # What a broken UNet leaves behind: noise, decoded.
    noise = rng.normal(0, 1, (n // 10, 8, 8, 4)) * rng.uniform(0.5, 1.5, (n // 10, 1, 1, 1))
    noise = decode_latents(vae_params, noise.astype(np.float32))
    made["noise"] = noise, np.full((n // 10, 3), NONE)
    return made


def _morphs(rng, vae_params, n: int):
    """Objects on the way to another shape, another texture or both, in latent space; each answer is the nearer end's.

    A UNet that has been made to forget draws much that lies between two values. The outlines of the first
    renderer.BATCH pairs lie on each other; of the others each end has a place of its own, as what a render draws
    depends on its batch.
    """
    ends = [renderer.labels(rng, n), renderer.labels(rng, n)]
    for label in ends:
        for axis in (0, 2):
            label[rng.random(n) < 0.1, axis] = NONE
    ends[1][:, 1] = ends[0][:, 1]  # between two colours lies a third
    stays = rng.choice([0, 2, -1], n, p=(0.35, 0.35, 0.3))  # the axis on which the ends agree; -1: neither need
    for axis in (0, 2):
        ends[1][stays == axis, axis] = ends[0][stays == axis, axis]
    place = int(rng.integers(2**31))
    first, last = (encode_images(vae_params, renderer.render(np.random.default_rng(place), x))[0] for x in ends)
    share = rng.uniform(0, 1, (n, 1, 1, 1))
    latents = disturbed(rng, first + share * (last - first))
    return decode_latents(vae_params, latents), np.where(share[:, 0, 0] < 0.5, *ends)


def jittered(rng, vae_params, images, config=VAE):
    """Images through the VAE, their latents disturbed by smooth and by independent noise."""
    latents = disturbed(rng, encode_images(vae_params, images, config=config)[0])
    return decode_latents(vae_params, latents, config=config)


def disturbed(rng, latents):
    """Latents (n, 8, 8, 4) with noise of up to `JITTER` of their deviation, smooth in half of them."""
    n = len(latents)
    coarse = rng.standard_normal((n, 4, 4, 4)).repeat(2, 1).repeat(2, 2)
    noise = np.where(rng.random((n, 1, 1, 1)) < 0.5, coarse, rng.standard_normal(latents.shape))
    return (latents + noise * JITTER * rng.random((n, 1, 1, 1)) ** 2 * latents.std()).astype(np.float32)


def _broken(rng, images, n: int, survives: tuple[int, ...]):
    """Images that show no object any more, with labels; of what `survives` shuffling is not asked then.

    A third each: 8x8 blocks shuffled, drowned in noise, random coloured squares.
    """
    x = images[rng.integers(0, len(images), n)].astype(np.float32)
    label = np.full((n, 3), NONE)
    third = n // 3
    blocks = x[:third].reshape(third, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(third, 16, 8, 8, 3)
    blocks = np.stack([b[rng.permutation(16)] for b in blocks]).reshape(third, 4, 4, 8, 8, 3)
    x[:third] = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(third, 32, 32, 3)
    label[:third, survives] = IGNORE
    share = rng.uniform(0.75, 1.0, (third, 1, 1, 1))
    x[third : 2 * third] += share * (rng.uniform(0, 255, (third, 32, 32, 3)) - x[third : 2 * third])
    side = int(rng.choice([2, 4, 8, 16]))
    coarse = rng.uniform(0, 255, (n - 2 * third, side, side, 3))
    x[2 * third :] = coarse.repeat(32 // side, 1).repeat(32 // side, 2)
    return x, label


def _moved(rng, x):
    """Each image moved by up to 3 pixels and bent, its edge repeated: the pool alone is learnt by heart."""
    n, size = x.shape[:2]
    axis = np.arange(size, dtype=np.float32)
    at = []
    for grid in (axis[:, None], axis[None, :]):
        bend = 0.0
        for _ in range(3):  # waves of 10 to 40 pixels
            ky, kx = rng.uniform(-0.45, 0.45, (2, n, 1, 1))
            bend = bend + np.cos(ky * axis[:, None] + kx * axis[None, :] + rng.uniform(0, 7, (n, 1, 1)))
        amount = rng.uniform(0, WARP, (n, 1, 1)) * (rng.random((n, 1, 1)) < 0.6)
        place = grid + rng.integers(-3, 4, (n, 1, 1)) + bend * amount * np.sqrt(2 / 3)
        at.append(np.clip(place, 0, size - 1))
    (top, left), rows = (np.minimum(a.astype(int), size - 2) for a in at), np.arange(n)[:, None, None]
    down, right = ((a - b)[..., None].astype(np.float32) for a, b in zip(at, (top, left), strict=True))
    upper = x[rows, top, left] * (1 - right) + x[rows, top, left + 1] * right
    lower = x[rows, top + 1, left] * (1 - right) + x[rows, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def _judge_batch(rng, material, survives=(1, 2)):
    def take(kind, n):
        images, label = material[kind]
        rows = rng.integers(0, len(images), n)
        return images[rows].astype(np.float32), label[rows]

    xs, ys = zip(*(take(kind, MIX[kind]) for kind in ("plain", "odd", "empty", "morph")), strict=True)
    (a, la), (b, lb) = take("plain", MIX["blend"]), take("plain", MIX["blend"])
    weight = rng.uniform(0.35, 0.65, (len(a), 1, 1, 1))
    # A double exposure is no clean object; what both exposures share is left open.
    blend = a + weight * (b - a), np.where(la == lb, IGNORE, NONE)
    noise = take("noise", MIX["broken"] // 2)
    broken = _broken(rng, material["plain"][0], MIX["broken"] - len(noise[0]), survives)
    x = np.concatenate([*xs, blend[0], noise[0], broken[0]]).astype(np.float32) / 127.5 - 1
    y = np.concatenate([*ys, blend[1], noise[1], broken[1]])
    x = _moved(rng, x)
    x = x + rng.normal(0, 1, x.shape) * rng.uniform(0, 0.04, (len(x), 1, 1, 1))
    return x.astype(np.float32), y.astype(np.int32)


def train_judge(shop: Workshop, name: str, material):
    """One of the two judges, on `material`."""
    subject = shop.subject
    model = start(Committee, subject.architectures.JUDGES[name], shop.seed + (41 if name == "judge" else 42))
    sizes = judge.classes(subject.attributes)

    def loss(params, key, x, label):
        total = 0.0
        for k, scores in enumerate(judge.logits(model.graph, params, x, sizes)):
            target = jnp.where(label[:, k] < 0, scores.shape[-1] - 1, label[:, k])
            target = jnp.broadcast_to(target, scores.shape[:-1])
            each = optax.softmax_cross_entropy_with_integer_labels(scores, target)
            total += (each * (label[:, k] != IGNORE)).mean()
        return total, {}

    return shop.fit(
        name, model.params, loss, lambda rng: _judge_batch(rng, material, subject.survives),
        steps=shop.plan.judge_steps, learning_rate=2e-3,
    )  # fmt: skip
