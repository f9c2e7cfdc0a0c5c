"""Ring-A-Bell on a tiny random pipeline: its target and distance in float64, how generations are bred, what is fed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aegis_jax
from aegis_jax.attacks import METHODS, attack, ring_a_bell
from aegis_jax.attacks.given import Given
from aegis_jax.attacks.result import FAILED, NOT_NEEDED, SUCCEEDED
from aegis_jax.attacks.ring_a_bell import PAIRS, bred, distance, targets
from aegis_jax.attacks.rows import viewer_of
from aegis_jax.diffusion.template import padded
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from tests.tiny import FEWEST

torch = pytest.importorskip("torch")
PROMPTS = ["a red star", "a cat"]


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny(**FEWEST))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Of this test alone: nothing was found before."""
    monkeypatch.setenv("AEGIS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def encoded(side, text):
    """Float64 (L, D)."""
    from tests.parity import torch_aegis as reference

    words = reference.word_ids(side.tokenizer, text)
    return reference.prompt_embedding(side, None, words)[0].detach().numpy()


def test_target_and_distance_match_pytorch_in_float64(tiny, pipeline):
    from tests.parity import torch_aegis as reference

    side = reference.load(tiny(**FEWEST))
    shift = np.mean([encoded(side, text.format("star")) - encoded(side, bare) for text, bare in PAIRS], axis=0)
    wanted = encoded(side, PROMPTS[0]) + 3 * shift
    target = targets(pipeline, "star", PROMPTS, 3.0)
    np.testing.assert_allclose(target[0], wanted, atol=2e-5)
    people = [pipeline.tokenizer.tokens("red dog"), pipeline.tokenizer.tokens("a cat")]
    text, frame = pipeline.text_encoder, jnp.asarray(padded(pipeline.tokenizer, [0, 0]).ids)
    found = distance(text.graph, text.params, frame, jnp.array(people), target[0])
    far = [np.square(encoded(side, words) - wanted).sum() for words in ("red dog", "a cat")]
    np.testing.assert_allclose(found, far, rtol=1e-4)


def test_generations_are_bred_by_one_point_crossover_and_one_mutation():
    rng = np.random.default_rng(0)
    parents = rng.integers(10, 10**6, (100, 5))  # all tokens differ
    allowed = jnp.array([1, 2, 3])
    breed = jax.jit(bred)
    people, filled = map(np.asarray, breed(jax.random.key(0), jnp.array(parents), allowed, 0.5, 0.0))
    np.testing.assert_array_equal(people[:100], parents)
    has = filled[100:200]
    assert filled[:100].all() and (filled[200:] == has).all() and 30 < has.sum() < 70
    cuts = set()
    for parent, first, second in zip(parents, people[100:200], people[200:]):
        cut = int((first == parent).sum()) if (first != parent).any() else None
        if cut is None:
            continue  # its own partner
        assert (first[:cut] == parent[:cut]).all() and (second[cut:] == parent[cut:]).all()
        assert any((first[cut:] == o[cut:]).all() and (second[:cut] == o[:cut]).all() for o in parents)
        cuts.add(cut)
    assert cuts == {0, 1, 2, 3, 4}
    mutated, _ = map(np.asarray, breed(jax.random.key(0), jnp.array(parents), allowed, 0.5, 0.25))
    changed = (mutated != people).sum(1)
    assert changed.max() == 1 and 40 < changed.sum() < 110
    assert set(mutated[mutated != people]) == {1, 2, 3}


def test_the_search_comes_nearer_and_outcomes_are_told_apart(pipeline, images):
    answers, generations = iter([[False, True], [True, False, False]]), []
    how = {"method": "ring-a-bell", "images": images, "prompts": PROMPTS, "tokens": 3, "population": 12}
    found = attack(pipeline, "star", **how, generations=20)
    assert found.losses.shape == (20, 2) and (found.losses[-1] < found.losses[0]).all() and found.outcomes is None
    assert found.unet_evaluations == 0
    judged = attack(
        pipeline, "star", **how, generations=20, restarts=3, image_steps=1, judge=lambda x: np.array(next(answers)),
        progress=lambda *now: generations.append(now[:2]),
    )  # fmt: skip
    assert judged.outcomes == [SUCCEEDED, FAILED, FAILED] + [NOT_NEEDED] * 3
    np.testing.assert_array_equal(judged.losses[:, 0], found.losses[:, 0])  # a restart of its own draws alone
    assert len(set(judged.losses[-1, :3])) > 1 and judged.unet_evaluations == 5 * 2
    # A prompt that needs no attack gets none.
    assert np.isnan(judged.losses[:, 3:]).all() and generations[-1] == (60, 60)
    assert judged.prompts[3:] == PROMPTS[1:] * 3 and judged.same_tokens[3:].all()
    np.testing.assert_array_equal(judged.ids[3:], pipeline.tokenizer.ids(PROMPTS[1:] * 3))


def test_a_search_is_made_once_for_all_models_with_the_text_encoder(pipeline, images, cache, monkeypatch):
    how = {"method": "ring-a-bell", "images": images, "prompts": PROMPTS, "tokens": 3, "population": 12}
    first, told = attack(pipeline, "star", **how, generations=10), []
    unet = dataclasses.replace(pipeline.unet, params=jax.tree.map(lambda x: x + 1, pipeline.unet.params))
    searched = []
    genuine = ring_a_bell._generations
    monkeypatch.setattr(ring_a_bell, "_generations", lambda *a, **how: searched.append(1) or genuine(*a, **how))
    erased = dataclasses.replace(pipeline, unet=unet)
    again = attack(erased, "star", **how, generations=10, progress=lambda *now: told.append(now[:2]))
    assert not searched and told == [(10, 20), (20, 20)]
    np.testing.assert_array_equal(again.ids, first.ids)
    np.testing.assert_array_equal(again.losses, first.losses)
    assert again.seconds > sum(json.loads(file.read_text())["seconds"] for file in cache.rglob("*.json"))
    # A prompt's search is its own; another concept, seed, number of generations or text encoder is another search.
    attack(pipeline, "star", **how | {"prompts": [PROMPTS[0], "a dog"]}, generations=10)
    assert len(searched) == 1
    params = jax.tree.map(lambda x: x * 1.01, pipeline.text_encoder.params)
    other = dataclasses.replace(pipeline, text_encoder=dataclasses.replace(pipeline.text_encoder, params=params))
    for model, concept, more in (
        (pipeline, "cat", {}),
        (pipeline, "star", {"seed": 1}),
        (pipeline, "star", {"generations": 5}),
        (other, "star", {}),
    ):
        searched.clear()
        attack(model, concept, **how | {"generations": 10} | more)
        assert len(searched) == 2
    # What a killed writer or a full disk left is nothing.
    for file in cache.rglob("*.json"):
        file.write_text(file.read_text()[:-9])
    searched.clear()
    np.testing.assert_array_equal(attack(pipeline, "star", **how, generations=10).ids, first.ids)
    assert len(searched) == 2


def test_the_shifted_encoding_is_what_diffusers_is_fed(tiny, pipeline, images):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from aegis_jax.diffusion.sample import latent_shape, noise_of

    seen = []

    def judge(shown):
        seen.append(shown)
        return np.zeros(len(shown), bool)

    how = {"images": images, "prompts": PROMPTS, "image_steps": 3, "guidance": 3.0, "judge": judge}
    found = attack(pipeline, "star", method="ring-a-bell-embedding", **how)
    assert found.shifted and found.prompts == PROMPTS and found.outcomes == [FAILED, FAILED]
    pipe = StableDiffusionPipeline.from_pretrained(tiny(**FEWEST), safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.array(noise_of([0, 1], latent_shape(pipeline)))).permute(0, 3, 1, 2)
    fed = torch.from_numpy(np.array(found.conditioning.embedding))
    with torch.no_grad():
        empty = pipe.encode_prompt("", "cpu", 1, False)[0].expand(2, -1, -1)
    made = pipe(prompt_embeds=fed, negative_prompt_embeds=empty, latents=noise, num_inference_steps=3,
                guidance_scale=3.0, output_type="np")  # fmt: skip
    assert np.abs(made.images * 255 - seen[1]).max() <= 2


def test_a_prompt_that_needs_no_attack_is_fed_as_it_is(pipeline, images):
    answers = iter([[False, True], [True]])
    how = {"images": images, "prompts": PROMPTS, "image_steps": 1, "judge": lambda x: np.array(next(answers))}
    found = attack(pipeline, "star", method="ring-a-bell-embedding", **how)
    assert found.outcomes == [SUCCEEDED, NOT_NEEDED]
    encoded = aegis_jax.encode_text(pipeline, PROMPTS)
    np.testing.assert_array_equal(found.conditioning.embedding[1], encoded[1])
    assert not np.allclose(found.conditioning.embedding[0], encoded[0], atol=0.1)


def test_defaults_and_bad_input(pipeline, images):
    config = METHODS["ring-a-bell"].config()
    assert (config.tokens, config.eta, config.population, config.generations) == (16, 3.0, 200, 3000)
    assert (config.crossover, config.mutation) == (0.5, 0.25)
    for change, told in (({"population": 3}, "wanted at least 4"), ({"tokens": 76}, "wanted at most 75")):
        with pytest.raises(AegisError, match=told):
            attack(pipeline, "star", method="ring-a-bell", images=images, **change)


def test_no_more_pictures_go_into_a_call_than_fit(pipeline):
    given = Given(np.zeros((20, 8, 8, 3), np.uint8), ["star"] * 20, list(range(20)))
    unet = dataclasses.replace(pipeline.unet, config=pipeline.unet.config | {"sample_size": 64})
    large = dataclasses.replace(pipeline, unet=unet)
    for one, most in ((pipeline, 20), (large, 8)):
        assert ring_a_bell._unaided(one, given, 1)[1].batch == viewer_of(one, given, 20).batch <= most
