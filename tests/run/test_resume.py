"""run/erase.py: going on with a run, and what is refused then."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import aegis_jax
from aegis_jax.erasure.presets import preset
from aegis_jax.errors import AegisError
from aegis_jax.run import erase as run_erase
from aegis_jax.run import loop, manifest
from aegis_jax.run.config import RunConfig
from tests.run.runs import KEYS, erase, files, metrics


def interrupt(folder, out, monkeypatch, step, **more):
    """A run that gets SIGTERM while its step `step` + 1 is being computed."""
    name = more.get("keys", {}).get("method")
    method = preset(name).method if name else RunConfig().method

    def stopping(state, frozen, config):
        if not isinstance(state.step, jax.core.Tracer) and state.step == step:  # it is traced before, to be compiled
            os.kill(os.getpid(), signal.SIGTERM)
        return method.step(state, frozen, config)

    def of_run(run):
        return dataclasses.replace(method, step=stopping) if name in (None, run.erase.method) else found(run)

    found = RunConfig.method.fget if name else None
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "method", property(of_run))
        with pytest.raises(loop.Interrupted):
            erase(folder, out, **more)


def test_resumed_is_as_uninterrupted(cheap_step, folder, tmp_path, monkeypatch, finished):
    out = tmp_path / "run"
    interrupt(folder, out, monkeypatch, 4)
    assert len(metrics(out)) == 5 and not (out / "pipeline").exists()
    assert "SIGTERM after step 5" in json.loads((out / "manifest.json").read_text())["status"]
    result = aegis_jax.erase(out=out, resume=True)  # all settings are in the folder
    assert files(out / "pipeline") == files(finished / "pipeline")
    assert metrics(out) == metrics(finished)
    assert (out / "per_tensor.safetensors").read_bytes() == (finished / "per_tensor.safetensors").read_bytes()
    assert len(result.metrics) == 7 and result.per_tensor["cosine"].shape == (7, len(result.tensors))
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


def test_resuming_a_run_that_was_stopped_while_exporting(cheap_step, folder, tmp_path, monkeypatch, finished):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        sync = os.fsync
        patch.setattr(os, "fsync", lambda fd: os.kill(os.getpid(), signal.SIGTERM) if _exporting(out) else sync(fd))
        with pytest.raises(loop.Interrupted, match="SIGTERM after step 7"):
            erase(folder, out)
    assert not list(out.glob(".*")) and not (out / "pipeline").exists()
    erase(folder, out, resume=True)
    assert files(out / "pipeline") == files(finished / "pipeline")


def _exporting(out):
    return any(path.name.endswith(".unfinished") and path.is_dir() for path in out.glob(".pipeline.*"))


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


def test_a_run_keeps_the_compute_type_that_it_started_with(finished, folder, monkeypatch):
    """What "auto" means is float32 on this CPU; gone on with on a GPU, the run stays in float32 or is refused."""
    assert json.loads((finished / "config.json").read_text())["compute_dtype"] == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert aegis_jax.erase(out=finished, resume=True).run.erase.compute_dtype == "float32"
    with pytest.raises(AegisError, match="compute_dtype was 'float32', is 'bfloat16'.*--config.compute_dtype=float32"):
        erase(folder, finished, resume=True, keys={"compute_dtype": "auto"})


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


def test_another_tokenizer_is_refused(cheap_step, folder, tmp_path, monkeypatch):
    model, out = shutil.copytree(folder, tmp_path / "model"), tmp_path / "run"
    interrupt(model, out, monkeypatch, 4)
    told = json.loads((out / "manifest.json").read_text())
    (model / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    with pytest.raises(AegisError, match="tokenizer was .*, is "):
        erase(model, out, resume=True)
    del told["model"]["tokenizer"]
    (out / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(AegisError, match="tokenizer was .*, is "):  # the checkpoint says it too
        erase(model, out, resume=True)


def test_a_run_that_recorded_no_tokenizer_yet_goes_on(cheap_step, folder, tmp_path, monkeypatch, finished):
    out, identity = tmp_path / "run", manifest.identity
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "identity", lambda pipeline: {manifest.BASE: identity(pipeline)[manifest.BASE]})
        patch.setattr(manifest, "_KEPT", {"fingerprint": manifest.BASE})
        patch.setattr(run_erase, "_older", lambda run, origin: {})
        interrupt(folder, out, monkeypatch, 4)
    assert "tokenizer" not in json.loads((out / "manifest.json").read_text())["model"]
    erase(folder, out, resume=True)
    assert files(out / "pipeline") == files(finished / "pipeline")


def test_how_often_to_save_may_change(cheap_step, folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    interrupt(folder, out, monkeypatch, 4)
    erase(folder, out, resume=True, keys={"checkpoint.every": 2})
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["6", "7"]


@pytest.mark.parametrize("what", ["missing", "not a run", "null", '["aegis_jax"]', '"aegis_jax"'])
def test_nothing_to_resume(tmp_path, what):
    if what != "missing":
        (tmp_path / "run").mkdir()
    if what not in ("missing", "not a run"):
        (tmp_path / "run" / "config.json").write_text(what)
    with pytest.raises(AegisError, match="nothing to resume"):
        aegis_jax.erase("world", "star", out=tmp_path / "run", resume=True)


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
