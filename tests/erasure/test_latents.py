"""Where z_t comes from, against diffusers' DDIM in float64 PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from aegis_jax.erasure import latents  # noqa: E402
from aegis_jax.erasure.config import EraseConfig, LatentsConfig  # noqa: E402
from aegis_jax.erasure.setup import freeze  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402

FAITHFUL = LatentsConfig()  # 50 steps at guidance 3, as the method's page has it
CONCEPTS = ["star", "red heart"]


@pytest.fixture(scope="module")
def frozen(pipeline):
    return freeze(pipeline, CONCEPTS, EraseConfig())


def guided_trajectory(folder, concept, z_T):
    """z after s = 0..49 steps of diffusers' DDIM at guidance 3, (50, B, h, w, C), from z_T (B, h, w, C)."""
    from diffusers import DDIMScheduler

    pipeline = torch_aegis.load(folder)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[[0, 1, -1]].tolist() == [981, 961, 1]
    z, visited = torch.tensor(np.asarray(z_T), dtype=torch.float64), []
    with torch.no_grad():
        c_e = torch_aegis.prompt_embedding(pipeline, None, torch_aegis.word_ids(pipeline.tokenizer, concept))
        c_0 = torch_aegis.prompt_embedding(pipeline, None, [])
        for t in scheduler.timesteps:
            visited.append(z.numpy())
            eps_0, eps_e = (torch_aegis.predict_noise(pipeline, z, t.repeat(len(z)), c) for c in (c_0, c_e))
            z = scheduler.step(eps_0 + 3.0 * (eps_e - eps_0), t, z).prev_sample
    return np.stack(visited)


def test_buffer_holds_whole_trajectories(frozen, folder):
    config = dataclasses.replace(FAITHFUL, refresh_every=0, trajectories=2)
    buffer = np.asarray(latents.fill(frozen, frozen.unet, jax.random.key(3), config=config))
    assert buffer.shape == (2, 50, 2, 8, 8, 4)
    for concept, ours in zip(CONCEPTS, buffer, strict=True):
        wanted = guided_trajectory(folder, concept, ours[0])
        np.testing.assert_allclose(ours, wanted, atol=1e-4 * np.abs(wanted).max())
    starts = buffer[:, 0].reshape(4, -1)
    assert np.abs(np.corrcoef(starts) - np.eye(4)).max() < 0.4  # four independent draws
    assert 0.8 < starts.std() < 1.2


def test_fresh_draw_is_a_partial_trajectory(frozen, folder, monkeypatch):
    """After s steps z_t is entry s of the trajectory from its own noise, and t lies in tau - 1 .. tau + 18."""
    noise = jax.random.normal(jax.random.key(9), (2, 8, 8, 4))
    monkeypatch.setattr(latents, "_noise", lambda frozen, key, n: noise)
    draw = jax.jit(latents.fresh.__wrapped__, static_argnames=("batch", "config"))
    trajectory = guided_trajectory(folder, "red heart", noise)
    seen = set()
    for seed in range(12):
        z_t, t, s = draw(frozen, frozen.unet, frozen.concept_emb[1], jax.random.key(seed), batch=2, config=FAITHFUL)
        s = int(s)
        np.testing.assert_allclose(z_t, trajectory[s], atol=1e-4 * np.abs(trajectory[s]).max())
        assert np.all((np.asarray(t) >= 980 - 20 * s) & (np.asarray(t) <= 999 - 20 * s))
        seen.add(s)
    assert len(seen) > 6


def test_draws_cover_their_ranges():
    """s is uniform over 0..49, and t over the 20 values from tau - 1 to tau + 18."""
    t = np.asarray(latents._draw_t(jax.random.key(0), 3, 4000, 20, FAITHFUL))
    offsets, counts = np.unique(t - (981 - 20 * 3), return_counts=True)
    np.testing.assert_array_equal(offsets, np.arange(-1, 19))
    assert counts.min() > 140 and counts.max() < 260  # 200 each, give or take 4 deviations


def test_buffer_draws_and_refresh(frozen):
    """Draws come from the buffer of their concept, which alone is redrawn at every R-th visit and not before."""
    config = LatentsConfig(steps=5, refresh_every=3, trajectories=2)
    key = jax.random.key
    buffer = latents.fill(frozen, frozen.unet, key(0), config=config)
    for visit in range(7):
        before, one = np.asarray(buffer), (jnp.array([1]), jnp.array([visit]))
        z_t, t, s, buffer = latents.buffered(frozen, frozen.unet, buffer, *one, key(visit), batch=3, config=config)
        after, s, t = np.asarray(buffer), np.asarray(s), np.asarray(t)
        assert after[0].tobytes() == before[0].tobytes()
        assert (after[1].tobytes() != before[1].tobytes()) == (visit in (3, 6))
        for z, step, timestep in zip(np.asarray(z_t), s, t, strict=True):
            assert any(z.tobytes() == entry.tobytes() for entry in after[1, step])
            assert 200 * (4 - step) <= timestep < 200 * (5 - step)


def test_buffer_of_a_mixed_batch(frozen):
    """Latent i comes from its concept's set; with two concepts in a batch a set serves twice as many steps."""
    config = LatentsConfig(steps=5, refresh_every=3, trajectories=2)
    key = jax.random.key
    buffer = latents.fill(frozen, frozen.unet, key(0), config=config)
    dealt = [1, 0, 1]  # concepts of the latents
    for visits in [(0, 0), (3, 3), (6, 5), (6, 6)]:
        before = np.asarray(buffer)
        two = jnp.array([1, 0]), jnp.array(visits), key(sum(visits))
        z_t, _, s, buffer = latents.buffered(frozen, frozen.unet, buffer, *two, batch=3, config=config)
        after = np.asarray(buffer)
        for concept, visit in zip((1, 0), visits, strict=True):
            assert (after[concept].tobytes() != before[concept].tobytes()) == (visit == 6)
        assert not np.array_equal(after[0, 0], after[1, 0])  # noise of its own for each
        for z, concept, step in zip(np.asarray(z_t), dealt, np.asarray(s), strict=True):
            assert any(z.tobytes() == entry.tobytes() for entry in after[concept, step])
