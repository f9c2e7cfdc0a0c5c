"""run/erase.py: the run folder, resuming, and what is refused."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aegis_jax
from aegis_jax.erasure.config import EraseConfig
from aegis_jax.errors import AegisError
from aegis_jax.models.model import flatten, unflatten
from aegis_jax.run import erase as run_erase
from aegis_jax.run import loop
from aegis_jax.run.folder import disk_errors

KEYS = {"steps": 7, "checkpoint.every": 3, "picture.images": 0, "trainable": "kv"}


def erase(folder, out, resume=False, **more):
    keys = {**KEYS, **more.pop("keys", {})}
    overrides = [(key, str(value)) for key, value in keys.items()]
    return aegis_jax.erase(folder, "star", overrides=overrides, out=out, resume=resume, **more)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def metrics(path):
    """The lines of metrics.jsonl without the rate, the one value that a clock has a say in."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("steps_per_s") > 0 for line in lines)
    return lines


@pytest.fixture
def finished(cheap_step, folder, tmp_path):
    erase(folder, tmp_path / "finished")
    return tmp_path / "finished"


def test_the_run_folder(cheap_step, folder, tmp_path):
    result = erase(folder, tmp_path / "run")
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "config.json", "manifest.json", "metrics.jsonl", "pipeline",
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["6", "7"]
    assert [line["step"] for line in metrics(run)] == list(range(1, 8))
    assert [m["step"] for m in result.metrics] == list(range(1, 8))
    config = json.loads((run / "config.json").read_text())
    assert config["aegis_jax"] == aegis_jax.__version__
    assert (config["model"], config["concepts"], config["steps"]) == (str(folder), ["star"], 7)
    assert result.folder == run


def test_the_result_is_the_original_plus_the_drift(cheap_step, folder, tmp_path):
    result = erase(folder, tmp_path / "run")
    before = flatten(aegis_jax.load_pipeline(folder).unet.params)
    for pipeline in (result.pipeline, aegis_jax.load_pipeline(tmp_path / "run" / "pipeline")):
        after = flatten(pipeline.unet.params)
        moved = {k for k in before if not np.array_equal(before[k], after[k])}
        assert moved == {k for k in before if ".attn2.to_k." in k or ".attn2.to_v." in k}
    # Seven Adam steps move no coordinate further than about seven times the rate.
    gap = max(np.abs(np.asarray(after[k] - before[k])).max() for k in moved)
    assert 0 < gap <= 7.1 * EraseConfig().learning_rate


def test_the_manifest_tells_what_came_in_and_went_out(finished, folder):
    manifest = json.loads((finished / "manifest.json").read_text())
    digest = {name: hashlib.sha256(content).hexdigest() for name, content in files(finished / "pipeline").items()}
    assert manifest["result"] == digest
    weights = "unet/diffusion_pytorch_model.safetensors"
    source = manifest["model"]["files"]
    assert source[weights] == hashlib.sha256((folder / weights).read_bytes()).hexdigest()
    assert manifest["status"] == "finished" and manifest["seed"] == 0
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["device"]["platform"] == "cpu"


def test_the_model_card_names_the_concept_and_no_folder(finished):
    card = (finished / "pipeline" / "README.md").read_text()
    assert '# pipeline without "star"' in card and "| steps | 7 |" in card
    assert str(finished.parent) not in card


def test_what_was_measured_is_in_the_card(cheap_step, folder, tmp_path):
    def measure(run, before, after):
        assert run.concepts == ("star",)
        gone, kept = (flatten(p.unet.params)["conv_in.bias"] for p in (before, after))
        np.testing.assert_array_equal(gone, kept)
        return "before 98 %\nafter   1 %"

    result = erase(folder, tmp_path / "run", measure=measure)
    card = tmp_path / "run" / "pipeline" / "README.md"
    assert result.measured in card.read_text() and "Not measured" not in card.read_text()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["result"]["README.md"] == hashlib.sha256(card.read_bytes()).hexdigest()


def test_without_a_folder_nothing_is_written(cheap_step, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = erase(folder, None)
    assert result.folder is None and len(result.metrics) == 7 and not list(tmp_path.iterdir())
    kept = erase(folder, tmp_path / "run")
    ours, theirs = flatten(result.pipeline.unet.params), flatten(kept.pipeline.unet.params)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_same_seed_same_result_and_other_seed_another(cheap_step, folder, tmp_path, finished):
    erase(folder, tmp_path / "again")
    assert files(tmp_path / "again" / "pipeline") == files(finished / "pipeline")
    assert metrics(tmp_path / "again") == metrics(finished)
    erase(folder, tmp_path / "other", keys={"seed": 1})
    assert metrics(tmp_path / "other") != metrics(finished)


def test_off_the_device_makes_no_difference(cheap_step, folder, tmp_path, monkeypatch, finished):
    """As on an accelerator, where UNet and VAE wait in the host's memory."""
    monkeypatch.setattr(run_erase, "_off_device", lambda pipeline: run_erase._with_params(pipeline, jax.device_get))
    result = erase(folder, tmp_path / "run")
    assert files(tmp_path / "run" / "pipeline") == files(finished / "pipeline")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(result.original.unet.params))
    kept = erase(folder, None)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(kept.pipeline.unet.params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_pipeline_loaded_in_fewer_bits_is_exported_in_full(cheap_step, folder, tmp_path, dtype):
    """What comes out is the file's own tensors plus the drift, not their rounding; changes in memory are kept."""
    pipeline = aegis_jax.load_pipeline(folder, dtype=jnp.dtype(dtype))
    key = "conv_in.bias"
    own = flatten(pipeline.unet.params) | {key: flatten(pipeline.unet.params)[key] + 1}
    pipeline = dataclasses.replace(pipeline, unet=dataclasses.replace(pipeline.unet, params=unflatten(own)))
    erase(pipeline, tmp_path / "run", keys={"learning_rate": 1e-9})
    before, after = (flatten(aegis_jax.load_pipeline(p).unet.params) for p in (folder, tmp_path / "run" / "pipeline"))
    for path, leaf in after.items():
        wanted = own[key].astype(np.float32) if path == key else before[path]
        np.testing.assert_allclose(leaf, wanted, atol=1e-7, rtol=1e-6, err_msg=path)


def test_a_pipeline_in_memory_can_be_given(cheap_step, folder, tmp_path, finished):
    erase(aegis_jax.load_pipeline(folder), tmp_path / "run")
    assert files(tmp_path / "run" / "pipeline") == files(finished / "pipeline")


@pytest.mark.parametrize("kind", ["config", "dict", "file"])
def test_ways_to_give_the_settings(cheap_step, folder, tmp_path, kind):
    path = tmp_path / "c.py"
    keys = {"steps": 2, "trainable": "kv"}
    path.write_text(f"import ml_collections as m\nget_config = lambda: m.ConfigDict({keys})\n")
    config = {"config": EraseConfig(**keys), "dict": keys, "file": path}[kind]
    assert len(aegis_jax.erase(folder, ["star", "heart"], config=config).metrics) == 2


def interrupt(folder, out, monkeypatch, step):
    """A run that gets SIGTERM while its step `step` + 1 is being computed."""
    honest = run_erase.erase_step

    def erase_step(state, frozen, config):
        if int(state.step) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(state, frozen, config)

    with monkeypatch.context() as patch:
        patch.setattr(run_erase, "erase_step", erase_step)
        with pytest.raises(loop.Interrupted):
            erase(folder, out)


def test_resumed_is_as_uninterrupted(cheap_step, folder, tmp_path, monkeypatch, finished):
    out = tmp_path / "run"
    interrupt(folder, out, monkeypatch, 4)
    assert len(metrics(out)) == 5 and not (out / "pipeline").exists()
    assert "SIGTERM after step 5" in json.loads((out / "manifest.json").read_text())["status"]
    result = aegis_jax.erase(out=out, resume=True)  # all settings are in the folder
    assert files(out / "pipeline") == files(finished / "pipeline")
    assert metrics(out) == metrics(finished)
    assert len(result.metrics) == 7
    assert len(json.loads((out / "manifest.json").read_text())["resumed"]) == 1


def test_metrics_that_are_no_json_are_named(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:9], *lines[3:]]))
    with pytest.raises(AegisError, match="metrics.jsonl, line 3"):
        aegis_jax.erase(out=out, resume=True)


def test_a_config_file_does_not_send_a_resumed_run_to_another_model(finished, folder, tmp_path):
    path = tmp_path / "c.py"
    keys = {"model": "some/where", "concepts": ["star"], "steps": 7, "trainable": "kv"}
    path.write_text(f"import ml_collections as m\nget_config = lambda: m.ConfigDict({keys})\n")
    result = aegis_jax.erase(config=path, out=finished, resume=True)
    assert result.run.model == str(folder)


def test_a_broken_manifest_is_named(finished, folder):
    (finished / "manifest.json").write_text("{")
    with pytest.raises(AegisError, match="manifest.json is not valid JSON"):
        erase(folder, finished, resume=True)


@pytest.mark.parametrize("text", ['{"status": "finished"}', '{"model": 3}', '{"model": {"fingerprint": "a"}}'])
def test_a_manifest_of_something_else_is_named(finished, tmp_path, text):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "manifest.json").write_text(text)
    with pytest.raises(AegisError, match="manifest.json does not tell of a run"):
        aegis_jax.erase(out=out, resume=True)


def test_resuming_a_finished_run_changes_nothing(finished, folder):
    before = files(finished)
    result = erase(folder, finished, resume=True)
    assert files(finished) == before and len(result.metrics) == 7


def test_resuming_a_run_whose_export_failed(cheap_step, folder, tmp_path, monkeypatch, finished):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_erase, "save_pipeline", no_space)
        with pytest.raises(AegisError, match="no space left in .*run.*--resume"):
            erase(folder, out)
    assert (out / "checkpoints" / "7").is_dir()
    erase(folder, out, resume=True)
    assert files(out / "pipeline") == files(finished / "pipeline")


@pytest.mark.parametrize(
    ("keys", "part"),
    [({"learning_rate": 1e-4}, "learning_rate was 1e-05, is 0.0001"), ({"seed": 3}, "seed was 0")],
)
def test_other_settings_are_refused(finished, folder, keys, part):
    before = files(finished)
    with pytest.raises(AegisError, match=part):
        erase(folder, finished, resume=True, keys=keys)
    assert files(finished) == before


def test_another_concept_is_refused(finished, folder):
    with pytest.raises(AegisError, match="concepts was .'star'., is .'heart'."):
        aegis_jax.erase(folder, "heart", out=finished, resume=True)


def test_another_base_model_is_refused(cheap_step, folder, tmp_path, monkeypatch):
    from tests.run import untrained

    out = tmp_path / "run"
    interrupt(folder, out, monkeypatch, 4)
    other = untrained.write(tmp_path / "pipeline", seed=1)
    with pytest.raises(AegisError, match="base model was .*, is "):
        erase(other, out, resume=True)


def test_how_often_to_save_may_change(cheap_step, folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    interrupt(folder, out, monkeypatch, 4)
    erase(folder, out, resume=True, keys={"checkpoint.every": 2})
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["6", "7"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(cheap_step, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_STEP", json.dumps({"loss": 5}))
    out = tmp_path / "run"
    with pytest.raises(AegisError, match="step 5: L_e"):
        erase(folder, out)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["3"]
    assert [line["L_e"] is None for line in metrics(out)] == [False] * 4 + [True]
    assert not (out / "pipeline").exists()


def test_a_folder_that_exists_is_refused(cheap_step, folder, tmp_path, finished):
    before = files(finished)
    with pytest.raises(AegisError, match="exists.*--resume.*--overwrite"):
        erase(folder, finished)
    assert files(finished) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AegisError, match="is a file"):
        erase(folder, tmp_path / "file")


def test_overwriting_replaces_the_run_and_nothing_else(finished, folder):
    (finished / "notes.txt").write_text("mine")
    erase(folder, finished, overwrite=True, keys={"steps": 2})
    assert (finished / "notes.txt").read_text() == "mine"
    assert len(metrics(finished)) == 2
    assert [p.name for p in (finished / "checkpoints").iterdir()] == ["2"]


def test_a_folder_that_is_no_run_is_not_overwritten(cheap_step, folder, tmp_path):
    home = tmp_path / "home"
    (home / "pipeline").mkdir(parents=True)
    (home / "pipeline" / "thesis.tex").write_text("mine")
    with pytest.raises(AegisError, match="holds no run"):
        erase(folder, home, overwrite=True)
    assert (home / "pipeline" / "thesis.tex").read_text() == "mine"


def test_the_model_of_a_run_is_not_overwritten_by_it(finished):
    before = files(finished)
    with pytest.raises(AegisError, match="lies inside"):
        erase(finished / "pipeline", finished, overwrite=True)
    assert files(finished) == before


def test_bad_input_leaves_an_existing_run_alone(finished, tmp_path):
    before = files(finished)
    with pytest.raises(AegisError):
        erase(tmp_path / "nowhere", finished, overwrite=True)
    assert files(finished) == before


@pytest.mark.parametrize("what", ["missing", "not a run", "null", '["aegis_jax"]', '"aegis_jax"'])
def test_nothing_to_resume(tmp_path, what):
    if what != "missing":
        (tmp_path / "run").mkdir()
    if what[0] in 'n["':
        (tmp_path / "run" / "config.json").write_text(what)
    with pytest.raises(AegisError, match="nothing to resume"):
        aegis_jax.erase("world", "star", out=tmp_path / "run", resume=True)


def test_too_little_space_is_refused_first(cheap_step, folder, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(AegisError, match="no space left for .*checkpoints need"):
        erase(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "part"),
    [({"picture.steps": 1001}, "steps = 1001"), ({"picture.guidance": "nan"}, "guidance = nan"), ({}, "sample_size")],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_training(cheap_step, folder, tmp_path, keys, part):
    pipeline = aegis_jax.load_pipeline(folder)
    if not keys:
        unet = dataclasses.replace(pipeline.unet, config=pipeline.unet.config | {"sample_size": None})
        pipeline = dataclasses.replace(pipeline, unet=unet)
    with pytest.raises(AegisError, match=f"picture: .*{part}.*picture.images=0"):
        erase(pipeline, tmp_path / "run", keys={"picture.images": 1, **keys})
    assert not (tmp_path / "run").exists()


def test_disk_errors_pass_others_on(tmp_path):
    with pytest.raises(AegisError, match="no space left"):
        with disk_errors(tmp_path):
            raise ValueError("RESOURCE_EXHAUSTED: write failed [OS error 28: No space left on device]")
    with pytest.raises(ValueError, match="^other$"):
        with disk_errors(tmp_path):
            raise ValueError("other")


def start(folder, out, seconds):
    """A run in a process of its own, `seconds` a step, and wait until its third step is recorded."""
    keys = {**KEYS, "steps": 40, "checkpoint.every": 2}
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tests.run.untrained", "erase", "--model", str(folder),
            "--concept", "star", "--out", str(out), *(f"--config.{k}={v}" for k, v in keys.items()),
        ],
        env={**os.environ, "FAKE_STEP": json.dumps({"seconds": seconds})},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = out / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (lines.exists() and lines.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    return process


def finish(folder, out, how):
    keys = {**KEYS, "steps": 40, "checkpoint.every": 2}
    return erase(folder, out, keys=keys, **how)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_ended_from_outside_and_resumed(cheap_step, folder, tmp_path, signum):
    """kill -9 at any moment, or SIGTERM: the resumed run ends byte for byte as one left alone."""
    out = tmp_path / "run"
    process = start(folder, out, seconds=0.05)
    time.sleep(np.random.default_rng().uniform(0, 1))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    if signum == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert f"aegis erase --resume --out {out}" in errors and "Traceback" not in errors
        step = len(metrics(out))
        assert (out / "checkpoints" / str(step)).is_dir() and f"after step {step}" in errors
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (out / "pipeline").exists()
    finish(folder, out, {"resume": True})
    finish(folder, tmp_path / "whole", {})
    assert files(out / "pipeline") == files(tmp_path / "whole" / "pipeline")
    assert metrics(out) == metrics(tmp_path / "whole")


def test_the_worlds_settings_are_taken_however_it_is_named():
    wanted = run_erase.settings("world", "red", None)
    overrides = [("model", "world"), ("concepts", "red")]
    assert run_erase.settings(None, None, None, overrides) == wanted
    assert run_erase.settings("world", None, None, overrides[1:]) == wanted != run_erase.settings("world", "star", None)
