"""Revival: the erased model is fine-tuned on pictures that do not show the concept, and asked for it again on the way.

What an erasure has only covered comes back when the weights move for any other reason (Suriyakumar et al., 2410.08074;
Aladawi et al., 2604.21041). The training is the ordinary one of a diffusion model: a picture, its prompt, a timestep
and noise are drawn, and AdamW lowers the distance from the predicted noise to the noise, over all weights of the UNet.
Nobody who trains so need want the concept. What our sources leave open: docs/attacks.md.
Shapes: m pictures, B of a step, h w C latents, L tokens, D text width.
"""

import dataclasses
import math
import time
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.attacks.given import Given, check, key_of, take
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.numbers import numbers
from aegis_jax.attacks.result import ATTACK, FAILED, NOT_NEEDED, SUCCEEDED, TO_WEIGHTS, AttackResult
from aegis_jax.attacks.rows import Counter, per_call, viewer_of
from aegis_jax.diffusion.conditioning import encode
from aegis_jax.diffusion.predict import predict
from aegis_jax.diffusion.schedule import make_schedule, noised
from aegis_jax.errors import AegisError

NAME = "revival"
_REVIVAL = 0x4E71FE  # folded into the seed, so that no other part of the program draws the same numbers


@dataclasses.dataclass(frozen=True)
class RevivalConfig:
    """Rate and decay are those of an ordinary fine-tuning of Stable Diffusion."""

    looks: str = "50,100,200,500"  # steps after which the concept is asked for; before the first, too
    batch: int = 4
    learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    seed: int = 0

    positive: ClassVar[tuple] = ("batch", "learning_rate")

    def check(self, method: str, steps: int) -> None:
        numbers(method, "looks", self.looks, kind=int)


def draw(key, pictures: int, batch: int, timesteps: int, shape: tuple):
    """What a step takes, by its key alone: (which pictures (B,), t (B,), noise (B, h, w, C))."""
    key_i, key_t, key_n = jax.random.split(key, 3)
    return (
        jax.random.randint(key_i, (batch,), 0, pictures, jnp.int32),
        jax.random.randint(key_t, (batch,), 0, timesteps, jnp.int32),
        jax.random.normal(key_n, (batch, *shape), jnp.float32),
    )


def _optimiser(rate):
    """AdamW of (learning rate, weight decay)."""
    return optax.adamw(rate[0], weight_decay=rate[1])


# Weights and moments are given away: beside them there would be no room for their successors.
@partial(jax.jit, static_argnames=("graph", "batch", "remat"), donate_argnames=("params", "moments"))
def _step(params, moments, schedule, z_0, cond, key, i, rate, *, graph, batch: int, remat: bool):
    """Step i: (params, moments, loss). z_0 (m, h, w, C), cond: m rows, rate: see `_optimiser`."""
    timesteps, shape = len(schedule.alphas_cumprod), z_0.shape[1:]
    which, t, noise = draw(jax.random.fold_in(key, i), len(z_0), batch, timesteps, shape)
    z_t, said = noised(schedule, z_0[which], t, noise), take(cond, which)

    def loss_of(params):
        return jnp.mean(jnp.square(predict(graph, params, schedule, z_t, t, said, remat=remat) - noise))

    loss, gradient = jax.value_and_grad(loss_of)(params)
    update, moments = _optimiser(rate).update(gradient, moments, params)
    return optax.apply_updates(params, update), moments, loss


class Tuning:
    """A fine-tuning under way: `to(n)` trains up to step n; `pipeline` is what it is then."""

    def __init__(self, pipeline, given: Given, config: RevivalConfig, counter=None):
        self.first, self.config, self.counter = pipeline, config, counter
        self.z_0 = encode_images(pipeline, given.without.images)
        self.cond = encode(pipeline, given.without.prompts)
        # A copy: a step gives its weights away, and the pipeline's own are not ours to give.
        self.params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), pipeline.unet.params)
        self.rate = (jnp.float32(config.learning_rate), jnp.float32(config.weight_decay))
        self.moments = _optimiser(self.rate).init(self.params)
        self.key = key_of(config.seed, _REVIVAL)
        remat = per_call(1, config.batch * math.prod(self.z_0.shape[1:3]))[1]
        self.step = partial(_step, graph=pipeline.unet.graph, batch=config.batch, remat=remat)
        self.schedule, self.losses = make_schedule(pipeline.scheduler), []

    def to(self, steps: int) -> None:
        for i in range(len(self.losses), steps):
            self.params, self.moments, loss = self.step(
                self.params, self.moments, self.schedule, self.z_0, self.cond, self.key, jnp.int32(i), self.rate
            )
            self.losses.append(float(loss))
            if self.counter is not None:
                self.counter(1, self.losses[-1])
        if self.losses and not np.isfinite(self.losses[-1]):
            raise AegisError(f"attack {NAME}: the loss is not finite at step {steps}; take a lower learning_rate")

    @property
    def pipeline(self):
        return dataclasses.replace(self.first, unet=dataclasses.replace(self.first.unet, params=self.params))


def revival(pipeline, concept: str, given: Given, config: RevivalConfig, progress=None) -> AttackResult:
    """Fine-tunes on `given.without`, and shows the prompts at every look. Success: the prompt shows the concept at the
    last, and did not before the first step.

    Raises `AegisError` for settings that cannot be, and without pictures.
    """
    check(NAME, config, given.steps)
    looks = numbers(NAME, "looks", config.looks, kind=int)
    if given.without is None:
        raise AegisError(f"attack {NAME} needs pictures without the concept to fine-tune on; pass them (--without)")
    began = time.perf_counter()
    tuning = Tuning(pipeline, given, config, Counter(progress, looks[-1]))
    shown, cost = {}, looks[-1] * config.batch * (1 + TO_WEIGHTS)
    for steps in [0, *looks]:
        tuning.to(steps)
        viewer = viewer_of(tuning.pipeline, given, len(given.prompts))
        images = viewer(given.prompts, viewer.noise(given.seeds)) if given.judge or steps == looks[-1] else None
        if given.judge is not None:
            shown[f"{steps} steps"] = np.asarray(given.judge(images), bool)
        cost += viewer.unet_evaluations
    before, after = (list(shown.values())[k] for k in (0, -1)) if shown else (None, None)
    outcomes = shown and [NOT_NEEDED if old else SUCCEEDED if new else FAILED for old, new in zip(before, after)]
    return AttackResult(
        prompts=list(given.prompts),
        conditioning=encode(pipeline, given.prompts),
        losses=np.array(tuning.losses, np.float32)[:, None],
        unet_evaluations=cost,
        seconds=time.perf_counter() - began,
        outcomes=outcomes or None,
        levels={ATTACK: shown} if shown else {},
        images=images,
        pipeline=tuning.pipeline,
    )
