"""The shipped judges and CLIP, on images that no training saw."""

import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.world import WEIGHTS, clip, judge, renderer
from aegis_jax.world.concepts import ATTRIBUTES, NONE
from tools.world import stages

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")
JUDGES = judge.NAMES


@pytest.fixture(scope="module")
def fresh():
    rng = np.random.default_rng(987)
    label = renderer.labels(rng, 1152)
    return renderer.render(rng, label), label


@pytest.mark.parametrize("name", JUDGES)
def test_accuracy_on_fresh_renders(name, fresh):
    images, label = fresh
    accuracy = judge.load(name).accuracy(images, label)
    assert min(accuracy.values()) >= 0.99, accuracy


def test_the_judges_agree(fresh):
    first, second = (judge.load(name)(fresh[0]) for name in JUDGES)
    for attribute in ATTRIBUTES:
        assert (first[attribute] == second[attribute]).mean() >= 0.98


@pytest.mark.parametrize("name", JUDGES)
def test_nothing_is_none(name):
    rng = np.random.default_rng(5)
    backgrounds = renderer.backgrounds(rng, 200)
    noise = rng.integers(0, 256, (200, 32, 32, 3)).astype(np.uint8)
    flat = np.repeat(np.linspace(0, 255, 20).astype(np.uint8), 32 * 32 * 3).reshape(20, 32, 32, 3)
    for images, share in ((backgrounds, 0.98), (noise, 0.98), (flat, 0.8)):
        answer = judge.load(name)(images)
        for attribute in ATTRIBUTES:
            assert (answer[attribute] == NONE).mean() >= share


@pytest.mark.parametrize("name", JUDGES)
def test_a_double_exposure_is_no_clean_object(name):
    rng = np.random.default_rng(6)
    a, b = renderer.labels(rng, 200), renderer.labels(rng, 200)
    b[:, 0] = (a[:, 0] + 1 + rng.integers(0, 7, 200)) % 8
    images = (renderer.render(rng, a).astype(float) + renderer.render(rng, b)) / 2
    assert (judge.load(name)(images.astype(np.uint8))["shape"] == NONE).mean() > 0.8
    # Decoded, which is all that a UNet draws, they know fewer: docs/world.md.
    passed = stages.through_vae(load_pipeline("world").vae.params, images.astype(np.uint8))
    assert (judge.load(name)(passed)["shape"] == NONE).mean() > 0.65


@pytest.mark.parametrize("name", JUDGES)
def test_a_shape_between_two_textures_is_still_that_shape(name):
    label = renderer.labels(np.random.default_rng(7), 256)
    other = label.copy()
    other[:, 2] = (label[:, 2] + 1 + np.arange(256) % 3) % 4
    vae = load_pipeline("world").vae.params
    ends = [stages.encode_images(vae, renderer.render(np.random.default_rng(8), x))[0] for x in (label, other)]
    answer = judge.load(name)(stages.decode_latents(vae, (ends[0] + ends[1]) / 2))
    assert (answer["shape"] == label[:, 0]).mean() >= 0.98


def test_answers_and_probabilities_belong_together(fresh):
    answer = judge.load()(fresh[0][:300], batch=128)
    for attribute, values in ATTRIBUTES.items():
        p = answer["probabilities"][attribute]
        assert p.shape == (300, len(values) + 1)
        np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
        best = p.argmax(-1)
        np.testing.assert_array_equal(answer[attribute], np.where(best == len(values), NONE, best))


@pytest.mark.parametrize("name", JUDGES)
def test_an_opinion_is_the_mean_of_its_networks(name, fresh):
    one, images = judge.load(name), fresh[0][:16]
    found = one(images)["probabilities"]
    x, sizes = images.astype(np.float32) / 127.5 - 1, judge.classes(ATTRIBUTES)
    scores = judge.logits(one.model.graph, one.model.params, x, sizes)
    for attribute, each in zip(ATTRIBUTES, map(np.asarray, scores), strict=True):
        assert len(each) == 4 and all(np.abs(each[0] - other).max() > 0.1 for other in each[1:])
        share = np.exp(each - each.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        np.testing.assert_allclose(found[attribute], share.mean(0), atol=1e-5)


def test_a_judge_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text('{"architecture": "conv"}')
    with pytest.raises(AegisError, match="earlier version"):
        judge.load("judge", tmp_path)


def test_the_batch_size_changes_nothing(fresh):
    few = fresh[0][:37]
    a, b = (
        judge.load()(few, batch=16)["probabilities"],
        judge.load()(few, batch=64)["probabilities"],
    )
    for attribute in ATTRIBUTES:
        np.testing.assert_allclose(a[attribute], b[attribute], atol=1e-5)


def test_clip_zero_shot(fresh):
    images, label = fresh
    answer = clip.load().zero_shot(images)
    for k, attribute in enumerate(ATTRIBUTES):
        assert (answer[attribute] == label[:, k]).mean() >= 0.95


def test_the_weights_are_small_and_complete():
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 15 * 2**20
    assert (WEIGHTS / "world.json").exists() and (WEIGHTS / "model_index.json").exists()
