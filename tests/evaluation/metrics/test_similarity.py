"""CLIP score and nearest words: against torchmetrics and transformers on the same features, and on the world."""

import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.evaluation.metrics import similarity
from aegis_jax.world import WEIGHTS, captions, renderer

RNG = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_clip_score_by_hand():
    images, texts = unit(RNG.standard_normal((7, 5))), unit(RNG.standard_normal((7, 5)))
    found = similarity.clip_score(images, texts)
    cosines = [np.dot(a, b) for a, b in zip(images, texts)]
    np.testing.assert_allclose(found["mean"], np.mean(cosines))
    np.testing.assert_allclose(found["standard_error"], np.std(cosines, ddof=1) / 7**0.5)
    assert found["n"] == 7 and similarity.clip_score(images[:1], texts[:1])["standard_error"] is None
    with pytest.raises(AegisError, match="wanted a text for each image"):
        similarity.clip_score(images, texts[:3])


def test_clip_score_is_that_of_transformers(tmp_path):
    """The same folder of random weights, the same pictures and texts. (torchmetrics 1.9 cannot run transformers 5.)"""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.tiny_clip import tiny_clip

    model = tiny_clip(tmp_path)
    images = (RNG.integers(0, 200, (6, 1, 1, 3)) + RNG.integers(0, 56, (6, 40, 50, 3))).astype(np.uint8)
    texts = ["a red star", "a dog", "the church", "a photo of a cat", "sky", "square"]
    clip = similarity.embedder(tmp_path)
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(images, return_tensors="pt")
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = (model(**pixels, **tokens).logits_per_image / model.logit_scale.exp()).diagonal().numpy()
    assert wanted.std() > 0.01
    found = similarity.clip_score(clip.images(images), clip.texts(texts))
    np.testing.assert_allclose(found["mean"], wanted.mean(), atol=1e-5)
    np.testing.assert_allclose(found["standard_error"], wanted.std(ddof=1) / 6**0.5, atol=1e-5)
    assert clip.features(images).shape == (6, 20)


def test_care_counts_the_images_nearest_to_the_word():
    words = np.eye(4)
    images = unit(np.array([[3, 1, 0, 0], [0, 1, 0.9, 0], [0, 0, 0, 1], [1, 2, 0, 1.0]]))
    assert similarity.nearest(images, words).tolist() == [0, 1, 3, 1]
    found = similarity.care(images, words, 1)
    assert (found["count"], found["n"], found["share"]) == (2, 4, 0.5)
    assert len(set(similarity.COCO_OBJECTS)) == 80


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")
def test_the_worlds_clip_prefers_what_a_picture_shows():
    label = renderer.labels(np.random.default_rng(4), 48)
    images, clip = renderer.render(np.random.default_rng(4), label), similarity.embedder("world")
    texts = captions.canonical(label)
    right = similarity.clip_score(clip.images(images), clip.texts(texts))
    wrong = similarity.clip_score(clip.images(images), clip.texts(texts[1:] + texts[:1]))
    assert right["mean"] > wrong["mean"] + 3 * (right["standard_error"] + wrong["standard_error"])
    assert clip.features(images).shape == (48, 128) and len(clip.digest) == 64
    with pytest.raises(AegisError, match="16x16 pixels"):
        clip.images(np.zeros((1, 16, 16, 3), np.uint8))
