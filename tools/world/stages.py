"""What CLIP, VAE and UNet are trained on, and their losses. `train` runs them in order."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.diffusion import schedule as schedule_lib
from aegis_jax.errors import AegisError
from aegis_jax.models import clip as clip_model
from aegis_jax.models import unet as unet_model
from aegis_jax.models import vae as vae_model
from aegis_jax.models.model import Model, abstract, flatten, unflatten
from aegis_jax.world import clip
from aegis_jax.world.towers import Headed
from tools.world import architectures
from tools.world.fit import fit
from tools.world.subject import WORLD, Subject

# Per latent element, against a mean pixel error: keeps latents near unit size and costs no detail.
KL_WEIGHT = 5e-4


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the training; the defaults make the shipped weights, tests use tiny ones."""

    pool: int = 20_000
    clip_steps: int = 900
    vae_steps: int = 2_000
    judge_steps: int = 9_000
    unet_rounds: tuple[int, ...] = (2_400, 1_900, 4_000)  # steps; each anneals anew, on a pool of its own
    clip_batch: int = 128
    vae_batch: int = 16
    unet_batch: int = 48
    unet_rate: float = 1e-3
    min_snr: float | None = None  # gamma of Hang et al. (2303.09556), eq. 4 for epsilon; None weighs all t alike
    save_every: int = 250


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Where the parts are made, and of what: folder, seed, plan, subject, and the shared pool of its pictures."""

    folder: pathlib.Path
    seed: int
    plan: Plan
    log: Any = print
    subject: Subject = WORLD

    @functools.cached_property
    def pool(self) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 images (n, 32, 32, 3), labels (n, 3)), the same for every stage."""
        return self.pool_of(0)

    def pool_of(self, round: int) -> tuple[np.ndarray, np.ndarray]:
        """What round `round` of the UNet's training sees; that of round 0 is `pool`."""
        return self.subject.draw(np.random.default_rng((self.seed + round, 1)), self.plan.pool)

    def fresh(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Pictures that no stage trains on, with their labels."""
        return self.subject.draw(np.random.default_rng((self.seed, 2)), n)

    def fit(self, name, params, loss, batch, *, steps, learning_rate, round=0):
        numbers = {"clip": 11, "vae": 12, "judge": 13, "second_judge": 14, "unet": 15}
        return fit(
            name, params, loss, batch, steps=steps, learning_rate=learning_rate,
            seed=self.seed + round + 100 * numbers[name], folder=self.folder,
            save_every=self.plan.save_every, log=self.log,
        )  # fmt: skip


def start(module_class, config: dict, seed: int) -> Model:
    """A model to train: kernels of variance 1 / inputs, embeddings of deviation 0.02, plain norms.

    Drawn by numpy: compiling the initialisation of a UNet takes longer than its first 100 steps.
    """
    model, rng, flat = abstract(module_class, config), np.random.default_rng(seed), {}
    for name, leaf in flatten(model.params).items():
        kind = name.rpartition(".")[2]
        spread = {"kernel": np.prod(leaf.shape[:-1]) ** -0.5, "embedding": 0.02}.get(kind, 0.0)
        flat[name] = jnp.asarray(rng.normal(0, 1, leaf.shape) * spread + (kind == "scale"), jnp.float32)
    return dataclasses.replace(model, params=unflatten(flat))


def signed(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def contrastive_loss(model: clip.Clip, params, images, ids, compatible):
    """Symmetric cross-entropy over the batch; returns (loss, pooled image features).

    compatible (B, B) bool: caption j is true of image i. Off the diagonal such pairs are no
    negatives.
    """
    pooled, image = clip.image_features(model, params, images)
    scale = jnp.exp(jnp.minimum(params["logit_scale"], np.log(100.0)))
    scores = scale * image @ clip.text_features(model, params, ids).T
    eye = jnp.eye(len(scores), dtype=bool)
    scores = jnp.where(compatible & ~eye, -1e9, scores)
    rows, columns = jax.nn.log_softmax(scores, 1), jax.nn.log_softmax(scores, 0)
    return -(jnp.diagonal(rows) + jnp.diagonal(columns)).mean() / 2, pooled


def train_clip(shop: Workshop):
    """Contrastive; a linear read-out of the attributes, thrown away, speeds the image tower up."""
    subject, build, n = shop.subject, shop.subject.architectures, shop.plan.clip_batch
    text = start(clip_model.CLIPTextModel, build.text_config(), shop.seed + 21)
    vision = start(Headed, build.VISION, shop.seed + 23)
    projection = np.random.default_rng(shop.seed + 24).normal(0, 1, build.PROJECTION)
    projection /= np.sqrt(build.PROJECTION[0])
    extra = {
        "text_projection": {"kernel": jnp.asarray(projection, jnp.float32)},
        "logit_scale": jnp.log(jnp.float32(10.0)),
    }
    model = clip.Clip(text, vision, {**text.params, **vision.params, **extra})
    sizes = [len(values) for values in subject.attributes.values()]
    readout = jnp.zeros((build.VISION["features"], sum(sizes)))
    images, labels = shop.pool

    def batch(rng):
        rows = rng.integers(0, len(images), n)
        text, said = subject.captions(rng, labels[rows], **subject.clip_captions)
        noise = rng.normal(0, 0.02, (n, 32, 32, 3)).astype(np.float32)
        # The text tower is causal: what follows end-of-text has no say and need not be computed.
        ids = subject.encode(text)[:, : subject.longest]
        return signed(images[rows]) + noise, ids, subject.true_of(said, labels[rows]), labels[rows]

    def loss(params, key, x, ids, compatible, label):
        contrast, pooled = contrastive_loss(model, params["clip"], x, ids, compatible)
        parts = jnp.split(pooled @ params["readout"], np.cumsum(sizes)[:-1], axis=-1)
        aid = sum(optax.softmax_cross_entropy_with_integer_labels(p, label[:, k]).mean() for k, p in enumerate(parts))
        return contrast + 0.5 * aid, {"contrast": contrast, "readout": aid}

    trained = shop.fit(
        "clip", {"clip": model.params, "readout": readout}, loss, batch,
        steps=shop.plan.clip_steps, learning_rate=1e-3,
    )  # fmt: skip
    return trained["clip"]


def train_vae(shop: Workshop):
    """L1 + L2 reconstruction and a small KL; no adversary."""
    model = start(vae_model.AutoencoderKL, shop.subject.architectures.VAE, shop.seed + 31)
    images, _ = shop.pool

    def batch(rng):
        return (signed(images[rng.integers(0, len(images), shop.plan.vae_batch)]),)

    def loss(params, key, x):
        mean, logvar = vae_model.encode(model.graph, params, x)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = vae_model.decode(model.graph, params, z) - x
        l1, l2 = jnp.abs(error).mean(), (error**2).mean()
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        return l1 + l2 + KL_WEIGHT * kl, {"l1": l1, "l2": l2, "kl": kl}

    return shop.fit(
        "vae", model.params, loss, batch,
        steps=shop.plan.vae_steps, learning_rate=2e-3,
    )  # fmt: skip


def encode_images(params, images, batch: int = 128, config=architectures.VAE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images -> latent mean and log-variance, unscaled, (n, 8, 8, 4) each. config: of the VAE."""
    graph = abstract(vae_model.AutoencoderKL, config).graph
    f = jax.jit(lambda p, x: vae_model.encode(graph, p, x))
    parts = [f(params, signed(images[i : i + batch])) for i in range(0, len(images), batch)]
    return tuple(np.concatenate([np.asarray(p[k]) for p in parts]) for k in (0, 1))


def decode_latents(params, latents, batch: int = 128, config=architectures.VAE) -> np.ndarray:
    """Unscaled latents -> uint8 images."""
    graph = abstract(vae_model.AutoencoderKL, config).graph
    f = jax.jit(lambda p, z: jnp.clip(vae_model.decode(graph, p, z) * 127.5 + 127.5, 0, 255))
    parts = [np.asarray(f(params, latents[i : i + batch])) for i in range(0, len(latents), batch)]
    return np.concatenate(parts).round().astype(np.uint8)


def through_vae(params, images, config=architectures.VAE) -> np.ndarray:
    """uint8 images encoded (mean) and decoded again."""
    return decode_latents(params, encode_images(params, images, config=config)[0], config=config)


@dataclasses.dataclass(frozen=True)
class Latents:
    """A pool of encoded images: mean and log-variance (n, 8, 8, 4), labels (n, 3), the VAE's scaling factor."""

    mean: np.ndarray
    logvar: np.ndarray
    labels: np.ndarray
    scaling_factor: float


def encode_pool(vae_params, pool, scaling_factor: float | None = None, config=architectures.VAE) -> Latents:
    """A pool as the UNet sees it; by default scaled to unit deviation, mean and noise together."""
    images, labels = pool
    mean, logvar = encode_images(vae_params, images, config=config)
    if scaling_factor is None:
        scaling_factor = float(1 / np.sqrt(mean.var() + np.exp(logvar).mean()))
    return Latents(mean, logvar, labels, scaling_factor)


def train_unet(shop: Workshop, text_params, latents: Latents, *, params=None, round: int = 0):
    """Epsilon prediction, 10 % empty captions; the text encoder is frozen. `params`: where an earlier round ended."""
    subject, build = shop.subject, shop.subject.architectures
    model = start(unet_model.UNet2DConditionModel, build.UNET, shop.seed + 51)
    text = abstract(clip_model.CLIPTextModel, build.text_config())
    alphas = jnp.asarray(schedule_lib.alphas_cumprod(build.SCHEDULER))
    text_params = jax.tree.map(jnp.asarray, text_params)
    mean, logvar, labels, scaling_factor = dataclasses.astuple(latents)

    def batch(rng):
        rows = rng.integers(0, len(mean), shop.plan.unet_batch)
        ids = subject.encode(subject.captions(rng, labels[rows])[0])
        noise = rng.standard_normal(mean[rows].shape, np.float32)
        z = mean[rows] + np.exp(0.5 * logvar[rows]) * noise
        # One timestep from each slice of the schedule: a steadier gradient than free draws.
        t = (rng.permutation(len(z)) + rng.random(len(z))) / len(z) * len(alphas)
        t = t.astype(np.int32)
        return z * np.float32(scaling_factor), ids, t

    def loss(params, key, z, ids, t):
        context = clip_model.encode(text.graph, text_params, clip_model.embed(text.graph, text_params, ids))
        noise = jax.random.normal(key, z.shape)
        a = alphas[t][:, None, None, None]
        predicted = unet_model.apply(model.graph, params, jnp.sqrt(a) * z + jnp.sqrt(1 - a) * noise, t, context)
        if shop.plan.min_snr is None:
            return ((predicted - noise) ** 2).mean(), {}
        weight = jnp.minimum(1.0, shop.plan.min_snr * (1 - a) / a)  # min(SNR, gamma) / SNR
        return (weight * (predicted - noise) ** 2).mean(), {}

    return shop.fit(
        "unet", model.params if params is None else params, loss, batch,
        steps=shop.plan.unet_rounds[round], learning_rate=shop.plan.unet_rate, round=round,
    )  # fmt: skip


def as_model(module_class, config: dict, params: dict) -> Model:
    """A Model around trained parameters. Raises `AegisError` if they are not those of such a model."""
    model = abstract(module_class, config)
    shapes = [{path: leaf.shape for path, leaf in flatten(tree).items()} for tree in (model.params, params)]
    if shapes[0] != shapes[1]:
        raise AegisError(
            f"weights of another {module_class.__name__}, of an earlier version: remove their files and train again"
        )
    return dataclasses.replace(model, params=params)
