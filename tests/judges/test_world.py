"""The world's judges as the protocol has them, on pictures whose truth the renderer knows."""

import hashlib

import numpy as np
import pytest

from aegis_jax import judges
from aegis_jax.errors import AegisError
from aegis_jax.world import WEIGHTS, judge, renderer
from aegis_jax.world.concepts import ATTRIBUTES, NONE


@pytest.fixture(scope="module")
def rendered():
    rng = np.random.default_rng(13)
    label = renderer.labels(rng, 64)
    return renderer.render(rng, label), label


@pytest.mark.parametrize(("spec", "name"), [("world", "judge"), ("world:second", "second_judge")])
def test_it_says_what_the_renderer_drew(spec, name, rendered):
    images, label = rendered
    found = judges.load(spec)
    assert found.name == spec
    assert found.digest == hashlib.sha256((WEIGHTS / name / "model.safetensors").read_bytes()).hexdigest()
    drawn = np.stack([[v[i].name for v, i in zip(ATTRIBUTES.values(), row)] for row in label])
    assert (found.answers(found.probabilities(images)) == drawn).mean() > 0.97
    for value in ("star", "red", "striped"):
        assert (found.shows(images, value) == (drawn == value).any(1)).mean() > 0.97


def test_its_answers_are_those_of_the_judge_inside(rendered):
    images = np.concatenate([rendered[0], np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)])
    found, inside = judges.load("world"), judge.load("judge")(images)
    answers = found.answers(found.probabilities(images))
    for k, (attribute, values) in enumerate(ATTRIBUTES.items()):
        names = [*(value.name for value in values), f"no {attribute}"]
        assert answers[:, k].tolist() == [names[i] for i in inside[attribute]]
    assert (inside["shape"][-16:] == NONE).all() and found.shows(images, "no shape")[-16:].all()


def test_features_tell_shapes_apart(rendered):
    images, label = rendered
    features = judges.load("world").features(images)
    assert features.shape == (64, 64) and np.isfinite(features).all()
    # Nearest other picture by features: of the same shape far more often than by chance, which is one in eight.
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1) + np.diag(np.full(64, np.inf))
    assert (label[distance.argmin(1), 0] == label[:, 0]).mean() > 0.3


def test_pictures_of_another_size_are_refused():
    with pytest.raises(AegisError, match="64x48 pixels, and the world's are 32x32"):
        judges.load("world").probabilities(np.zeros((1, 48, 64, 3), np.uint8))
    with pytest.raises(AegisError, match="judge 'world:third': the world has the judges world and world:second"):
        judges.load("world:third")
