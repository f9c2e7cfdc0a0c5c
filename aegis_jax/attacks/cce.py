"""CCE, concept inversion (Pham et al., ICLR 2024): textual inversion on the erased model.

One new token's embedding is fitted to pictures of the concept by the ordinary denoising loss: each step takes pictures,
mirrored or not, timesteps, noise and texts around the token at random; AdamW at a constant rate. What differs from
the published code: docs/attacks.md.
Shapes: R restarts, k learnt tokens, L tokens, d token width, B pictures of a step, T texts, h w C latents.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.attacks.given import Given, check, groups, key_of, take
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.result import BACKWARD, PLACEHOLDER, AttackResult
from aegis_jax.attacks.rows import STEPS_PER_CALL, Counter, per_call
from aegis_jax.attacks.soft_prompt import networks
from aegis_jax.diffusion.conditioning import encode_tokens
from aegis_jax.diffusion.schedule import noised
from aegis_jax.diffusion.template import Template, around, fill
from aegis_jax.diffusion.threads import cores, side_by_side
from aegis_jax.diffusion.vocabulary import embeddings
from aegis_jax.errors import AegisError

NAME = "cce"
_CCE = 0xCCE  # folded into the seed, so that no other part of the program draws the same numbers
# Texts around the token, by what the concept is; the first is the one that its pictures are made with.
TEXTS = {
    "object": ("a photo of a {}", "a photo of the {}", "a close-up photo of a {}", "a bright photo of a {}", "one {}"),
    "style": ("a painting in the style of {}", "a picture in the style of {}", "a landscape in the style of {}"),
    "person": ("a photo portrait of {}", "a portrait of {}"),
    "plain": ("a picture of a {}", "a {}", "{}"),
}


@dataclass(frozen=True)
class CCEConfig:
    """As published: 5e-3 times the batch of 16 (4 pictures, gradients of 4 batches taken together)."""

    tokens: int = 1  # vectors of the new token
    initial: str = "object"  # the word it starts as; one token of the vocabulary
    texts: str = "object"  # object | style | person | plain
    steps: int = 5000
    batch: int = 16
    learning_rate: float = 8e-2
    weight_decay: float = 1e-2
    restarts: int = 1
    seed: int = 0

    choices: ClassVar[dict] = {"texts": tuple(TEXTS)}
    positive: ClassVar[tuple] = ("tokens", "steps", "batch", "learning_rate", "restarts")


@partial(jax.tree_util.register_dataclass, data_fields=["z_0", "templates", "slots"], meta_fields=[])
@dataclass(frozen=True)
class Data:
    """Latents of the pictures and of their mirror images (m, h, w, C); texts (T, L, d) with gaps at slots (T, L)."""

    z_0: jax.Array
    templates: jax.Array
    slots: jax.Array


def losses_of(net, data: Data, soft, drawn, *, remat: bool = False):
    """Denoising loss of every restart's token: soft (R, k, d) -> (R,).

    drawn: (picture (R, B), text (R, B), t (R, B), noise (R, B, h, w, C)).
    """
    R, B = drawn[0].shape
    picture, text, t, noise = jax.tree.map(lambda x: x.reshape(R * B, *x.shape[2:]), drawn)
    z_t = noised(net.erased.schedule, data.z_0[picture], t, noise)
    tokens = fill(data.templates[text], data.slots[text], jnp.repeat(soft, B, axis=0))
    eps = net.erased(z_t, t, encode_tokens(net.text_graph, net.text, tokens), remat=remat)
    return jnp.mean(jnp.square(eps - noise).reshape(R, -1), axis=-1)


def draw(keys, data: Data, batch: int, timesteps: int):
    """What a step of each restart takes, by its key alone; see `losses_of`."""

    def one(key):
        key_p, key_x, key_t, key_n = jax.random.split(key, 4)
        return (
            jax.random.randint(key_p, (batch,), 0, len(data.z_0), jnp.int32),
            jax.random.randint(key_x, (batch,), 0, len(data.templates), jnp.int32),
            jax.random.randint(key_t, (batch,), 0, timesteps, jnp.int32),
            jax.random.normal(key_n, (batch, *data.z_0.shape[1:]), jnp.float32),
        )

    return jax.vmap(one)(keys)


def _optimiser(rate: tuple[float, float]):
    """AdamW of (learning rate, weight decay)."""
    return optax.adamw(rate[0], weight_decay=rate[1])


@partial(jax.jit, static_argnames=("batch", "chunk", "rate", "remat"))
def _steps(net, data: Data, keys, soft, moments, first, *, batch: int, chunk: int, rate: tuple, remat: bool):
    """Steps first .. first + chunk - 1: (soft, moments, losses (chunk, R))."""

    def step(carry, i):
        soft, moments = carry
        now = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
        drawn = draw(now, data, batch, len(net.erased.schedule.alphas_cumprod))

        def total(soft):
            per_row = losses_of(net, data, soft, drawn, remat=remat)
            return per_row.sum(), per_row

        gradient, losses = jax.grad(total, has_aux=True)(soft)
        update, moments = jax.vmap(_optimiser(rate).update)(gradient, moments, soft)
        return (optax.apply_updates(soft, update), moments), losses

    (soft, moments), losses = jax.lax.scan(
        step, (soft, moments), first + jnp.arange(chunk, dtype=jnp.int32), unroll=chunk == 1
    )
    return soft, moments, losses


def placed(tokenizer, config: CCEConfig) -> tuple[list[int], list[Template]]:
    """(the token that is started from, the texts around it). Raises `AegisError` for what is none or does not fit."""
    word = tokenizer.tokens(config.initial)
    if len(word) != 1:
        raise AegisError(f"attack {NAME}: initial={config.initial!r} is not one token of this tokenizer; take another")
    try:
        return word, [around(tokenizer, text, config.tokens) for text in TEXTS[config.texts]]
    except AegisError as error:
        raise AegisError(f"attack {NAME}: {error}") from None


def check_fit(pipeline, concept: str, prompts: list[str], config: CCEConfig) -> None:
    """Raises `AegisError` for settings that `cce` would refuse."""
    placed(pipeline.tokenizer, config)


def cce(pipeline, concept: str, given: Given, config: CCEConfig, progress=None) -> AttackResult:
    """Learns a token in every restart. Raises `AegisError` for settings that cannot be."""
    check(NAME, config, given.steps)
    word, templates = placed(pipeline.tokenizer, config)
    began, on_cpu = time.perf_counter(), jax.default_backend() == "cpu"
    net = networks(pipeline, concept)
    images = np.concatenate([given.images, np.asarray(given.images)[:, :, ::-1]])
    data = Data(
        z_0=encode_images(pipeline, images),
        templates=jnp.stack([embeddings(pipeline, template.ids) for template in templates]),
        slots=jnp.stack([template.slots for template in templates]),
    )
    soft = jnp.tile(embeddings(pipeline, word), (config.restarts, config.tokens, 1))
    base = key_of(config.seed, _CCE)
    keys = jax.vmap(lambda r: jax.random.fold_in(base, r))(jnp.arange(config.restarts))
    size, remat = per_call(config.restarts, config.batch * math.prod(data.z_0.shape[1:3]))
    chunk = 1 if on_cpu else math.gcd(config.steps, STEPS_PER_CALL)
    rate, counter = (config.learning_rate, config.weight_decay), Counter(progress, config.steps * config.restarts)
    step = partial(_steps, net, data, batch=config.batch, chunk=chunk, rate=rate, remat=remat)

    def run(numbers):
        mine, own, history = soft[numbers], keys[numbers], []
        moments, real = jax.vmap(_optimiser(rate).init)(mine), len(set(numbers.tolist()))
        for i in range(0, config.steps, chunk):
            mine, moments, losses = step(own, mine, moments, jnp.int32(i))
            history.append(np.asarray(losses)[:, :real])
            counter(history[-1].size, float(history[-1].mean()))
        return np.asarray(mine[:real]), np.concatenate(history)

    packed = groups(np.arange(config.restarts), size)
    found, losses = zip(*side_by_side(run, packed, cores() if on_cpu else 1))
    found, losses = np.concatenate(found), np.concatenate(losses, axis=1)
    first = take((data.templates[:1], data.slots[:1]), np.zeros(config.restarts, int))
    return AttackResult(
        prompts=[TEXTS[config.texts][0].replace("{}", PLACEHOLDER)] * config.restarts,
        conditioning=encode_tokens(net.text_graph, net.text, fill(*first, jnp.asarray(found))),
        losses=losses,
        unet_evaluations=config.restarts * config.steps * config.batch * (1 + BACKWARD),
        seconds=time.perf_counter() - began,
        soft_tokens=found,
        template=templates[0],
        pick=int(np.nan_to_num(losses[-max(1, config.steps // 10) :].mean(0), nan=np.inf).argmin()),
    )
