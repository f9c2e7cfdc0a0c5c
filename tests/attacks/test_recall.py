"""RECALL on a tiny random pipeline: its steps against PyTorch in float64, its looks and controls, what it counts."""

import jax
import numpy as np
import pytest

from aegis_jax.attacks import METHODS, attack, recall
from aegis_jax.attacks.given import Given
from aegis_jax.attacks.guided import OTHER_PICTURE, Drawer
from aegis_jax.attacks.recall import AS_IT_IS, LOOKS, NO_STEPS, RecallConfig, _Attack
from aegis_jax.attacks.result import ATTACK, FAILED, NOT_NEEDED, SUCCEEDED
from aegis_jax.diffusion.conditioning import encode
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from tests.tiny import FEWEST, responsive

torch = pytest.importorskip("torch")
PROMPTS = ["a red star", "star", "a star"]
SMALL = {"timesteps": 2, "iterations": 3, "learning_rate": 0.02, "interval": 2, "seed": 3}
HOW = {"prompts": PROMPTS, "seeds": [3, 4, 5], "image_steps": 5, "guidance": 3.0, "method": "recall"} | SMALL


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny(**FEWEST))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def without():
    return np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8), ["a dog", ""]


def test_steps_match_pytorch_in_float64(tiny, pipeline, images):
    from tests.attacks.test_search import louder
    from tests.parity import torch_aegis as reference

    ours, side = responsive(pipeline), louder(reference.load(tiny(**FEWEST)))
    config, given = RecallConfig(**SMALL), Given(images, PROMPTS, [0, 1, 2], steps=5, guidance=3.0)
    run = _Attack(Drawer(ours, given, 3), encode(ours, PROMPTS), images, config, 0.02, lambda *_: None)
    z_ref = torch.tensor(run.z_ref, dtype=torch.float64)
    adv, velocity = torch.tensor(run.adv, dtype=torch.float64), torch.zeros_like(z_ref)
    assert abs(np.std(run.adv - 0.25 * run.z_ref) - 0.75) < 0.05  # a quarter of the picture, the rest is noise
    run.run(np.ones(3, bool))
    with torch.no_grad():
        texts = [reference.prompt_embedding(side, None, reference.word_ids(side.tokenizer, text)) for text in PROMPTS]
        empty = reference.prompt_embedding(side, None, [])
    for phase, t in enumerate([250, 750]):  # the middles of two halves of the schedule
        a = side.alphas_cumprod[t]
        for i in range(3 * phase, 3 * phase + 3):
            for row in range(3):
                drawn = jax.random.normal(jax.random.fold_in(run.keys[row], i), z_ref.shape[1:])
                noise = torch.tensor(np.asarray(drawn), dtype=torch.float64)[None]
                mine = adv[row : row + 1].clone().requires_grad_(True)

                def predicted(z, row=row, noise=noise, a=a, t=t):
                    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
                    both = [reference.predict_noise(side, z_t, torch.tensor([t]), text) for text in (empty, texts[row])]
                    return torch.cat(both)

                with torch.no_grad():
                    goal = predicted(z_ref[row : row + 1])
                loss = (predicted(mine) - goal).square().mean()
                (gradient,) = torch.autograd.grad(loss, mine)
                gradient = gradient / (gradient.abs().mean() + 1e-8)
                velocity[row] = 0.9 * velocity[row] + gradient[0]
                adv[row] += 0.02 * velocity[row].sign()
                np.testing.assert_allclose(run.losses[i, row], loss.item(), rtol=2e-3)
    adv += 0.05 * z_ref  # after the second timestep
    # A sign is rounding's where the velocity is all but 0.
    assert np.mean(np.abs(run.adv - adv.numpy()) < 1e-3) > 0.98


def test_looks_and_controls_are_counted_apart(pipeline, images, without):
    answers = iter(
        [
            [True, False, False],  # the prompts alone
            [True, False], [False],  # of the two that are left: the picture as it is; the latent after one timestep
            [True],  # and after the next
            [False, False], [True, False], [False],  # the same without a gradient
            [False, False], [False, False], [False, False],  # and from a picture without the concept
        ]
    )  # fmt: skip
    sizes = []

    def judge(shown):
        sizes.append(len(shown))
        return np.array(next(answers))

    found = attack(pipeline, "star", images=images, without=without, judge=judge, **HOW)
    assert found.outcomes == [NOT_NEEDED, SUCCEEDED, SUCCEEDED]
    as_plain = {
        group: {level: hits.tolist() for level, hits in levels.items()} for group, levels in found.levels.items()
    }
    assert as_plain == {
        ATTACK: {AS_IT_IS: [True, True, False], LOOKS: [True, True, True]},
        NO_STEPS: {LOOKS: [True, True, False]},
        OTHER_PICTURE: {AS_IT_IS: [True, False, False], LOOKS: [True, False, False]},
    }
    assert sizes == [3, 2, 1, 1, 2, 2, 1, 2, 2, 2]
    assert found.first.tolist() == [0, 1, 1] and found.images.shape == images.shape
    assert np.isnan(found.losses[:, 0]).all() and np.isnan(found.losses[:, 1]).all()  # no step was needed
    steps = 6 + 2 * 6  # of the one row that was left, and of the control's two
    assert found.unet_evaluations == pytest.approx(steps * 2 * 3.08 + 3 * 5 * 2 + (2 + 1 + 1 + 5 + 6) * 4 * 2)


@pytest.mark.slow
def test_what_is_shown_is_what_latents_and_step_draw(tiny, pipeline, images):
    from tests.parity import torch_guided as guided

    silent = attack(pipeline, "star", images=images, **HOW)
    assert silent.outcomes is None and silent.levels == {} and silent.first.tolist() == [1] * 3
    pipe = guided.load(tiny(**FEWEST))
    for row in range(3):
        start = torch.from_numpy(silent.latents[row : row + 1]).permute(0, 3, 1, 2)
        z = guided.latents(pipe, PROMPTS[row], start, steps=5, guidance=3.0, first=1)
        assert np.abs(guided.image(pipe, z) - silent.images[row]).max() <= 2
    failed = attack(pipeline, "star", images=images, judge=lambda x: np.zeros(len(x), bool), **HOW)
    assert failed.outcomes == [FAILED] * 3 and OTHER_PICTURE not in failed.levels
    np.testing.assert_array_equal(failed.images, silent.images)
    down = attack(pipeline, "star", images=images, direction="descend", **HOW)
    assert down.losses[-1].mean() < silent.losses[-1].mean()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"direction": "up"}, "direction='up', wanted one of: ascend, descend"),
        ({"balance": 1.5}, "balance=1.5 and strength=0.8, wanted 0 to 1"),
        ({"strength": 0.1}, "strength=0.1, wanted 0 to 1, and a strength that leaves one of 5 steps"),
        ({"iterations": 0}, "iterations=0"),
        ({"timesteps": 2000}, "attack recall: timesteps=2000, but the schedule has 1000"),
    ],
)
def test_bad_input_is_named(pipeline, images, change, message):
    with pytest.raises(AegisError, match=message):
        attack(pipeline, "star", images=images, **HOW | change)


def test_defaults_are_the_published_ones():
    config = METHODS["recall"].config()
    published = (50, 20, 1e-3, 0.25, 5, 0.8, "ascend")
    assert tuple(vars(config).values())[:7] == published


def test_no_prompt_has_its_own_picture(pipeline, images):
    """The next one's by default, or what is given; one prompt alone has no other's, and that is said."""
    seen, config = [], RecallConfig(**SMALL)

    class Begun(Exception):
        pass

    def begun(drawer, cond, images, *args, **kwargs):
        seen.append(images)
        raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "_Attack", begun)
        for given in (
            Given(images, PROMPTS, [0, 1, 2], steps=5, guidance=3.0),
            Given(images[:1], PROMPTS[:1], [0], steps=5, guidance=3.0, beside=images[2:]),
        ):
            with pytest.raises(Begun):
                recall.recall(pipeline, "star", given, config)
        with pytest.warns(UserWarning, match="one prompt alone meets its own picture"), pytest.raises(Begun):
            recall.recall(pipeline, "star", Given(images[:1], PROMPTS[:1], [0], steps=5, guidance=3.0), config)
    for found, wanted in zip(seen, (images[[1, 2, 0]], images[2:], images[:1]), strict=True):
        np.testing.assert_array_equal(found, wanted)
