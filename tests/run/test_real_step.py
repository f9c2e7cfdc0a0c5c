"""The run around the real step: killed, resumed, and the same to the last bit."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import aegis_jax
from tests.run import untrained
from tests.run.runs import erase, files, metrics
from tests.run.test_resume import interrupt

# The pools of trajectories, soft tokens and Adam's moments all have to survive.
KEYS = {
    "steps": 60, "checkpoint.every": 4, "picture.images": 0, "latents.steps": 5, "trainable": "kv",
    "latents.refresh_every": 2, "soft.life": "run", "words.context": "push", "words.preserve": 1.0,
}  # fmt: skip

# Of six steps the fifth and sixth move kappa, and one of two latents is in context; trajectories are drawn in the first
# and the fifth. So the sixth hangs on a kappa and on a pool that are as the fifth left them. What takes long to compile
# is left out: soft tokens, preservation, most of the UNet.
SHORT = {
    "method": "esd+", "words.preserve": 0.0, "steps": 6, "batch": 2, "checkpoint.every": 6, "latents.steps": 3,
    "latents.refresh_every": 4,
}  # fmt: skip
SMALL = {"mid_block_type": None, "up_block_types": ["UpBlock2D"]}


def test_interrupted_and_resumed_is_as_uninterrupted(tmp_path, monkeypatch):
    folder, whole, out = untrained.write(tmp_path / "model", **SMALL), tmp_path / "whole", tmp_path / "run"
    erase(folder, whole, keys=SHORT)
    interrupt(folder, out, monkeypatch, 4, keys=SHORT)
    assert len(metrics(out)) == 5 and metrics(out)[-1]["kappa"] > 0
    aegis_jax.erase(out=out, resume=True)
    assert files(out / "pipeline") == files(whole / "pipeline")
    assert (out / "per_tensor.safetensors").read_bytes() == (whole / "per_tensor.safetensors").read_bytes()
    assert metrics(out) == metrics(whole) and len(metrics(out)) == 6


@pytest.mark.slow
def test_killed_and_resumed_is_as_uninterrupted(folder, tmp_path):
    overrides = [(key, str(value)) for key, value in KEYS.items()]
    whole, out = tmp_path / "whole", tmp_path / "run"
    aegis_jax.erase(folder, "star", overrides=overrides, out=whole)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "aegis_jax", "erase", "--model", str(folder), "--concept", "star",
            "--out", str(out), *(f"--config.{key}={value}" for key, value in overrides),
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    target = np.random.default_rng().integers(5, 50)
    lines = out / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") >= target):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    aegis_jax.erase(out=out, resume=True)
    assert files(out / "pipeline") == files(whole / "pipeline")
    assert (out / "per_tensor.safetensors").read_bytes() == (whole / "per_tensor.safetensors").read_bytes()
    assert metrics(out) == metrics(whole) and len(metrics(out)) == 60
    assert metrics(out)[-1]["drift_norm"] > 0 and metrics(out)[-1]["kappa"] > 0
