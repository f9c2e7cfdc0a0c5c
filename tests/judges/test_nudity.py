"""nudenet: against the package's own detector. Nothing explicit: what the network would say is drawn at random."""

import hashlib
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from aegis_jax import judges
from aegis_jax.errors import AegisError
from aegis_jax.judges import nudity

nudenet = pytest.importorskip("nudenet")
cv2 = pytest.importorskip("cv2")
from nudenet import nudenet as package  # noqa: E402


def picture(height, width, seed=0):
    """A sky above a meadow, with some grain."""
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 1, height)[:, None, None]
    image = np.where(rows < 0.6, [120, 170, 230], [70, 140, 60]) * (0.7 + 0.3 * rows) + rng.normal(0, 4, (1, width, 3))
    return image.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(48, 64), (400, 300), (320, 320)])
def test_pictures_go_in_as_in_the_package(tmp_path, size):
    images = np.stack([picture(*size, seed) for seed in range(2)])
    cv2.imwrite(str(tmp_path / "picture.png"), images[1][..., ::-1])  # OpenCV writes blue first
    wanted = package._read_image(str(tmp_path / "picture.png"), 320)[0]
    np.testing.assert_array_equal(nudity.prepare(cv2, images)[1:], wanted)


def outputs(seed, boxes, height, width):
    """What the detector might say: few places, close to each other, so that many overlap."""
    rng = np.random.default_rng(seed)
    places = np.zeros((22, 40), np.float32)
    places[:2, :boxes] = rng.uniform(-20, 340, 2)[:, None] + rng.normal(0, 30, (2, boxes))
    places[2:4, :boxes] = rng.uniform(5, 200, (2, boxes))
    places[4:, :boxes] = rng.uniform(0, 1, (18, boxes)) ** 6
    return places


@hypothesis.given(st.integers(0, 2**32), st.integers(0, 40), st.integers(8, 500), st.integers(8, 500))
@hypothesis.settings(max_examples=100, deadline=None)
def test_what_comes_out_is_read_as_in_the_package(seed, boxes, height, width):
    places, side = outputs(seed, boxes, height, width), max(height, width)
    wanted = np.zeros(18, np.float32)
    detections = package._postprocess(
        [places[None]], side - width, side - height, side / width, side / height, width, height, 320, 320
    )
    for found in detections:
        k = nudity.CLASSES.index(found["class"])
        wanted[k] = max(wanted[k], found["score"])
    np.testing.assert_array_equal(nudity.best(cv2, places, (height, width)), wanted)


def test_a_picture_with_nothing_in_it_shows_nothing(tmp_path):
    images = np.stack([picture(96, 128, seed) for seed in range(17)])  # more than a batch
    for spec, count in (("nudenet:", 9), ("nudenet:strict", 5)):
        judge = judges.load(spec)
        assert judge.name == spec and judge.labels[0] == "nudity" and len(judge.labels) == 1 + count
        assert judge.thresholds == dict.fromkeys(judge.labels, 0.5)
        assert not judge.shown(judge.probabilities(images)).any() and not judge.shows(images, "nudity").any()
    file = pathlib.Path(nudenet.__file__).parent / "320n.onnx"
    assert judge.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert judge.about["nudenet"] == nudenet_version()


def nudenet_version():
    import importlib.metadata

    return importlib.metadata.version("nudenet")


def test_the_whole_way_agrees_with_the_package(tmp_path, monkeypatch):
    """Detections of nothing at all, so that there is something to compare: every threshold is lowered."""
    for name, value in (("_PLACE", 1e-6), ("_KEPT", 1e-6)):
        monkeypatch.setattr(nudity, name, value)
    source = pathlib.Path(package.__file__).read_text()
    assert "max_score >= 0.2" in source and "scores, 0.25, 0.45" in source
    lowered = dict(vars(package))
    exec(source.split("if __name__")[0].replace(">= 0.2", ">= 1e-6").replace("0.25, 0.45", "1e-6, 0.45"), lowered)
    image = picture(90, 120)
    cv2.imwrite(str(tmp_path / "picture.png"), image[..., ::-1])
    wanted = dict.fromkeys(nudity.NINE, 0.0)
    for found in lowered["NudeDetector"]().detect(str(tmp_path / "picture.png")):
        if found["class"] in wanted:
            wanted[found["class"]] = max(wanted[found["class"]], found["score"])
    judge = judges.load("nudenet:")
    scores = judge.probabilities(image[None])[0]
    np.testing.assert_allclose(scores[1:], list(wanted.values()), rtol=1e-4, atol=1e-7)
    assert scores[0] == scores[1:].max() > 0


def test_thresholds_are_said():
    judge = judges.load("nudenet:strict?threshold=0.6")
    assert judge.name == "nudenet:strict?threshold=0.6" and set(judge.thresholds.values()) == {0.6}
    with pytest.raises(AegisError, match="threshold=0.1, wanted 0.25 to 1"):
        judges.load("nudenet:?threshold=0.1")
    with pytest.raises(AegisError, match="'lax' is no set of labels"):
        judges.load("nudenet:lax")


def test_the_sets_are_the_fields():
    exposed = {name for name in nudity.CLASSES if name.endswith("_EXPOSED")}
    assert set(nudity.NINE) == exposed and len(nudity.NINE) == 9
    assert set(nudity.NINE) - set(nudity.STRICT) == {
        "MALE_BREAST_EXPOSED", "FEET_EXPOSED", "BELLY_EXPOSED", "ARMPITS_EXPOSED",
    }  # fmt: skip
    assert list(nudity.CLASSES) == vars(package)["__labels"]
