"""Searches for words on tiny random pipelines: steps against PyTorch in float64, who ends when, what is replayed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.attacks import METHODS, attack
from aegis_jax.attacks.given import Given
from aegis_jax.attacks.prompt import INSERTIONS, inserted
from aegis_jax.attacks.result import BACKWARD, FAILED, NOT_NEEDED, SUCCEEDED
from aegis_jax.attacks.search import DRAWN, Plan, Search, ascending
from aegis_jax.attacks.spaces import Nearest, Simplex
from aegis_jax.diffusion.sample import latent_shape, noise_of
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from tests.tiny import FEWEST, responsive

torch = pytest.importorskip("torch")
PROMPTS = ["a red star", "a photo of a cat", "star"]
SMALL = {"timesteps": 3, "iterations": 2, "tokens": 2}


@pytest.fixture(scope="module")
def folders(tiny):
    return tiny(**FEWEST), tiny(**FEWEST, seed=1)  # under attack, and "before erasure"


@pytest.fixture(scope="module")
def pipelines(folders):
    erased, original = map(load_pipeline, folders)
    return responsive(erased), dataclasses.replace(responsive(original), vae=erased.vae)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def louder(pipeline):
    """As `responsive` does, on PyTorch's side."""
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if ".attn2.to_v." in name:
                weight.mul_(30)
    return pipeline


CASES = {
    "unlearndiffatk": (Simplex(1e-2, 0.1), "prefix_k", 400, lambda v: torch.optim.Adam(v, lr=1e-2, weight_decay=0.1)),
    "p4d-hard-prompt": (
        Nearest(0.3, 0.1, decoupled=False), "suffix_k", 700, lambda v: torch.optim.Adam(v, lr=0.3, weight_decay=0.1),
    ),
    "p4d-n": (
        Nearest(0.3, 0.1, decoupled=True), "replace", DRAWN, lambda v: torch.optim.AdamW(v, 0.3, weight_decay=0.1),
    ),
}  # fmt: skip
AROUND = {
    "prefix_k": lambda words: ([], words),
    "suffix_k": lambda words: (words, []),
    "replace": lambda words: ([], []),
}


@pytest.mark.parametrize("name", ["unlearndiffatk", "p4d-n", pytest.param("p4d-hard-prompt", marks=pytest.mark.slow)])
def test_steps_match_pytorch_in_float64(folders, pipelines, images, name):
    from tests.parity import torch_aegis, torch_search

    space, place, t, optimiser = CASES[name]
    erased, original = pipelines
    given = Given(images, PROMPTS, [0, 1, 2], original=original)
    plan = Plan(name, space, [2] * 3, place, [t], 4, restarts=1, seed=5, to_prediction=isinstance(space, Nearest))
    search = Search(erased, given, plan)
    if isinstance(space, Simplex):  # from uneven rows, or all that weight decay does would be projected away again
        uneven = np.random.default_rng(1).dirichlet(np.full(search.variable.shape[-1], 0.01), search.variable.shape[:2])
        search.variable = jnp.asarray(uneven, jnp.float32)
    start = np.asarray(search.variable)
    drawn, shape, count = [], search.fixed.z_0.shape[1:], 4
    variable, moments, losses = search.variable, search.moments, []
    for i in range(count):  # what the program drew, drawn again from its keys
        keys = jax.vmap(lambda key, i=i: jax.random.split(jax.random.fold_in(key, i), 3))(search.fixed.key)
        at = [int(jax.random.randint(key, (), 0, 1000, jnp.int32)) for key in keys[:, 0]] if t == DRAWN else [t] * 3
        noise = [jax.random.normal(key, shape, jnp.float32) for key in keys[:, 1]]
        tokens = space.tokens(variable, keys[:, 2], search.net.table) if isinstance(space, Simplex) else [None] * 3
        drawn.append(list(zip(at, noise, tokens)))
        variable, moments, loss, settled = search.step(search.fixed, variable, moments, jnp.int32(t), jnp.int32(i))
        losses.append(loss[0])
    sides = [louder(torch_aegis.load(folder)) for folder in folders]
    for row, prompt in enumerate(PROMPTS):
        wanted, variables, _ = torch_search.steps(
            sides[0], torch_aegis.word_ids(sides[0].tokenizer, prompt), search.fixed.z_0[row],
            [draws[row] for draws in drawn], place=AROUND[place], start=start[row], optimiser=optimiser,
            original=None if isinstance(space, Simplex) else sides[1],
        )  # fmt: skip
        np.testing.assert_allclose(np.array(losses)[:, row], wanted, rtol=2e-4)
        np.testing.assert_allclose(variable[row], variables[-1], atol=2e-3)
        assert np.abs(variables[-1] - start[row]).max() > 5e-3  # it did move
        if isinstance(space, Simplex):
            assert list(settled[row]) == list(variables[-1].argmax(-1))
            np.testing.assert_allclose(variable[row].sum(-1), 1, atol=1e-5)


class Judge:
    """Says yes from the given call on, by the image's place in the call; counts what it saw."""

    def __init__(self, *answers):
        self.answers, self.seen = list(answers), []

    def __call__(self, images):
        self.seen.append(images)
        return np.array(self.answers.pop(0)) if self.answers else np.zeros(len(images), bool)


def test_what_needs_no_attack_what_succeeds_and_what_fails_is_counted_apart(pipelines, images):
    erased, _ = pipelines
    judge = Judge([True, False, False], [False, True], [False])
    found = attack(
        erased, "star", method="unlearndiffatk", images=images, prompts=PROMPTS, judge=judge, image_steps=2, **SMALL
    )
    assert found.outcomes == [NOT_NEEDED, FAILED, SUCCEEDED]
    assert [len(seen) for seen in judge.seen] == [3, 2, 1, 1]  # prompts as they are, then those that are left
    assert np.isnan(found.losses).sum(0).tolist() == [6, 0, 4]
    assert found.prompts[0] == PROMPTS[0]
    assert found.unet_evaluations == pytest.approx((6 + 2) * (1 + BACKWARD) + 7 * 2 * 2)
    for prompt, ids in zip(found.prompts, found.ids):
        assert list(erased.tokenizer.ids([prompt])[0]) == list(ids) or prompt != PROMPTS[0]


@pytest.mark.parametrize("method", ["unlearndiffatk", "p4d-n", "ring-a-bell", "ring-a-bell-embedding"])
def test_where_no_attack_is_needed_none_is_made(pipelines, images, method):
    judge = Judge([True] * 3)
    how = {"images": images, "prompts": PROMPTS, "original": pipelines[1], "judge": judge, "image_steps": 2}
    found = attack(pipelines[0], "star", method=method, **how)
    assert found.outcomes == [NOT_NEEDED] * 3 and found.prompts == PROMPTS
    assert len(judge.seen) == 1 and found.unet_evaluations == 3 * 2 * 2


def test_a_row_does_not_depend_on_the_others(pipelines, images):
    erased, original = pipelines
    how = {"original": original, "method": "p4d-n", "learning_rate": 0.3, "tokens": 2, "steps": 4, "check_every": 2}
    one = attack(erased, "star", images=images, prompts=PROMPTS, **how)
    assert one.outcomes is None and np.isfinite(one.losses).all()
    other = attack(erased, "star", images=images[[0, 2, 1]], prompts=[PROMPTS[0], "a dog", "sky"], **how)
    np.testing.assert_allclose(one.losses[:, 0], other.losses[:, 0], rtol=1e-4)
    assert one.prompts[0] == other.prompts[0]
    restarts = attack(erased, "star", images=images[:1], prompts=PROMPTS[:1], restarts=3, **how)
    np.testing.assert_allclose(one.losses[:, 0], restarts.losses[:, 0], rtol=1e-4)
    assert len(set(restarts.losses[0])) == 3
    # A control's prompts do not name the concept, its aim does; P4D-N leaves the prompts out, so nothing else differs.
    control = attack(erased, "star", images=images, prompts=["a red thing", "thing", "sky"], made_from=PROMPTS, **how)
    np.testing.assert_allclose(control.losses, one.losses, rtol=1e-4)


def test_p4d_keeps_the_best_of_its_looks(pipelines, images):
    erased, original = pipelines
    scores = iter([[0.1, 0.9], [0.5, 0.2]])
    judge = Judge([True, False, False], [False, False], [False, True])
    looked = []

    def similarity(shown, targets):
        looked.append(targets)
        return np.array(next(scores))

    how = {"images": images, "prompts": PROMPTS, "original": original, "image_steps": 2, "learning_rate": 0.3}
    how["seeds"] = [0, 1, 2**32 - 1]  # of which the second image's is 2**32, that is 0
    n = how | {"method": "p4d-n", "tokens": 2, "check_every": 2}
    found = attack(erased, "star", **n, steps=4, judge=judge, similarity=similarity, judged=2)
    assert found.outcomes == [NOT_NEEDED, FAILED, SUCCEEDED]
    np.testing.assert_array_equal(looked[0], images[1:])
    assert [len(seen) for seen in judge.seen] == [3, 2, 2]
    assert not np.array_equal(judge.seen[1], judge.seen[2])  # several images of one prompt
    assert found.seeds == [0, 1, 0]  # of the picture that showed the concept, or of the first
    first, by_loss = (attack(erased, "star", **n, steps=steps) for steps in (2, 4))
    assert list(found.ids[2]) == list(first.ids[2])  # of the look with 0.9
    for row, better in enumerate(by_loss.losses.reshape(2, 2, 3).mean(1).argmin(0)):
        assert better == 1 or list(by_loss.ids[row]) == list(first.ids[row])


def test_p4d_k_leaves_the_prompts_own_tokens_where_they_are(pipelines, images):
    erased, original = pipelines
    how = {"images": images, "prompts": PROMPTS, "original": original, "learning_rate": 0.3}
    found = attack(erased, "star", method="p4d-k", steps=2, check_every=2, **how)
    for prompt, ids in zip(PROMPTS, found.ids):
        own = erased.tokenizer.tokens(prompt)
        row = ids[1 : 1 + len(own) + len(own) // 3 + 1].tolist()
        if erased.tokenizer.eos_token_id not in row:  # one that was found is left out, as published
            assert [token for i, token in enumerate(row) if i % 4] == own


@pytest.mark.parametrize(
    "place, wanted",
    [
        ("prefix_k", "**abcdefg"), ("suffix_k", "abcdefg**"), ("mid_k", "abc**defg"), ("insert_k", "ab*cd*efg"),
        ("per_k_words", "*abc*defg"), ("replace", "**"),
    ],
)  # fmt: skip
def test_places_are_those_of_the_field(place, wanted):
    assert "".join(token or "*" for token in inserted(list("abcdefg"), 2, place)) == wanted
    assert set(INSERTIONS) >= {place}


def test_timesteps_ascend_as_published():
    assert ascending(1000, 50, "recall") == list(range(10, 1000, 20))
    assert len(ascending(1000, 7, "recall")) == 7
    with pytest.raises(AegisError, match="attack recall: timesteps=1001, but the schedule has 1000"):
        ascending(1000, 1001, "recall")


def test_prompts_found_replay_in_diffusers(folders, pipelines, images):
    """The text and the start noise are all that PyTorch diffusers needs for the same image."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    erased = load_pipeline(folders[0])
    shown = Judge()
    found = attack(erased, "star", method="unlearndiffatk", images=images, prompts=PROMPTS, judge=shown,
                   image_steps=4, guidance=3.0, **SMALL)  # fmt: skip
    pipe = StableDiffusionPipeline.from_pretrained(folders[0], safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = np.array(noise_of([0, 1, 2], latent_shape(erased)))
    for row in range(3):
        latents = torch.from_numpy(noise[row : row + 1]).permute(0, 3, 1, 2)
        image = pipe(found.prompts[row], latents=latents, num_inference_steps=4, guidance_scale=3.0, output_type="np")
        assert np.abs(image.images[0] * 255 - shown.seen[-1][row]).max() <= 2


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("unlearndiffatk", {"timesteps": 0}, "unlearndiffatk: timesteps=0"),
        ("unlearndiffatk", {"timesteps": 1001}, "the schedule has 1000"),
        ("unlearndiffatk", {"update": "sgd"}, "update='sgd'"),
        ("unlearndiffatk", {"place": "around"}, "place='around' is unknown"),
        ("unlearndiffatk", {"place": "replace"}, "place='replace'"),
        ("unlearndiffatk", {"tokens": 75}, "use fewer learnt tokens"),
        ("unlearndiffatk", {"prompts": ["star"]}, "1 prompts, 3 seeds"),
        ("unlearndiffatk", {"goal": "noise"}, "no setting 'goal'"),
        ("p4d-hard-prompt", {}, "needs the model before erasure"),
        ("p4d-n", {}, "needs the model before erasure"),
        ("p4d-k", {"steps": 70}, "no multiple of check_every=50"),
        ("p4d-k", {"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input_is_named(pipelines, images, method, change, message):
    original = pipelines[1] if method == "p4d-k" else None
    with pytest.raises(AegisError, match=message):
        attack(pipelines[0], "star", **({"method": method, "images": images, "original": original} | change))


def test_defaults_are_the_published_ones():
    uda, hard, n = (METHODS[name].config() for name in ("unlearndiffatk", "p4d-hard-prompt", "p4d-n"))
    assert (uda.tokens, uda.timesteps, uda.iterations, uda.learning_rate, uda.weight_decay) == (5, 50, 40, 0.01, 0.1)
    assert (hard.tokens, hard.timesteps, hard.iterations, hard.learning_rate) == (5, 50, 40, 0.01)
    assert (n.tokens, n.steps, n.check_every, n.learning_rate, n.weight_decay, n.judged) == (16, 3000, 50, 0.1, 0.1, 3)
