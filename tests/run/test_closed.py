"""Closed forms run like every method: command, folder, card, resume, delta. Their mathematics: tests/erasure/closed."""

import json

import numpy as np
import pytest

import aegis_jax
from aegis_jax.cli import main
from aegis_jax.erasure.compose import Merged
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.model import flatten
from aegis_jax.run.erase import with_drift
from tests.run.runs import files, metrics

KEYS = {"picture.images": 0}
KV = (".to_k.kernel", ".to_v.kernel")
MANY = (
    "a,an,the,of,in,on,and,photo,painting,red,blue,green,circle,heart,square,church,dog,cat,striped"  # of 16 dimensions
)


def erase(folder, out=None, method="uce", concepts="star", resume=False, **keys):
    overrides = [(key, str(value)) for key, value in (KEYS | {"method": method} | keys).items()]
    return aegis_jax.erase(folder, concepts, overrides=overrides, out=out, resume=resume)


def changed(before, after) -> set[str]:
    before, after = flatten(before.unet.params), flatten(after.unet.params)
    return {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}


def test_the_command(folder, tmp_path, capsys):
    """Erase two concepts jointly, read what is written, go on with it, make a delta and apply it."""
    out = tmp_path / "run"
    argv = ["erase", "--model", str(folder), "--concept", "star", "--concept", "red", "--out", str(out)]
    argv += ["--config.method=uce", "--config.preserve=blue,circle", "--config.picture.images=0"]
    assert main(argv) == 0
    assert "method   uce" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["method"], config["guide"], config["preserve"], config["lamb"]) == (
        "uce",
        [""],
        ["blue", "circle"],
        0.5,
    )
    assert "eta" not in config and "grp.omega" not in config
    (line,) = metrics(out)
    assert line.keys() == {"step", "method", "L_e", "L_e_before", "L_p", "drift_norm"}
    assert 0 < line["L_e"] < line["L_e_before"] and line["L_p"] < line["L_e_before"]
    card = (out / "pipeline" / "README.md").read_text()
    assert "2 concepts jointly erased towards '', holding 'blue', 'circle'" in card and "| lamb | 0.5 |" in card
    assert 'without "star" and "red"' in card and "It differs from that preset in `preserve=" in card
    before, after = load_pipeline(folder), load_pipeline(out / "pipeline")
    moved = changed(before, after)
    assert moved and all(path.endswith((".attn2.to_k.kernel", ".attn2.to_v.kernel")) for path in moved)
    assert main(["erase", "--resume", "--out", str(out)]) == 0
    assert main(argv) == 2 and "exists" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    delta, applied = tmp_path / "delta.safetensors", tmp_path / "applied"
    assert main(["delta", str(out), "--base", str(folder), "--out", str(delta)]) == 0
    assert main(["apply", str(delta), "--model", str(folder), "--out", str(applied)]) == 0
    assert files(applied) == files(out / "pipeline")


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "oce"])
def test_what_is_stored_is_what_was_solved(folder, tmp_path, method):
    """Also by a run that goes on from its checkpoint, and by one without a folder."""
    out, alone = tmp_path / "run", erase(folder, method=method)
    found = erase(folder, out, method=method)
    assert found.metrics[0] | {"steps_per_s": 0} == alone.metrics[0] | {"steps_per_s": 0}
    assert found.per_tensor.keys() == {"L_e", "drift"} and found.per_tensor["drift"].shape == (1, len(found.tensors))
    assert (found.per_tensor["drift"] > 0).all()
    export = files(out / "pipeline")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    aegis_jax.erase(out=out, resume=True)
    assert files(out / "pipeline") == export
    for result in (found, alone):
        for path, leaf in flatten(result.pipeline.unet.params).items():
            np.testing.assert_array_equal(leaf, flatten(found.pipeline.unet.params)[path])


def test_the_concepts_keys_and_values_become_the_guides(folder):
    """At lamb -> 0 exactly; preserved ones stay where they were."""
    found = erase(folder, lamb=1e-9, guide="circle", preserve="blue,red circle")
    before = load_pipeline(folder)
    embedding = lambda text, k: np.asarray(aegis_jax.encode_text(before, [text]))[0, k]  # noqa: E731
    for path in changed(before, found.pipeline):
        old, new = (np.asarray(flatten(p.unet.params)[path]) for p in (before, found.pipeline))
        scale = np.abs(embedding("star", 1) @ old).max()
        np.testing.assert_allclose(embedding("star", 1) @ new, embedding("circle", 1) @ old, atol=1e-4 * scale)
        for text, last in (("blue", 1), ("red circle", 2)):
            np.testing.assert_allclose(embedding(text, last) @ new, embedding(text, last) @ old, atol=1e-4 * scale)
    assert found.metrics[0]["L_e"] < 1e-8 * found.metrics[0]["L_e_before"]


def test_a_guide_of_its_own_for_each_concept_and_any_order(folder):
    one = erase(folder, concepts=["star", "red"], guide="circle,blue")
    other = erase(folder, concepts=["red", "star"], guide="blue,circle")
    crossed = erase(folder, concepts=["star", "red"], guide="blue,circle")
    assert one.metrics[0]["L_e"] == pytest.approx(other.metrics[0]["L_e"], rel=1e-4)
    path = min(changed(one.original, one.pipeline))
    kernels = [np.asarray(flatten(found.pipeline.unet.params)[path]) for found in (one, other, crossed)]
    np.testing.assert_allclose(kernels[0], kernels[1], 1e-4, 1e-6)
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-3


def test_erasing_a_text_to_itself_changes_nothing(folder):
    for method in ("uce", "speed"):
        found = erase(folder, method=method, guide="star")
        assert not changed(found.original, found.pipeline) and found.metrics[0]["drift_norm"] == 0


@pytest.mark.parametrize(("projections", "kinds"), [("k", {"to_k"}), ("v", {"to_v"}), ("kv", {"to_k", "to_v"})])
def test_only_the_chosen_projections_change(folder, projections, kinds):
    found = erase(folder, projections=projections)
    assert {path.split(".")[-2] for path in changed(found.original, found.pipeline)} == kinds
    assert {key.split(".")[-2] for key in found.tensors} == kinds


def test_several_runs_go_one_after_another(folder):
    config = {**KEYS, "method": "uce"}
    star, red = aegis_jax.erase_each(folder, ["star", "red"], config=config)
    assert star.run.concepts == ("star",) and red.metrics[0]["L_e"] != star.metrics[0]["L_e"]


def test_erasures_merged_into_one_model_do_to_each_concept_what_its_own_did(folder):
    """Two runs' drifts through erasure/compose.py, and back into the pipeline."""
    before, total, own = load_pipeline(folder), Merged(16), {}
    for concept, guide in (("star", "circle"), ("red", "blue")):
        after = flatten(erase(before, concepts=concept, guide=guide).pipeline.unet.params)
        kernels = {path: leaf for path, leaf in flatten(before.unet.params).items() if ".attn2.to_" in path}
        change = {path: np.asarray(after[path]) - np.asarray(w) for path, w in kernels.items() if path.endswith(KV)}
        rows = np.asarray(aegis_jax.encode_text(before, [concept]))[0, 1:2]
        total.add(change, rows)
        own[concept] = change, rows
    merged = with_drift(before, {"unet": total.solve()})
    for change, rows in own.values():
        for path, d in change.items():
            w = np.asarray(flatten(before.unet.params)[path])
            np.testing.assert_allclose(rows @ flatten(merged.unet.params)[path], rows @ (w + d), 1e-3, 1e-4)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"steps": 5}, ["steps=5", "solved once"]),
        ({"lamb": -1}, ["lamb=-1.0", "0 or more"]),
        ({"lamb": "nan"}, ["lamb=nan"]),
        ({"tokens": "first"}, ["tokens='first'", "last | from_last | all"]),
        ({"projections": "q"}, ["projections='q'", "kv | k | v"]),
        ({"eta": 2}, ["unknown config key 'eta'"]),
        ({"guide": "a,b"}, ["guide names 2 texts for 1 concepts"]),
        ({"preserve": "blue,star"}, ["preserve names 'star'", "to be erased"]),
        ({"preserve": "blue " * 20}, ["preserve: 'blue", "20 tokens", "room for 14"]),
        ({"concepts": " "}, ["concept", "is empty"]),
        ({"concepts": "star " * 20}, ["20 tokens", "room for 14 besides BOS and EOS"]),
        ({"method": "oce", "generic_words": -1}, ["generic_words=-1", "0 or more"]),
        ({"method": "rece", "epochs": -1}, ["epochs=-1"]),
        ({"method": "rece", "regular_scale": 0}, ["regular_scale=0.0", "more than 0"]),
        ({"method": "speed", "threshold": 0}, ["threshold=0.0", "more than 0"]),
        (
            {"method": "speed", "threshold": 1e-12, "aug_num": 0, "preserve": MANY},
            ["preserve leaves no direction free at threshold"],
        ),
        ({"mesh.data": 2}, ["mesh"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, tmp_path, keys, parts):
    keys = dict(keys)
    with pytest.raises(AegisError) as error:
        erase(folder, tmp_path / "run", concepts=keys.pop("concepts", "star"), **keys)
    assert all(part in str(error.value) for part in parts), error.value
    assert not (tmp_path / "run").exists()


def test_lists_that_are_empty_or_hold_no_text(folder):
    for config, part in (
        ({"guide": []}, "guide="),
        ({"preserve": [3]}, "a list of texts"),
        ({"preserve": "blue"}, "a list of texts"),
    ):
        with pytest.raises(AegisError, match=part):
            aegis_jax.erase(folder, "star", config={**KEYS, "method": "uce", **config})
    with pytest.raises(AegisError, match="no concept given"):
        aegis_jax.erase(folder, [], config={**KEYS, "method": "uce"})


def test_weights_that_are_not_finite_are_named(folder):
    pipeline = load_pipeline(folder)
    path = next(path for path in flatten(pipeline.unet.params) if path.endswith("attn2.to_v.kernel"))
    node = pipeline.unet.params
    for part in path.split(".")[:-1]:
        node = node[int(part) if part.isdigit() else part]
    node["kernel"] = node["kernel"].at[0, 0].set(np.nan)
    with pytest.raises(AegisError, match="attn2.to_v.kernel is not finite"):
        erase(pipeline, method="speed")


def test_another_checkpoint_is_refused(folder, tmp_path):
    erase(folder, tmp_path / "run")
    with pytest.raises(AegisError, match="lamb was 0.5, is 0.7"):
        erase(folder, tmp_path / "run", resume=True, lamb=0.7)
