"""The concept among random words (`words.context`): which latents are erased so, towards what, and how hard. Not in
the paper (docs/method.md).

For random words w and the same words with the concept among them, w + c, let d = eps0(w + c) - eps0(w) be what the
concept adds for theta0. The goal of theta's prediction for w + c is

  eps0(w) - eta (eps0(c') - eps0(c_0)) - kappa d

with kappa = 0, unless `words.context` is "push" or "shown". Preserving w and erasing w + c pull at the same weights,
and where they balance depends on the concept: some are gone with kappa = 0, of others a good part is left. So kappa >=
0 is the multiplier of a constraint and follows it by dual ascent. With "push", that nothing of d be left in theta's
prediction:

  share = sum_i <eps(w + c) - eps0(w), d>_i / e_i  over  sum_i <d, d>_i / e_i,   kappa += rate share

over the latents i in context, each divided by its e_i = <d, d>_i + a floor: at noisy timesteps, where objects are
decided, a concept may add a hundredth of what it adds later. In the first two thirds of a run kappa rests: what goes by
itself takes that long, and what kappa pushes past 0 meanwhile more attacks bring back (docs/study_first_reading.md).

With "shown", that no trajectory show the concept: the share is that of the latents whose trajectory does (shown.py),
these alone are pushed by kappa d, all by d, and kappa moves from the first step on.

Shapes: B latents, G prompts of the batch, K concepts, L tokens, D text width.
"""

from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.conditioning import per_latent
from aegis_jax.erasure.aegis.state import Goal
from aegis_jax.erasure.aegis.words import Words
from aegis_jax.erasure.programs import program

# Settled on the embedded world (docs/study_first_reading.md, RATE_SHOWN: docs/study.md), and only there.
RATE = 0.5  # rise of kappa per step while all of the concept is left
RATE_SHOWN = 0.1  # the same while all trajectories show it
_EVERYWHERE = 1.0  # of d, by which trajectories that do not show it are pushed too, so that they stay so
_MOST = 10.0  # kappa's limit: what cannot be erased is not to ruin the rest
_FLOOR = 3e-5  # of e_i, a mean square: less the concept does not add in a prompt that shows it


@program(static_argnames=("prompt_count", "batch"))
def whose_turn(step, prompts, *, prompt_count: int, batch: int):
    """Which latents of a batch are in context, (B,) bool: every other one of each prompt; prompts: (G,) of
    prompt_count."""
    visit = (step * batch + jnp.arange(batch, dtype=jnp.int32)) // prompt_count
    return (per_latent(prompts, batch) + visit) % 2 == 0


@program
def chosen(inside, here, there):
    """`here`, a tree of B rows, for latents in context, `there`, another, for the rest; inside: (B,)."""
    return jax.tree.map(lambda x, y: jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), x, y), here, there)


@program
def in_context(inside, prompts, goal: Goal, push, words: Words, kappa, shown) -> Goal:
    """The goal (B rows): of the latents in context the one among random words, with the target's push as elsewhere.

    inside: (B,); prompts: (G,); goal: with G rows; its eps without the push (B, h, w, C), which is added here; kappa:
    (K,), or None where it does not move; shown: what of it each latent is pushed by, (B,), or None for all.
    """
    batch = len(goal.eps)
    eps_words = words.eps
    if kappa is not None:
        strength = per_latent(kappa[prompts % len(kappa)], batch)
        strength = strength if shown is None else _EVERYWHERE + strength * shown
        eps_words = eps_words - _per_pixel(strength) * words.added
    here, there = Goal(words.joined, eps_words), Goal(per_latent(goal.cond, batch), goal.eps)
    found = chosen(inside, here, there)
    return Goal(found.cond, found.eps + push)


@partial(jax.jit, static_argnames="steps")
def rate_now(step, *, steps: int):
    """The rate at which kappa moves in this step of `steps`."""
    return jnp.where(step >= 2 * steps // 3, jnp.float32(RATE), 0.0)


@program
def next_kappa(kappa, prompts, inside, eps, words: Words, rate):
    """(kappa (K,), share): one step of dual ascent. A concept without a latent in context keeps its own; the share is
    that of all concepts together, 0 if no latent is in context.

    eps: theta's predictions for the words with the concept, (B, h, w, C), where `inside` (B,).
    """
    d, eps_words = words.added, words.eps
    dot = lambda x: jnp.mean(x * d, (1, 2, 3))  # noqa: E731
    weight = inside.astype(jnp.float32) / (dot(d) + _FLOOR)
    return _risen(kappa, prompts, weight * dot(eps - eps_words), weight * dot(d), rate)


@program
def next_kappa_shown(kappa, prompts, inside, shown):
    """The same by what trajectories show, `shown` (B,) of the latents `inside`."""
    whole = inside.astype(jnp.float32)
    return _risen(kappa, prompts, whole * shown, whole, RATE_SHOWN)


def _risen(kappa, prompts, left, before, rate):
    """kappa raised by the share of each concept, what its latents have left of what they had before, (B,) each."""
    batch = len(left)
    mine = per_latent(prompts % len(kappa), batch) == jnp.arange(len(kappa), dtype=jnp.int32)[:, None]
    own = mine.astype(jnp.float32)  # (K, B); numbers, since strict dtype promotion multiplies no truths
    left, before = own @ left, own @ before
    share = left / jnp.maximum(before, 1e-6)
    moved = jnp.clip(kappa + rate * share, 0.0, _MOST)
    return jnp.where(before > 0, moved, kappa), left.sum() / jnp.maximum(before.sum(), 1e-6)


def _per_pixel(x):
    return x[:, None, None, None]
