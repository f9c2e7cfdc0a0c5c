"""Many erasures at a time: what comes out is what each would have come to on its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aegis_jax
from aegis_jax.erasure.method import Lanes
from aegis_jax.erasure.trainable import is_trainable
from aegis_jax.errors import AegisError
from aegis_jax.models.model import flatten
from aegis_jax.run import config
from aegis_jax.run.config import RunConfig
from aegis_jax.run.erase import _with_params
from aegis_jax.run.lanes import erase_group, width
from aegis_jax.run.loop import NonFiniteError
from tests.run import untrained

KEYS = {"steps": 4, "picture.images": 0, "trainable": "kv", "learning_rate": 1e-3}
BAD = {"heart": ("loss", 2), "dog": ("state", 4)}  # what is not a number from which step on


def frozen(concepts) -> dict:
    """The concept's own part of the stand-in step: its loss, and when that or the state goes bad."""
    kind, step = BAD.get(concepts[0], ("loss", 0))
    return {
        "aim": jnp.float32(len(" ".join(concepts))),
        "loss": jnp.int32(step if kind == "loss" else 0),
        "state": jnp.int32(step if kind == "state" else 0),
    }


def start(pipeline, concepts, config, placement=None):
    return untrained.setup(pipeline, concepts, config, placement)[0], frozen(concepts)


def step(state, frozen, config):
    number = state.step + 1
    poison = {kind: jnp.where(number == frozen[kind], jnp.nan, jnp.float32(0)) for kind in ("loss", "state")}
    poison["loss"] = poison["loss"] + frozen["aim"]
    return untrained._step(state, config.seed, config.learning_rate, poison)


def start_each(pipeline, runs, config):
    state = start(pipeline, runs[0], config)[0]
    return [(state, frozen(concepts)) for concepts in runs]


@pytest.fixture
def method(monkeypatch):
    """The stand-in as the method of every run; gives the groups that were started."""
    groups = []

    def watched(pipeline, runs, config):
        groups.append([concepts[0] for concepts in runs])
        return start_each(pipeline, runs, config)

    lanes = Lanes(watched, untrained.METHOD.lanes.refused)
    monkeypatch.setattr(RunConfig, "method", dataclasses.replace(untrained.METHOD, start=start, step=step, lanes=lanes))
    return groups


class Said:
    """A progress that remembers what was said."""

    def __init__(self):
        self.lines, self.losses = [], []

    def say(self, text):
        self.lines.append(text)

    def update(self, step, loss):
        self.losses.append((step, loss))

    end = start = lambda self, *args: None


def compare(ours, alone):
    assert len(ours.metrics) == len(alone.metrics) == 4
    for told, wanted in zip(ours.metrics, alone.metrics):
        assert told.pop("method") == wanted.pop("method") == "paper"
        assert told == pytest.approx(wanted, rel=1e-5)
    assert ours.tensors == alone.tensors and ours.run == alone.run and ours.folder is None
    for name, rows in alone.per_tensor.items():
        np.testing.assert_allclose(ours.per_tensor[name], rows, 1e-4, 1e-6)
    mine, theirs, before = (flatten(p.unet.params) for p in (ours.pipeline, alone.pipeline, ours.original))
    for path, leaf in theirs.items():
        np.testing.assert_allclose(mine[path], leaf, 1e-5, 1e-6, err_msg=path)
    assert any(np.abs(np.asarray(mine[path]) - np.asarray(leaf)).max() > 1e-4 for path, leaf in before.items())


def test_each_is_the_erasure_on_its_own(method, folder):
    """In groups of two, of which the last is filled up."""
    names, said = ["star", "red circle", "blue"], Said()
    found = aegis_jax.erase_each(folder, names, config=KEYS, lanes=2, progress=said)
    assert method == [["star", "red circle", "blue", "blue"]]
    assert said.lines == ["erasing 2 at once: star, red circle", "erasing 1 at once: blue"]
    assert [step for step, _ in said.losses] == [1, 2, 3, 4] * 2
    for name, ours in zip(names, found, strict=True):
        assert ours.run.concepts == (name,)
        compare(ours, aegis_jax.erase(folder, name, config=KEYS))
    untouched = [path for path in flatten(found[0].pipeline.unet.params) if ".attn2." not in path]
    models = [flatten(each.pipeline.unet.params) for each in found]
    assert all(model[path] is models[0][path] for model in models for path in untouched)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_results_share_what_was_not_trained_wherever_it_lay(method, folder, dtype):
    """As on an accelerator, where the model waits in the host's memory, or loaded in few bits."""
    pipeline = _with_params(aegis_jax.load_pipeline(folder, dtype=dtype), jax.device_get)
    found = aegis_jax.erase_each(pipeline, ["star", "blue"], config=KEYS, lanes=2)
    models = [flatten(each.pipeline.unet.params) for each in found]
    shared = [path for path in models[0] if models[0][path] is models[1][path]]
    assert shared == [path for path in models[0] if not is_trainable(path, "kv")]


def test_one_that_cannot_start_loses_no_result(method, folder, monkeypatch):
    def refuse(pipeline, concepts, config, placement=None):
        if concepts == ["cat"]:
            raise AegisError("no cat")
        return start(pipeline, concepts, config, placement)

    monkeypatch.setattr(RunConfig, "method", dataclasses.replace(RunConfig.method, start=refuse))
    star, cat, blue = aegis_jax.erase_each(folder, ["star", "cat", "blue"], config=KEYS, lanes=1)
    assert str(cat) == "no cat" and type(cat) is AegisError
    compare(blue, aegis_jax.erase(folder, "blue", config=KEYS))
    with pytest.raises(AegisError, match="no cat"):
        aegis_jax.erase_each(folder, ["cat", "star"], config=KEYS, lanes=1)


def test_what_is_not_finite_is_told_and_the_others_go_on(method, folder):
    names, said = ["star", "heart", "dog", "blue"], Said()
    star, heart, dog, blue = aegis_jax.erase_each(folder, names, config=KEYS, lanes=4, progress=said)
    for name, ours in (("star", star), ("blue", blue)):
        compare(ours, aegis_jax.erase(folder, name, config=KEYS))
    for name, ours, when in (("heart", heart, 2), ("dog", dog, 4)):
        with pytest.raises(NonFiniteError) as alone:
            aegis_jax.erase(folder, name, config=KEYS)
        assert isinstance(ours, NonFiniteError) and str(ours) == str(alone.value) and ours.step == when
    assert all(np.isfinite(loss) for _, loss in said.losses)


def test_a_group_of_which_nothing_is_left_ends_early(method, folder):
    said = Said()
    found = aegis_jax.erase_each(folder, ["heart"] * 2, config={**KEYS, "steps": 50}, lanes=2, progress=said)
    assert [each.step for each in found] == [2, 2] and said.losses[-1][0] < 5


@pytest.mark.parametrize(
    ("keys", "names", "reason"),
    [
        ({"trainable": "noxattn"}, ["star", "heart"], "trainable=noxattn: each run has convolutions of its own"),
        ({}, ["star", ["heart", "red"]], "they erase different numbers of concepts"),
    ],
)
def test_without_lanes_one_goes_after_another_and_says_so(method, folder, keys, names, reason):
    said = Said()
    found = aegis_jax.erase_each(folder, names, config={**KEYS, **keys}, lanes=2, progress=said)
    assert len(said.lines) == 1 and f"one erasure after another, not as lanes: {reason}" in said.lines[0]
    assert method == [] and isinstance(found[1], NonFiniteError)
    compare(found[0], aegis_jax.erase(folder, "star", config={**KEYS, **keys}))


def test_a_lane_of_its_own(method, folder):
    """A run of a group comes to the same, bit by bit, in whatever company, and groups of one shape compile once."""
    run = config.merge(config.RunConfig(), KEYS, [])
    pipeline, compiled = aegis_jax.load_pipeline(folder), {}
    options = {"lanes": 3, "compiled": compiled}
    alone = dict(erase_group(pipeline, {2: ("star",)}, run, **options))
    among = dict(erase_group(pipeline, {0: ("heart",), 1: ("blue",), 2: ("star",)}, run, **options))
    assert method == [["star"] * 3, ["heart", "blue", "star"]] and len(compiled) == 1
    assert list(alone) == [2] and list(among) == [0, 1, 2] and isinstance(among[0], NonFiniteError)
    assert alone[2].metrics == among[2].metrics
    for path, move in alone[2].drift["unet"].items():
        assert move.any() and (among[2].drift["unet"][path] == move).all()
    assert width(run, 3) == 3 and width(config.merge(run, {"trainable": "full"}), 3) == 1
    with pytest.raises(AegisError, match="lanes=0"):
        width(run, 0)


def test_a_single_one_needs_no_lanes(method, folder):
    said = Said()
    aegis_jax.erase_each(folder, ["star"], config=KEYS, progress=said)
    aegis_jax.erase_each(folder, ["star", "red"], config=KEYS, lanes=1, progress=said)
    assert method == [] and said.lines == []


def test_what_is_refused(folder):
    for concepts in ("star", [], None):
        with pytest.raises(AegisError, match="give a list"):
            aegis_jax.erase_each(folder, concepts, config=KEYS)
    with pytest.raises(AegisError, match="lanes=0"):
        aegis_jax.erase_each(folder, ["star"], config=KEYS, lanes=0)
    with pytest.raises(AegisError, match="concept '  ' is empty"):
        aegis_jax.erase_each(folder, ["star", "  "], config=KEYS)


def test_a_full_device_is_one_line(folder, monkeypatch):
    said = iter(("RESOURCE_EXHAUSTED: Out of memory\nlong", "INTERNAL: x: Out of memory allocating 9 bytes.\nlong"))

    def full(*args, **more):
        raise jax.errors.JaxRuntimeError(next(said))

    monkeypatch.setattr("aegis_jax.run.lanes.erase_lanes", full)
    for count, advice in ((2, "lower lanes, or lower --config.batch"), (1, "; lower --config.batch")):
        with pytest.raises(AegisError, match="memory is full.*" + advice):
            aegis_jax.erase_each(folder, ["star", "red"], config=KEYS, lanes=count)
