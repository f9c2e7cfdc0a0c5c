"""Where z_t comes from, against DDIM written in NumPy around diffusers' UNet, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from aegis_jax.erasure import latents  # noqa: E402
from aegis_jax.erasure.aegis.config import EraseConfig  # noqa: E402
from aegis_jax.erasure.aegis.setup import freeze  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402

CONCEPTS = ["star", "red heart"]
STEPS, GUIDANCE, TIMESTEPS = 50, 3.0, 1000  # the method's page


@pytest.fixture(scope="module")
def frozen(pipeline):
    return freeze(pipeline, CONCEPTS, EraseConfig())


@pytest.fixture(scope="module")
def ddim(folder):
    """ddim(concept, z_T, first=981) -> z after 0, 1, 2, ... guided steps from `first` on, (steps + 1, B, h, w, C)."""
    pipeline = torch_aegis.load(folder)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS) ** 2
    alphas = np.cumprod(1 - betas)

    def text(words):
        return torch_aegis.prompt_embedding(pipeline, None, torch_aegis.word_ids(pipeline.tokenizer, words))

    def trajectory(concept, z_T, first=981):
        z = np.asarray(z_T, np.float64)
        visited = [z]
        with torch.no_grad():
            prompts = text(""), text(concept)
            for t in range(first, 0, -TIMESTEPS // STEPS):
                at = torch.tensor(z), torch.full((len(z),), t)
                eps_0, eps_c = (torch_aegis.predict_noise(pipeline, *at, c).numpy() for c in prompts)
                eps = eps_0 + GUIDANCE * (eps_c - eps_0)
                a, before = alphas[t], alphas[max(t - TIMESTEPS // STEPS, 0)]  # set_alpha_to_one=false: the end is a_0
                z = np.sqrt(before) * (z - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - before) * eps
                visited.append(z)
        return np.stack(visited)

    return trajectory


def rows(tree, chosen):
    return jax.tree.map(lambda x: x[jnp.asarray(chosen)], tree)


def close(found, wanted):
    return np.abs(np.asarray(found) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def watch_noise(monkeypatch, noise):
    """Draws start from given noise; returns the two kinds of draw compiled anew, with that in them."""
    monkeypatch.setattr(latents, "_noise", lambda frozen, key, n: noise)
    fresh = jax.jit(latents.fresh.__wrapped__, static_argnames=("batch", "steps", "offset"))
    pooled = jax.jit(latents.pooled.__wrapped__, static_argnames=("batch", "refresh_every", "offset"))
    return fresh, pooled


def test_a_fresh_draw_is_a_partial_trajectory(frozen, ddim, monkeypatch):
    """At grid position i lies z after i steps, trained at t in tau_i - 1 .. tau_i + 18."""
    noise = jax.random.normal(jax.random.key(9), (2, 8, 8, 4))
    fresh, _ = watch_noise(monkeypatch, noise)
    trajectory, seen = ddim("red heart", noise), set()
    for seed in range(12):
        cond = rows(frozen.concept_emb, [1])
        at, i = fresh(frozen, frozen.unet, cond, jax.random.key(seed), batch=2, steps=STEPS, offset=False)
        i, t = int(i), np.asarray(at.t)
        assert close(at.z, trajectory[i])
        assert at.t.dtype == jnp.int32 and np.all((t >= 980 - 20 * i) & (t <= 999 - 20 * i))
        seen.add(i)
    assert len(seen) > 6


def test_the_released_quirk(frozen, ddim, monkeypatch):
    """With the offset z has made s steps from 961 on, so that its level is 961 - 20 s, and t lies 39 to 58 above it.

    The released loop draws k evenly and takes s = 50 - k steps and t from 20 k .. 20 k + 19; for k = 0 there is no
    50th step: s = 49, and t lies 19 to 38 above.
    """
    noise = jax.random.normal(jax.random.key(9), (2, 8, 8, 4))
    fresh, _ = watch_noise(monkeypatch, noise)
    trajectory, seen = ddim("star", noise, first=961), set()
    assert len(trajectory) == 50  # 0 to 49 steps
    draws = jax.jit(jax.vmap(lambda n: jax.random.randint(jax.random.split(jax.random.key(n), 3)[0], (), 0, STEPS)))
    last = int(np.argmax(draws(np.arange(1000)) == STEPS - 1))  # a seed for k = 0, which comes once in 50
    for seed in (*range(8), last):
        cond = rows(frozen.concept_emb, [0])
        at, _ = fresh(frozen, frozen.unet, cond, jax.random.key(seed), batch=2, steps=STEPS, offset=True)
        (s,) = [s for s, z in enumerate(trajectory) if close(at.z, z)]
        k = np.asarray(at.t) // 20
        assert np.all(k == k[0]) and s == (50 - k[0] if k[0] else 49)
        above = np.asarray(at.t) - (961 - 20 * s)
        assert np.all((above >= 39) & (above <= 58)) if k[0] else np.all((above >= 19) & (above <= 38))
        seen.add(int(k[0]))
    assert 0 in seen and len(seen) > 5


@pytest.mark.parametrize("offset", [False, True])
def test_a_pool_holds_whole_trajectories(frozen, ddim, monkeypatch, offset):
    """Of each concept, as many steps done at each grid position as a fresh draw has done there."""
    noise = jax.random.normal(jax.random.key(4), (2, 8, 8, 4))
    _, pooled = watch_noise(monkeypatch, noise)
    pool = latents.empty_pool(frozen, 2, 2, STEPS)
    assert pool.z.shape == (2, STEPS, 2, 8, 8, 4)
    both = jnp.array([0, 1])
    at, i, pool = pooled(
        frozen, frozen.unet, pool, frozen.concept_emb, both, jnp.zeros(2, jnp.int32), jax.random.key(0),
        batch=2, refresh_every=5, offset=offset,
    )  # fmt: skip
    assert pool.drawn.all()
    done = [min(n + 1, 49) for n in range(STEPS)] if offset else range(STEPS)
    for concept, ours in zip(CONCEPTS, np.asarray(pool.z), strict=True):
        wanted = ddim(concept, noise, first=961 if offset else 981)
        assert close(ours, wanted[list(done)])
    for z, t, n, of in zip(np.asarray(at.z), np.asarray(at.t), np.asarray(i), (0, 1)):
        assert any(z.tobytes() == entry.tobytes() for entry in np.asarray(pool.z)[of, n])
        assert 20 * (49 - n) <= t < 20 * (50 - n)


def test_trajectories_start_from_noise_of_their_own(frozen):
    pool = latents.empty_pool(frozen, 2, 99, 4)
    assert pool.z.shape[2] == latents.TRAJECTORIES == 8
    _, _, pool = latents.pooled(
        frozen, frozen.unet, pool, frozen.concept_emb, jnp.array([0, 1]), jnp.zeros(2, jnp.int32), jax.random.key(0),
        batch=2, refresh_every=5, offset=False,
    )  # fmt: skip
    starts = np.asarray(pool.z)[:, 0].reshape(16, -1)
    assert np.abs(np.corrcoef(starts) - np.eye(16)).max() < 0.4
    assert 0.8 < starts.std() < 1.2


def test_draws_cover_their_ranges(frozen):
    """t is uniform over the 20 values from tau - 1 to tau + 18."""
    at = latents.noised(frozen, jax.random.key(0), jnp.zeros((4000, 1, 1, 1)), 3, STEPS)
    offsets, counts = np.unique(np.asarray(at.t) - (981 - 20 * 3), return_counts=True)
    np.testing.assert_array_equal(offsets, np.arange(-1, 19))
    assert counts.min() > 140 and counts.max() < 260  # 200 each, give or take 4 deviations


@pytest.mark.parametrize(("levels", "above", "positions"), [("grid", 0, range(5)), ("above", 199, range(1, 4))])
def test_other_levels(frozen, levels, above, positions):
    """The grid's own timestep, and STEREO's: int(k / n * 1000) of 1000 timesteps down from 1000, for inner k alone."""
    tau = 1 + 200 * np.arange(4, -1, -1)  # 5 steps: 801, 601, ..., 1
    pool = latents.empty_pool(frozen, 1, 2, 5)
    cond = rows(frozen.concept_emb, [0])
    which = cond, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32), jax.random.key(3)
    how = {"batch": 400, "refresh_every": 9, "levels": levels}
    at, i, _ = latents.pooled.__wrapped__(frozen, frozen.unet, pool, *which, **how)
    assert set(np.asarray(i).tolist()) == set(positions)
    np.testing.assert_array_equal(at.t, tau[np.asarray(i)] + above)
    if levels == "above":
        np.testing.assert_array_equal(at.t, 1000 - np.asarray(i) * 1000 // 5)


def pool_of_five(frozen):
    return latents.empty_pool(frozen, 2, 2, 5)


def draw(frozen, pool, concepts, visits, key):
    cond = rows(frozen.concept_emb, concepts)
    which = jnp.array(concepts), jnp.array(visits, jnp.int32), jax.random.key(key)
    return latents.pooled(frozen, frozen.unet, pool, cond, *which, batch=3, refresh_every=3, offset=False)


def test_a_pool_is_drawn_at_the_first_turn_and_again_after_its_batches(frozen):
    """Of the concept whose turn it is alone: at its visits 0, 3 and 6, and from it come all of the batch."""
    pool = pool_of_five(frozen)
    for visit in range(7):
        before = np.asarray(pool.z).copy()
        at, i, pool = draw(frozen, pool, [1], [visit], visit)
        after = np.asarray(pool.z)
        assert np.asarray(pool.drawn).tolist() == [False, True]
        assert after[0].tobytes() == before[0].tobytes() and not after[0].any()
        assert (after[1].tobytes() != before[1].tobytes()) == (visit in (0, 3, 6))
        for z, n, t in zip(np.asarray(at.z), np.asarray(i), np.asarray(at.t), strict=True):
            assert any(z.tobytes() == entry.tobytes() for entry in after[1, n])
            assert 200 * (4 - n) <= t < 200 * (5 - n)


def test_a_pool_that_was_never_drawn_is_drawn_at_any_visit(frozen):
    _, _, pool = draw(frozen, pool_of_five(frozen), [0], [5], 1)
    assert np.asarray(pool.drawn).tolist() == [True, False] and np.asarray(pool.z)[0, 0].any()


def test_a_pool_of_a_mixed_batch(frozen):
    """Latent i comes from its concept's trajectories; with two concepts in a batch they serve twice as many steps."""
    pool, dealt = pool_of_five(frozen), [1, 0, 1]
    for visits, drawn in [((0, 0), {0, 1}), ((3, 3), set()), ((6, 5), {1}), ((7, 6), {0})]:
        before = np.asarray(pool.z).copy()
        at, i, pool = draw(frozen, pool, [1, 0], visits, sum(visits))
        after = np.asarray(pool.z)
        assert {k for k in (0, 1) if after[k].tobytes() != before[k].tobytes()} == drawn
        assert not np.array_equal(after[0, 0], after[1, 0])  # noise of its own for each
        for z, concept, n in zip(np.asarray(at.z), dealt, np.asarray(i), strict=True):
            assert any(z.tobytes() == entry.tobytes() for entry in after[concept, n])
