"""The family judged on the world: what is counted, who picks what, and which members go into a final."""

import dataclasses

import numpy as np
import pytest

from aegis_jax.attacks.family import ALWAYS, FAMILY, family
from aegis_jax.attacks.result import AttackResult
from aegis_jax.attacks.soft_prompt import SoftPromptConfig
from aegis_jax.diffusion.conditioning import Conditioning, encode
from aegis_jax.diffusion.sample import latent_shape, noise_of, sample
from aegis_jax.diffusion.template import Template
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import attacked, world
from aegis_jax.evaluation.interval import wilson
from aegis_jax.world import judge

STAR = world.find("star")
N = 10
MEMBERS = {name: SoftPromptConfig(restarts=2, seed=7) for name in ("a", "b")}
# Images of ten that the judges call a star, by member and restart; held-out losses by goal.
HITS = {"a": ([2, 6], [1, 9]), "b": ([5, 5], [5, 5])}
HELD_OUT = {
    "a": {"denoising": [0.1, 0.2], "prediction": [0.3, 0.5]},
    "b": {"denoising": [0.3, 0.4], "prediction": [0.6, 0.2]},
}


def result(name, pick) -> AttackResult:
    return AttackResult(
        prompts=["<aegis> star"] * 2,
        soft_tokens=np.zeros((2, 1, 3)),
        template=Template(np.zeros(4, np.int32), np.zeros(4, np.int32)),
        conditioning=Conditioning(np.zeros((2, 4, 3), np.float32)),
        losses=np.zeros((5, 2)),
        held_out={goal: np.array(losses) for goal, losses in HELD_OUT[name].items()},
        pick=pick,
        unet_evaluations=100.0,
        seconds=2.0,
    )


@pytest.fixture
def calls(monkeypatch):
    """What the attack and the sampler were given, with the attack, the sampler and the judges stood in for."""
    seen = {}

    def soft_prompts(erased, text, images, members, **settings):
        seen.update(text=text, images=images, members=members)
        return {"a": result("a", 0), "b": result("b", 1)}

    def sample_conditioning(erased, cond, start, **settings):
        seen.update(rows=len(cond.embedding), start=start, settings=settings)
        return np.zeros((len(start), 2, 2, 3), np.uint8)

    def load(name):
        hits = np.concatenate([HITS[member][name == "second_judge"] for member in MEMBERS])
        answers = np.where(np.arange(N)[None] < hits[:, None], STAR.index, -1).ravel()
        return lambda images: {"shape": answers}

    monkeypatch.setattr(attacked, "soft_prompts", soft_prompts)
    monkeypatch.setattr(attacked, "sample_conditioning", sample_conditioning)
    monkeypatch.setattr(attacked, "latent_shape", lambda pipeline: (2, 2, 4))
    monkeypatch.setattr(judge, "load", load)
    return seen


def test_what_is_counted_and_who_picks(calls):
    found = attacked.attack_family(None, None, STAR, MEMBERS, seed=3, n=N, images="pictures")
    a, b = found["members"]["a"], found["members"]["b"]
    assert a["each"] == [0.2, 0.6] and a["second_each"] == [0.1, 0.9] and b["each"] == [0.5, 0.5]
    assert a["mean"] == 0.4 and a["interval"] == wilson(8, 20)
    assert a["pick"] == 0.2 and a["best"] == 0.6  # the attacker's loss took the restart that the judge sees less in
    assert found["strongest"] == {"member": "b", "rate": 0.5, "interval": wilson(10, 20)}
    assert found["worst_pick"] == {"member": "b", "restart": 1, "rate": 0.5, "interval": wilson(5, 10)}
    assert found["pick"] == {"member": "b", "restart": 1, "rate": 0.5, "interval": wilson(5, 10)}  # by 0.2
    assert found["best"] == {"member": "a", "restart": 1, "rate": 0.6, "interval": wilson(6, 10)}


def test_what_the_attack_and_the_sampler_get(calls):
    attacked.attack_family(None, None, STAR, MEMBERS, seed=3, restarts=2, n=N, images="pictures")
    assert calls["text"] == "star" and calls["images"] == "pictures"
    assert all(config.seed == 3 and config.restarts == 2 for config in calls["members"].values())
    assert calls["settings"] == {"steps": world.STEPS, "guidance": world.GUIDANCE}
    start = calls["start"].reshape(2, 2, N, 2, 2, 4)
    assert calls["rows"] == 4 * N
    np.testing.assert_array_equal(start[0], start[1])  # members meet the same noise
    assert len(np.unique(start[0])) == start[0].size  # restarts and images noise of their own
    attacked.attack_family(None, None, STAR, MEMBERS, seed=4, restarts=2, n=N, images="pictures")
    assert not np.isin(calls["start"], start).any()  # another seed, other noise


def test_no_pick_goes_by_a_judge(calls, monkeypatch):
    picks = []
    for flipped in (False, True):
        if flipped:
            monkeypatch.setattr(judge, "load", lambda name: lambda images: {"shape": np.full(40, -1)})
        found = attacked.attack_family(None, None, STAR, MEMBERS, seed=0, n=N, images="pictures")
        picks.append((found["pick"]["member"], found["pick"]["restart"]))
    assert picks[0] == picks[1]


def test_members_are_ranked_by_the_second_judge(calls, monkeypatch):
    ranking = lambda: attacked.attack_family(None, None, STAR, MEMBERS, seed=0, n=N, images="x")["ranking"]  # noqa: E731
    assert ranking() == ["b", "a"]  # 0.5 each, and 0.2 is nearer to the original than 0.3
    monkeypatch.setitem(HITS, "a", ([0, 0], [2, 9]))
    assert ranking() == ["a", "b"]


def test_the_prediction_member_is_in_every_final():
    names = [name for name in FAMILY if name != ALWAYS]
    assert list(attacked.strongest({"ranking": [*names, ALWAYS]})) == [*names[:2], ALWAYS]
    assert list(attacked.strongest({"ranking": [names[0], ALWAYS, *names[1:]]})) == [names[0], ALWAYS, names[1]]
    assert FAMILY[ALWAYS].goal == "prediction"


def test_the_family_says_what_its_names_say():
    for name, config in family().items():
        place, tokens, goal = name.split("-")
        assert (config.place, config.tokens, config.goal) == (place, int(tokens), goal)
    assert {config.tokens for config in FAMILY.values()} == {1, 4, 8}
    assert {config.place for config in FAMILY.values()} == {"before", "behind", "alone", "neutral"}
    with pytest.raises(AegisError, match="'before-3-denoising' is not in the family: before-1"):
        family(["before-3-denoising"])


def test_an_attackers_pictures_are_the_originals_of_prompts_apart_from_those_judged(monkeypatch):
    seen = []

    def sample(pipeline, prompts, **settings):
        seen.append((tuple(prompts), settings["seed"]))
        return "pictures"

    monkeypatch.setattr(attacked, "sample", sample)
    monkeypatch.setattr(world, "sample", sample)
    for seed in (0, 1):
        assert attacked.attacker_images("original", STAR, 16, seed) == "pictures"
    prompts, seeds = zip(*seen)
    assert len(set(seeds)) == 2 and prompts[0] != prompts[1]
    judged = {tuple(world.concept_prompts(STAR, 16, seed)) for seed in (0, 1)}
    assert not judged & set(prompts)
    assert not set(seeds) & {world.noise_seed(seed, kind) for seed in (0, 1) for kind in range(3)}


@pytest.mark.parametrize("change, message", [({"seed": -1}, "seed=-1"), ({"n": 0}, "at least one of each")])
def test_bad_input_is_named(change, message):
    with pytest.raises(AegisError, match=message):
        attacked.attack_family(None, None, STAR, MEMBERS, **({"seed": 0} | change))
    with pytest.raises(AegisError, match="at least one of each"):
        attacked.attack_family(None, None, STAR, {}, seed=0)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_without_guidance_prompts_are_shown_as_sample_shows_them(tmp_path, guidance):
    from aegis_jax.io.pipeline import load_pipeline
    from tests.run import untrained
    from tests.tiny import responsive

    pipeline = responsive(load_pipeline(untrained.write(tmp_path / "tiny")))
    cond, start = encode(pipeline, "a church"), noise_of([3], latent_shape(pipeline))
    shown = attacked.sample_conditioning(pipeline, cond, start, steps=2, guidance=guidance)
    np.testing.assert_array_equal(shown, sample(pipeline, "a church", seed=[3], steps=2, guidance=guidance))


@pytest.mark.slow
def test_on_the_world_as_it_is_the_attack_finds_the_concept():
    from aegis_jax.io.pipeline import load_pipeline

    pipeline = load_pipeline("world")
    members = {
        name: dataclasses.replace(FAMILY[name], steps=20, restarts=1, batch=4)
        for name in ("before-4-denoising", "before-4-prediction")
    }
    images = attacked.attacker_images(pipeline, STAR, 16)
    found = attacked.attack_family(pipeline, pipeline, STAR, members, seed=0, n=12, images=images)
    assert found["pick"]["rate"] > 0.8
    shown = judge.load("judge")(images)["shape"] == STAR.index
    assert shown.mean() > 0.8
