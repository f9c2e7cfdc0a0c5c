"""The probes on tiny random pipelines: against PyTorch diffusers, what each control is drawn from, what is refused."""

import dataclasses

import numpy as np
import pytest

from aegis_jax.attacks import METHODS, attack
from aegis_jax.attacks.given import Given, case_numbers
from aegis_jax.attacks.guided import NO_MODEL, NO_TEXT, OTHER_PICTURE, Drawer
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.result import ATTACK, FAILED, NOT_NEEDED, SUCCEEDED
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from tests.tiny import FEWEST

torch = pytest.importorskip("torch")
PROMPTS = ["a red star", "star"]
HOW = {"prompts": PROMPTS, "seeds": [3, 4], "image_steps": 5, "guidance": 3.0}


@pytest.fixture(scope="module")
def folders(tiny):
    return tiny(**FEWEST), tiny(**FEWEST, seed=1)  # under attack, and "before erasure"


@pytest.fixture(scope="module")
def pipelines(folders):
    erased, original = map(load_pipeline, folders)
    return erased, dataclasses.replace(original, vae=erased.vae)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def without():
    return np.random.default_rng(1).integers(0, 256, (1, 16, 16, 3), np.uint8), ["a dog"]


class Judge:
    """Remembers what it saw; sees the concept in what it was told to."""

    def __init__(self, *hits):
        self.hits, self.seen = list(hits), []

    def __call__(self, images):
        self.seen.append(images)
        return np.array(self.hits.pop(0)) if self.hits else np.zeros(len(images), bool)


def channels_first(x):
    return torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def side(folders):
    from tests.parity import torch_guided

    return torch_guided, *map(torch_guided.load, folders)


def test_noised_pictures_are_drawn_on_as_diffusers_does(side, pipelines, images, without):
    guided, pipe, _ = side
    judge = Judge()
    found = attack(
        pipelines[0], "star", method="noise-probe", images=images, without=without, judge=judge, levels="0.4,0.8", **HOW
    )
    assert list(found.levels) == [ATTACK, NO_TEXT, NO_MODEL, OTHER_PICTURE]
    assert list(found.levels[ATTACK]) == ["t=201", "t=601"]  # 2 and 4 of 5 steps are left
    assert found.first.tolist() == [1, 1] and len(judge.seen) == 2 * 4 + 1
    z_0, other = (channels_first(encode_images(pipelines[0], x)) for x in (images, np.repeat(without[0], 2, 0)))
    how = {"steps": 5, "guidance": 3.0, "first": 1}
    pipe.scheduler.set_timesteps(5)
    a = pipe.scheduler.alphas_cumprod[601]
    noise = (channels_first(found.latents) - a.sqrt() * z_0) / (1 - a).sqrt()
    assert abs(float(noise.std()) - 1) < 0.15 and abs(float(noise.mean())) < 0.15
    wanted = {4: (found.prompts, z_0), 5: (["", ""], z_0), 7: (found.prompts, other)}
    for call, (texts, start) in wanted.items():
        for row in range(2):
            z = a.sqrt() * start[row : row + 1] + (1 - a).sqrt() * noise[row : row + 1]
            made = guided.image(pipe, guided.latents(pipe, texts[row], z, **how))
            assert np.abs(made - judge.seen[call][row]).max() <= 2
    alone = guided.image(pipe, channels_first(found.latents)[:1] / a.sqrt())
    assert np.abs(alone - judge.seen[6][0]).max() <= 2
    np.testing.assert_array_equal(found.images, judge.seen[4])
    assert found.unet_evaluations == 3 * 2 * (2 + 4) * 2 + 2 * 5 * 2


def test_the_original_begins_and_the_erased_model_completes(side, pipelines, images, without):
    guided, pipe, base = side
    judge = Judge()
    control = ["a red thing", "thing"]
    found = attack(
        pipelines[0], "star", method="completion-probe", images=images, without=without, judge=judge,
        original=pipelines[1], levels="0.2,0.4", **HOW | {"prompts": control}, made_from=PROMPTS,
    )  # fmt: skip
    assert list(found.levels[OTHER_PICTURE]) == ["2 of 5 steps", "1 of 5 steps"] and found.first.tolist() == [1, 1]
    numbers = case_numbers(Given(images, PROMPTS, HOW["seeds"]))
    rngs = [np.random.default_rng([0x940BE5, 0, number]) for number in numbers]  # what the probe draws its noise from
    noise = channels_first([rng.standard_normal(found.latents.shape[1:], np.float32) for rng in rngs])
    for row in range(2):
        how = {"steps": 5, "guidance": 3.0}
        begun = guided.latents(
            base, PROMPTS[row], noise[row : row + 1], last=1, **how
        )  # what was named, by a control too
        np.testing.assert_allclose(channels_first(found.latents)[row], begun[0], atol=1e-4)
        made = guided.image(pipe, guided.latents(pipe, control[row], begun, first=1, **how))
        assert np.abs(made - found.images[row]).max() <= 2
        other = guided.latents(base, "a dog", noise[row : row + 1], last=1, **how)
        made = guided.image(pipe, guided.latents(pipe, control[row], other, first=1, **how))
        assert np.abs(made - judge.seen[7][row]).max() <= 2


def test_the_known_half_stays_and_the_rest_is_drawn_as_diffusers_would(side, pipelines, images, without):
    guided, pipe, _ = side
    judge = Judge([True, False], *[[False, False]] * 3, [False, True], *[[False, False]] * 3, [False, False])
    found = attack(
        pipelines[0], "star", method="inpainting-probe", images=images, without=without, judge=judge,
        masks="left,bottom", **HOW,
    )  # fmt: skip
    assert found.outcomes == [SUCCEEDED, SUCCEEDED]  # the first by its left half, the second by its bottom half
    known = tuple(channels_first(getattr(found.known, name)) for name in ("mask", "z_0", "noise"))
    assert known[0][0, 0, :, : known[0].shape[-1] // 2].all() and known[0][0].mean() == 0.5 == known[0][1].mean()
    assert known[0][1, 0, known[0].shape[-2] // 2 :].all()
    for row in range(2):
        mine = tuple(x[row : row + 1] for x in known)
        start = channels_first(found.latents)[row : row + 1]
        z = guided.latents(pipe, PROMPTS[row], start, steps=5, guidance=3.0, known=mine)
        assert np.abs(guided.image(pipe, z) - found.images[row]).max() <= 2
        np.testing.assert_allclose(z * mine[0], mine[1] * mine[0])  # the known half is the picture's own at the end
    grey = judge.seen[2]  # what is given, without a model
    assert (grey[:, :, 8:] == 127).all() and (grey[:, :, :8] == images[:, :, :8]).all()


def test_what_the_prompt_alone_shows_needs_no_attack(pipelines, images):
    judge = Judge([False, True], [False, False], [False, False], [True, False])
    found = attack(pipelines[0], "star", method="noise-probe", images=images, judge=judge, levels="0.4", **HOW)
    assert found.outcomes == [NOT_NEEDED, SUCCEEDED] and found.first.tolist() == [0, 3]
    np.testing.assert_array_equal(found.images[0], judge.seen[3][0])
    failed = attack(pipelines[0], "star", method="noise-probe", images=images, judge=Judge(), levels="0.4", **HOW)
    assert failed.outcomes == [FAILED] * 2 and OTHER_PICTURE not in failed.levels
    silent = attack(pipelines[0], "star", method="noise-probe", images=images, levels="0.4", **HOW)
    assert silent.outcomes is None and silent.levels == {}
    np.testing.assert_array_equal(silent.images, failed.images)


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("noise-probe", {"levels": "0.5,1.5"}, "levels='0.5,1.5', wanted ascending numbers above 0 and at most 1"),
        ("completion-probe", {}, "needs the model before erasure"),
        ("completion-probe", {"levels": "1", "original": True}, "leave the erased model no step of 5"),
        ("inpainting-probe", {"masks": "left,middle"}, "masks='left,middle', wanted some of left, right, top, bottom"),
        ("inpainting-probe", {"seed": -1}, "seed=-1"),
        ("noise-probe", {"images": np.zeros((2, 8, 8, 3), np.uint8)}, "pictures are 8x8, but the model draws 16x16"),
    ],
)
def test_bad_input_is_named(pipelines, images, method, change, message):
    change = change | ({"original": pipelines[1]} if change.get("original") else {})
    with pytest.raises(AegisError, match=message):
        attack(pipelines[0], "star", method=method, **HOW | {"images": images} | change)


def test_probes_say_their_prompts_and_take_pictures_without_the_concept():
    for name in ("noise-probe", "completion-probe", "inpainting-probe", "recall"):
        assert METHODS[name].says and METHODS[name].without and METHODS[name].of == "guided"


def test_noise_alone_is_what_a_picture_is_at_zero_terminal_snr(tiny, images):
    scheduler = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    pipeline, judge = load_pipeline(tiny(**FEWEST, v_prediction=True, scheduler=scheduler)), Judge()
    how = {"prompts": PROMPTS, "image_steps": 2, "guidance": 1.0}
    found = attack(pipeline, "star", method="noise-probe", images=images, judge=judge, levels="1", **how)
    assert list(found.levels[NO_MODEL]) == ["t=999"] and found.first.tolist() == [0, 0]
    assert abs(float(found.latents.std()) - 1) < 0.15
    given = Given(images, PROMPTS, [0, 1])
    np.testing.assert_array_equal(judge.seen[2], Drawer(pipeline, given, 2).images(found.latents))
