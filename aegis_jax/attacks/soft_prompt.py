"""White-box soft prompt: learnable token embeddings before the concept, fitted to images of the concept.

The attacker holds the weights and images of the concept, and minimises the denoising loss of the erased model on them
over k token embeddings p in [BOS, p, concept, EOS, PAD...]. A continuous prefix is at least as strong as any prompt
that UnlearnDiffAtk or P4D could find with as many tokens, which makes its success an upper bound for them.

Restarts are a batch axis: as many of them as fit share every call of the network.
Shapes: R restarts, k soft tokens, d token width, B images per restart and step, L tokens, D text width.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.diffusion.conditioning import random_words
from aegis_jax.diffusion.schedule import Schedule, make_schedule, to_epsilon
from aegis_jax.errors import AegisError
from aegis_jax.models import clip, unet, vae


@dataclasses.dataclass(frozen=True)
class SoftPromptConfig:
    """Settings of the attack."""

    tokens: int = 4  # k
    restarts: int = 5  # R, from different random words
    steps: int = 200
    learning_rate: float = 1e-2  # of Adam, decaying to 0, in units of a token embedding's coordinates
    batch: int = 8  # images per restart and step
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
      soft_tokens: (R, k, d).
      text_emb: (R, L, D), encoded; feed it to the UNet in place of a prompt's embedding.
      losses: (steps, R), the denoising loss along the way.
    """

    soft_tokens: np.ndarray
    text_emb: jax.Array
    losses: np.ndarray


# Of all latents in a call: five restarts of eight 8x8 latents, or one restart of eight latents of SD 1.4.
PIXELS_PER_CALL = 8 * 64 * 64
_adam = optax.scale_by_adam()
_ATTACK = 0xA77AC4  # folded into the seed, so that attack and erasure never share random numbers


def _encode(text_graph, text_params, template, soft):
    """Soft tokens (R, k, d) in a template (1, L, d) -> (R, L, D)."""
    rows = jnp.broadcast_to(template, (soft.shape[0], *template.shape[1:]))
    return clip.encode(text_graph, text_params, rows.at[:, 1 : 1 + soft.shape[1]].set(soft))


@partial(
    jax.jit,
    static_argnames=("unet_graph", "text_graph", "batch", "chunk", "remat"),
    donate_argnames=("soft", "opt_state"),
)
def _chunk(
    unet_graph,
    unet_params,
    text_graph,
    text_params,
    schedule: Schedule,
    template,
    z_0,
    soft,
    opt_state,
    key,
    first,
    steps,
    learning_rate,
    *,
    batch: int,
    chunk: int,
    remat: bool,
):
    """`chunk` steps: (soft, opt_state, losses (chunk, R))."""
    R, B = soft.shape[0], batch

    def draw(step):
        """Noised latents of random images, the same for every restart, so that restarts compare fairly."""
        key_i, key_t, key_n = jax.random.split(jax.random.fold_in(key, step), 3)
        t = jax.random.randint(key_t, (B,), 0, schedule.alphas_cumprod.shape[0])
        noise = jax.random.normal(key_n, (B, *z_0.shape[1:]))
        a = schedule.alphas_cumprod[t][:, None, None, None]
        z = z_0[jax.random.randint(key_i, (B,), 0, len(z_0))]
        return jnp.sqrt(a) * z + jnp.sqrt(1 - a) * noise, t, noise

    def losses(soft, z_t, t, noise):
        text_emb = jnp.repeat(_encode(text_graph, text_params, template, soft), B, axis=0)
        z_t, t = jnp.tile(z_t, (R, 1, 1, 1)), jnp.tile(t, R)
        eps = to_epsilon(schedule, unet.apply(unet_graph, unet_params, z_t, t, text_emb, remat=remat), z_t, t)
        return jnp.mean(jnp.square(eps.reshape(R, B, *noise.shape[1:]) - noise), axis=(1, 2, 3, 4))

    def step(carry, i):
        soft, opt_state = carry

        def total(soft):
            per_restart = losses(soft, *draw(first + i))
            return jnp.sum(per_restart), per_restart

        gradient, per_restart = jax.grad(total, has_aux=True)(soft)
        update, opt_state = _adam.update(gradient, opt_state)
        # Cosine decay: what is judged is the last iterate.
        rate = learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * (first + i) / steps))
        return (soft - rate * update, opt_state), per_restart

    (soft, opt_state), history = jax.lax.scan(step, (soft, opt_state), jnp.arange(chunk))
    return soft, opt_state, history


def starts(pipeline, config: SoftPromptConfig) -> jax.Array:
    """The soft tokens (R, k, d) that the restarts of an attack begin with."""
    key_start, _ = _keys(config)
    text, ids = pipeline.text_encoder, jnp.asarray(pipeline.tokenizer.word_ids, jnp.int32)
    return random_words(text.graph, text.params, ids, key_start, (config.restarts, config.tokens))


def _keys(config: SoftPromptConfig):
    """(key of the starts, key of the steps)."""
    return jax.random.split(jax.random.fold_in(jax.random.key(config.seed), _ATTACK))


def soft_prompt(pipeline, concept: str, images, config: SoftPromptConfig, progress=None, *, start=None) -> AttackResult:
    """Runs the attack; see `attacks.attack`. Raises `AegisError` if concept and soft tokens do not fit the encoder.

    start: soft tokens (R, k, d) to begin with, by default `starts`. A restart's result depends on its own start and
    the seed alone, so that restarts may be run one by one.
    """
    for name in ("tokens", "restarts", "steps", "batch", "learning_rate"):
        if not getattr(config, name) > 0:
            raise AegisError(f"attack soft_prompt: {name}={getattr(config, name)!r}, wanted more than 0")
    if not 0 <= config.seed < 2**32:
        raise AegisError(f"attack soft_prompt: seed={config.seed!r}, wanted 0 to 2**32 - 1")
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder
    ids = tokenizer.tokens(concept)
    length = tokenizer.model_max_length
    if len(ids) + config.tokens + 2 > length:
        raise AegisError(
            f"concept {concept[:40]!r} ({len(ids)} tokens) and {config.tokens} soft tokens exceed the "
            f"{length} positions of the text encoder; use fewer soft tokens"
        )
    row = [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * config.tokens + ids + [tokenizer.eos_token_id]
    row += [tokenizer.pad_token_id] * (length - len(row))
    template = clip.embed(text.graph, text.params, jnp.array([row], jnp.int32))
    key = _keys(config)[1]
    # A copy, because the first step takes the buffer over.
    soft = starts(pipeline, config) if start is None else jnp.array(start, jnp.float32)
    schedule = make_schedule(pipeline.scheduler)
    z_0 = encode_images(pipeline, images)
    chunk = math.gcd(config.steps, 10)  # steps per compiled call
    pixels = config.batch * math.prod(z_0.shape[1:3])
    together = max(1, PIXELS_PER_CALL // pixels)  # restarts
    groups = [soft[i : i + together] for i in range(0, len(soft), together)]
    found = []
    for number, soft in enumerate(groups):
        opt_state, history = _adam.init(soft), []
        for first in range(0, config.steps, chunk):
            soft, opt_state, losses = _chunk(
                pipeline.unet.graph,
                pipeline.unet.params,
                text.graph,
                text.params,
                schedule,
                template,
                z_0,
                soft,
                opt_state,
                key,
                jnp.int32(first),
                jnp.float32(config.steps),
                jnp.float32(config.learning_rate),
                batch=config.batch,
                chunk=chunk,
                remat=pixels > PIXELS_PER_CALL // 8,
            )
            history.append(np.asarray(losses))
            if progress:
                progress(number * config.steps + first + chunk, len(groups) * config.steps, float(history[-1].mean()))
        found.append((soft, np.concatenate(history)))
    soft, losses = (x[0] if len(x) == 1 else np.concatenate(x, axis) for x, axis in zip(zip(*found), (0, 1)))
    text_emb = _encode(text.graph, text.params, template, jnp.asarray(soft))
    return AttackResult(np.asarray(soft), text_emb, losses)


_encode_images = jax.jit(lambda graph, params, images: vae.encode(graph, params, images)[0], static_argnums=0)


def encode_images(pipeline, images, batch: int = 64) -> jax.Array:
    """uint8 images (m, H, W, 3) -> latents in the UNet's scale (m, h, w, 4): the mean of the VAE's posterior."""
    images = np.asarray(images)
    if not len(images) or images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise AegisError(f"images are {images.dtype} of shape {images.shape}, wanted uint8 (m, H, W, 3)")
    model, scale = pipeline.vae, pipeline.vae.config.get("scaling_factor", 0.18215)
    parts = [
        _encode_images(model.graph, model.params, images[i : i + batch].astype(np.float32) / 127.5 - 1)
        for i in range(0, len(images), batch)
    ]
    return jnp.concatenate(parts) * scale
