"""The whole of it with real erasures: workers of the embedded world, one killed on the way."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aegis_jax
from aegis_jax.batch.status import text
from aegis_jax.batch.store import open_store

ROOT = Path(aegis_jax.__file__).parent.parent
COMMAND = [
    sys.executable, "-m", "aegis_jax", "batch", "plan.csv", "--model", "world", "--lanes", "2", "--lease", "20",
    "--config.method=esd", "--config.steps=3", "--config.batch=2", "--config.latents.steps=4",
]  # fmt: skip


def results(folder):
    store = open_store(folder)
    names = [name for name in store.names("results") if name.endswith(".safetensors")]
    return {name: store.read(f"results/{name}")[0] for name in names}


@pytest.mark.slow
def test_killed_workers_come_to_what_an_undisturbed_one_does(tmp_path):
    (tmp_path / "plan.csv").write_text("name,words\nstar,\nred,\nring,\nblue,navy\nstriped,\n")
    # As many threads as local.sh gives each of its two: with others sums are rounded otherwise.
    threads = str(max(len(os.sched_getaffinity(0)) // 2, 1))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    options = {"cwd": tmp_path, "text": True}
    calm = {**options, "env": env | {"PJRT_NPROC": threads, "OMP_NUM_THREADS": threads}}
    subprocess.run([*COMMAND, "--out", "calm"], check=True, capture_output=True, **calm)
    script = [ROOT / "launch" / "local.sh", "2", *COMMAND, "--out", "wild"]
    workers, killed = subprocess.Popen(script, stdout=subprocess.PIPE, env=env, **options), []
    lines = []
    for line in workers.stdout:
        lines.append(line)
        found = re.match(r"\[1\] worker \S+-(\d+)-\w+: a plan of", line)
        if found:
            pid = int(found[1])
        if re.match(r"\[1\] step 2/3", line) and not killed:
            os.kill(pid, 9)
            killed.append(pid)
    assert workers.wait() == 0 and killed, "".join(lines)
    assert any("was ended by signal 9, starting it again" in line for line in lines)
    wild, calm = results(tmp_path / "wild"), results(tmp_path / "calm")
    assert wild == calm and len(calm) == 5
    assert "done      5" in text(open_store(tmp_path / "wild"), now=0.0)
    star = next((tmp_path / "wild" / "results").glob("star-*.safetensors"))
    assert aegis_jax.apply_delta("world", star)
