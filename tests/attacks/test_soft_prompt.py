"""The soft-prompt attack on tiny random pipelines: its losses against PyTorch in float64, and that rows are apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.attacks import attack, rows
from aegis_jax.attacks.prompt import template
from aegis_jax.attacks.result import BACKWARD
from aegis_jax.attacks.soft_prompt import HELD_OUT, SoftPromptConfig, _data, first_rows, networks, placed, soft_prompts
from aegis_jax.diffusion.conditioning import encode_soft
from aegis_jax.diffusion.schedule import noised
from aegis_jax.diffusion.vocabulary import embeddings
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline

pytest.importorskip("torch")

# One stage each way: what is compiled takes most of these tests' time.
UNET = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
FAST = SoftPromptConfig(tokens=2, restarts=2, steps=6, batch=4, seed=1, learning_rate=3e-2)
MEMBERS = {
    "before": FAST,
    "behind": dataclasses.replace(FAST, place="behind", goal="prediction", tokens=3, learning_rate=1e-2),
    "alone": dataclasses.replace(FAST, place="alone", goal="prediction", tokens=1, restarts=1),
    "neutral": dataclasses.replace(FAST, place="neutral", neutral="sky", tokens=4, restarts=1),
}


@pytest.fixture(scope="module")
def folders(tiny):
    return tiny(unet=UNET), tiny(unet=UNET, seed=1)  # under attack, and "before erasure"


@pytest.fixture(scope="module")
def pipelines(folders):
    erased, original = map(load_pipeline, folders)
    return erased, dataclasses.replace(original, vae=erased.vae)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def found(pipelines, images, progress):
    """All members in a call that they share."""
    erased, original = pipelines
    show = lambda *line: progress.append(line[:2])  # noqa: E731
    return soft_prompts(erased, "red star", images, MEMBERS, original=original, progress=show)


def torch_losses(folders, soft, place, z_t, t, noise):
    """{goal: (loss, gradient of soft)} of one unpadded row, by PyTorch in float64, over all images."""
    import torch

    from tests.parity import torch_aegis as reference

    erased, original = map(reference.load, folders)
    soft = torch.tensor(np.asarray(soft), dtype=torch.float64, requires_grad=True)
    tokenizer, embed = erased.tokenizer, lambda ids: reference.embed(erased.text_encoder, ids)
    concept, word = (tokenizer(text, add_special_tokens=False).input_ids for text in ("red star", "sky"))
    said = {
        "before": [soft, embed(concept)],
        "behind": [embed(concept), soft],
        "alone": [soft],
        "neutral": [soft, embed(word)],
    }[place]
    row = torch.cat([embed([tokenizer.bos_token_id]), *said, embed([tokenizer.eos_token_id])])
    row = torch.cat([row, embed([tokenizer.pad_token_id] * (77 - len(row)))])
    z_t, noise = (torch.tensor(np.asarray(x), dtype=torch.float64) for x in (z_t, noise))
    t = torch.tensor(np.asarray(t), dtype=torch.long)
    eps = reference.predict_noise(erased, z_t, t, reference.encode(erased.text_encoder, row[None]))
    with torch.no_grad():
        before = reference.predict_noise(original, z_t, t, reference.prompt_embedding(original, None, concept))
    losses = {}
    for goal, target in (("denoising", noise), ("prediction", before)):
        loss = (eps - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, soft, retain_graph=True)
        losses[goal] = loss.item(), gradient.numpy()
    return losses


def test_padded_rows_of_all_members_in_one_call_match_pytorch(folders, pipelines):
    erased, original = pipelines
    net = networks(erased, "red star", original)
    gaps = {
        name: template(erased.tokenizer, "red star", config.place, config.tokens, config.neutral)
        for name, config in MEMBERS.items()
    }
    batched = first_rows(erased, MEMBERS, gaps)
    # What lies in the padding must not matter.
    used = jnp.arange(batched.soft.shape[1])[None] <= batched.slots.max(1, keepdims=True)
    batched = dataclasses.replace(batched, soft=jnp.where(used[..., None], batched.soft, 7.0))
    rng = np.random.default_rng(0)
    z_0, noise = rng.standard_normal((2, 4, 8, 8, 4), np.float32)
    t = np.array([3, 400, 700, 990])
    z_t = noised(net.erased.schedule, z_0, t, noise)

    @jax.jit
    def losses(soft):
        target = rows.goal(net, batched, z_t, t, noise)
        return rows.distances(net, batched, soft, z_t, t, [target])[0].mean(0)

    per_row, pullback = jax.vjp(losses, batched.soft)
    (gradients,) = pullback(jnp.ones_like(per_row))
    both = np.asarray(rows._held_out(net, batched, z_0, t, noise)).mean(1)
    owners = [name for name, config in MEMBERS.items() for _ in range(config.restarts)]
    for r, name in enumerate(owners):
        config = MEMBERS[name]
        wanted = torch_losses(folders, batched.soft[r, : config.tokens], config.place, z_t, t, noise)
        loss, gradient = wanted[config.goal]
        np.testing.assert_allclose(per_row[r], loss, rtol=1e-5)
        np.testing.assert_allclose(both[:, r], [wanted["denoising"][0], wanted["prediction"][0]], rtol=1e-5)
        error = np.linalg.norm(gradients[r, : config.tokens] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-3
        assert not np.any(gradients[r, config.tokens :])


@pytest.mark.slow
def test_a_restart_does_not_depend_on_what_shares_its_calls(pipelines, images, found, monkeypatch):
    erased, original = pipelines
    monkeypatch.setattr(rows, "PIXELS_PER_CPU_CALL", 4 * 64)  # one row at a time
    alone = attack(erased, "red star", images=images, original=original, **vars(MEMBERS["behind"]))
    shared = found["behind"]
    np.testing.assert_allclose(alone.losses, shared.losses, rtol=1e-4)
    np.testing.assert_allclose(alone.soft_tokens, shared.soft_tokens, atol=1e-3)
    for goal in ("denoising", "prediction"):
        np.testing.assert_allclose(alone.held_out[goal], shared.held_out[goal], rtol=1e-4)
    assert alone.pick == shared.pick


def test_what_a_member_finds(pipelines, found):
    erased, _ = pipelines
    for name, config in MEMBERS.items():
        result = found[name]
        assert result.soft_tokens.shape[:2] == (config.restarts, config.tokens)
        assert result.losses.shape == (config.steps, config.restarts) and np.isfinite(result.losses).all()
        assert {goal: len(losses) for goal, losses in result.held_out.items()} == dict.fromkeys(
            ("denoising", "prediction"), config.restarts
        )
        assert result.pick == np.argmin(result.held_out[config.goal])
    said = {name: found[name].prompts[0] for name in MEMBERS}
    words = {"before": "<aegis> red star", "behind": "red star <aegis>", "alone": "<aegis>", "neutral": "<aegis> sky"}
    assert said == words and len(found["before"].prompts) == 2
    first, second = found["before"].soft_tokens
    assert not np.allclose(first, second)
    # What is fed to the UNet is what encoding the found tokens in the template gives.
    result, text = found["before"], erased.text_encoder
    row = embeddings(erased, result.template.ids)[None]
    again = encode_soft(text.graph, text.params, row, jnp.asarray(result.soft_tokens))
    np.testing.assert_allclose(result.conditioning.embedding, again.embedding, atol=1e-5)


def test_the_originals_predictions_are_counted_once_for_all_rows_of_a_call(found):
    per_row = 6 * 4 * (1 + BACKWARD) + HELD_OUT
    cost = {name: result.unet_evaluations for name, result in found.items()}
    assert sum(cost.values()) == pytest.approx(6 * per_row + 6 * 4 + HELD_OUT)  # six rows in one call
    assert cost["before"] == cost["behind"] == 2 * cost["alone"] == 2 * cost["neutral"]


@pytest.mark.slow
def test_restarts_descend_on_what_was_held_out(pipelines, images):
    erased, original = pipelines
    changes = {"goal": "prediction", "restarts": 6}  # as many rows as `found` has: the same program
    short, long = (
        attack(erased, "red star", images=images, original=original, **vars(FAST) | changes | {"steps": steps})
        for steps in (1, 40)
    )
    assert (long.held_out["prediction"] < short.held_out["prediction"]).all()


def test_the_draws_are_apart_and_every_image_has_its_turn(pipelines):
    erased, _ = pipelines
    z_0 = jnp.arange(8.0)[:, None, None, None] * jnp.ones((8, 2, 2, 4))
    data = _data(z_0, seed=0)
    assert not set(np.unique(data.train)) & set(np.unique(data.held_out))
    z, t, noise = rows.draws(data.held_out_key, data.held_out, HELD_OUT, 1000)
    assert set(np.bincount(np.asarray(z)[:, 0, 0, 0].astype(int), minlength=8)) == {0, HELD_OUT // 2}
    assert np.ptp(np.diff(np.sort(t))) <= 1 and 0 <= t.min() and t.max() <= 999  # evenly over the schedule
    for step in range(3):
        _, other_t, other = rows.draws(jax.random.fold_in(data.train_key, step), data.train, 4, 1000)
        assert not set(np.ravel(other)) & set(np.ravel(noise)) and len(set(np.asarray(other_t))) == 4


@pytest.mark.parametrize("partitionable", [True, False])
def test_where_a_restart_starts_does_not_depend_on_longer_ones_beside_it(pipelines, partitionable):
    members = {"short": FAST, "long": dataclasses.replace(FAST, tokens=12)}
    gaps = {name: placed(pipelines[0].tokenizer, "red star", config) for name, config in members.items()}
    with jax.threefry_partitionable(partitionable):
        alone = first_rows(pipelines[0], {"short": FAST}, gaps).soft
        beside = first_rows(pipelines[0], members, gaps).soft
    np.testing.assert_array_equal(beside[:2, :8], alone)
    assert beside.shape[1] == 12 and not beside[:2, 2:].any() and beside[2:].any(-1).all()


def test_progress_counts_every_step_of_every_restart(found, progress):
    assert progress == [(6 * step, 36) for step in range(1, 7)]


def test_a_single_picture_is_enough():
    data = _data(jnp.ones((1, 2, 2, 4)), seed=0)
    z, _, noise = rows.draws(data.held_out_key, data.held_out, HELD_OUT, 1000)
    assert len(data.train) == 1 and z.shape == noise.shape == (HELD_OUT, 2, 2, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "gcg"}, "attack method 'gcg' is unknown"),
        ({"step": 3}, "no setting 'step'"),
        ({"restarts": 0}, "restarts=0"),
        ({"seed": -1}, "seed=-1"),
        ({"tokens": 76}, "exceed the 77 positions"),
        ({"place": "around"}, "place='around' is unknown"),
        ({"goal": "clip"}, "goal='clip', wanted one of: denoising, prediction"),
        ({"goal": "prediction"}, "needs the model before erasure"),
        ({"images": np.zeros((2, 16, 16, 3))}, "wanted uint8"),
        ({"images": []}, "wanted uint8"),
    ],
)
def test_bad_input_is_named(pipelines, images, change, message):
    with pytest.raises(AegisError, match=message):
        attack(pipelines[0], "red star", **({"images": images} | change))


def test_an_original_with_another_schedule_is_refused(pipelines, images):
    erased, original = pipelines
    original = dataclasses.replace(original, scheduler=original.scheduler | {"beta_end": 0.02})
    with pytest.raises(AegisError, match="another noise schedule"):
        attack(erased, "red star", images=images, original=original)
