"""`aegis batch` from the command line, with the stand-in for a step: what it makes, tells and refuses."""

import dataclasses
import json
import os
import shlex
import shutil

import pytest

import aegis_jax
from aegis_jax.batch import console, erasing
from aegis_jax.cli import main
from aegis_jax.models.model import flatten
from aegis_jax.run.config import RunConfig
from tests.run.test_lanes import KEYS, method  # noqa: F401

SETTINGS = [f"--config.{key}={value}" for key, value in KEYS.items() if not key.startswith("picture")]


@pytest.fixture
def batch(folder, tmp_path, capsys):
    """batch(plan text, *options, out) -> (exit code, standard output, standard error)."""

    def run(text, *options, out="out"):
        (tmp_path / "plan.csv").write_text(text)
        argv = ["batch", tmp_path / "plan.csv", "--model", folder, "--out", tmp_path / out, *SETTINGS, *options]
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run


def results(folder):
    return {path.name: path.read_bytes() for path in (folder / "results").iterdir()}


def test_a_file_for_each_that_makes_what_its_erasure_makes(batch, method, folder, tmp_path):  # noqa: F811
    """One that fails is told, also by the exit code, and the same command again changes nothing."""
    plan = "name,words,seed\nstar,,\nheart,,\nred,circle,\nblue,,\nstar,,1\n"
    code, out, err = batch(plan, "--lanes", "2")
    assert code == 1 and out.startswith("done     4 of 5\nfailed   heart: step 2: L_e is not finite, the run was")
    assert f"results  {tmp_path}/out/results\napply    aegis apply {tmp_path}/out/results/star-" in out
    assert "a plan of 5 erasures from pipeline" in err and "heart: step 2: L_e is not finite" in err
    assert all(len(group) == 2 for group in method) and len(method) == 4  # heart is not tried again
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "done").iterdir()]
    assert len(records) == 4 and len(results(tmp_path / "out")) == 8
    for record in records:
        name = record["result"].rpartition("-")[0].removeprefix("results/")
        assert name == record["concepts"][0] and record["tensors"] == 8 and record["seconds"] > 0
        lines = (tmp_path / "out" / record["files"][0]).read_text().splitlines()
        assert len(lines) == 4 and json.loads(lines[-1]) == record["last"]
    red = next(record for record in records if record["concepts"] == ["red", "circle"])
    erased = aegis_jax.apply_delta(folder, tmp_path / "out" / red["result"])
    alone = aegis_jax.erase(folder, ["red", "circle"], config=KEYS)
    theirs = flatten(alone.pipeline.unet.params)
    assert any((theirs[path] != leaf).any() for path, leaf in flatten(alone.original.unet.params).items())
    for path, leaf in flatten(erased.unet.params).items():
        assert abs(leaf - theirs[path]).max() < 1e-6, path
    assert (
        'without "red" and "circle"' in aegis_jax.io.delta.read_delta(tmp_path / "out" / red["result"]).metadata["card"]
    )
    before = results(tmp_path / "out")
    code, again, _ = batch(plan, "--lanes", "2")
    assert (code, again, len(method)) == (1, out, 4) and results(tmp_path / "out") == before
    assert main(["batch", "status", str(tmp_path / "out")]) == 0


def test_whoever_did_it_in_whatever_company_the_bytes_are_the_same(batch, method, tmp_path, monkeypatch):  # noqa: F811
    plan = "name\nstar\nred\nblue\ncircle\ndot\n"
    assert batch(plan, "--lanes", "4", out="one")[0] == 0
    groups = len(method)
    # Half of them by a worker that is stopped, the others by a second one.
    whole, stop = erasing.Eraser._result, []

    def stopped(self, row, erased):
        stop.append(row)
        if len(stop) == 3:
            raise KeyboardInterrupt
        return whole(self, row, erased)

    monkeypatch.setattr(erasing.Eraser, "_result", stopped)
    assert batch(plan, "--lanes", "4", out="two")[0] == 130
    assert batch(plan, "--lanes", "4", out="two")[0] == 0
    assert len(method) > 2 * groups  # one group was begun again
    assert results(tmp_path / "one") == results(tmp_path / "two") and len(results(tmp_path / "one")) == 10


def test_groups_of_one_shape_compile_once(batch, method, monkeypatch):  # noqa: F811
    from aegis_jax.erasure import lanes

    compiled, before = [], lanes.compiled_step

    def watched(*args):
        compiled.append(args)
        return before(*args)

    monkeypatch.setattr(lanes, "compiled_step", watched)
    code, _, err = batch("name,steps\nstar,\nred,\nblue,\ncircle,\ndot,5\n", "--lanes", "2")
    assert code == 0 and len(method) == 3 and len(compiled) == err.count("compiling") == 2


def test_where_there_are_no_lanes_one_goes_after_another(batch, method, monkeypatch):  # noqa: F811
    from aegis_jax.run import erase

    compiled = []
    monkeypatch.setattr(erase, "_compile", lambda *args: compiled.append(args))
    monkeypatch.setattr(RunConfig, "method", dataclasses.replace(RunConfig.method, lanes=None))
    code, out, _ = batch("name\nstar\nred\n")
    assert code == 0 and method == [] and len(compiled) == 1


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("name\nstar\nred\n\nblue,x\n", [], ["plan.csv: line 5: 2 cells, but 1 columns"]),
        (
            "name,words\nstar,\n" + "star " * 40 + ",\nred," + "a " * 40,
            [],
            ["line 3: concept 'star", "line 4: concept 'a"],
        ),
        ("name,words,steps\nstar,a;b;c,1\n", [], ["line 2: steps=1 x batch=1 give 1 latents for 4 concepts"]),
        ("name\nstar\n", ["--config.stpes=5"], ["'stpes'", "'steps'"]),
        ("name\nstar\n", ["--config.picture.images=0"], ["'picture.images' is not the method's"]),
        ("name\nstar\n", ["--lanes", "0"], ["--lanes 0"]),
        ("name\nstar\n", ["--lease", "0"], ["--lease 0"]),
        ("name\nstar\n", ["--out", "s3://bucket/x"], ["s3://bucket/x", "gs://"]),
        ("name\nstar\n", ["--variant", "fp16"], ["fp16"]),
        ("name\nstar\n", ["--model", "nowhere"], ["nowhere"]),
        ("name\nstar\n", ["extra"], ["extra"]),
    ],
)
def test_bad_input_is_told_before_anything_is_written(batch, tmp_path, text, options, parts):
    code, out, err = batch(text, *options)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("aegis: error: ")
    for part in parts:
        assert part in err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.csv"]


def test_concepts_of_closed_forms_are_looked_at_beforehand_too(folder, tmp_path, capsys):
    lines = [{"name": "star"}, {"name": "red", "guide": ["sky", "sea"]}, {"name": "star " * 40}]
    plan = tmp_path / "plan.jsonl"
    plan.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["batch", plan, "--model", folder, "--out", tmp_path / "out", "--config.method=uce"]
    assert main([str(a) for a in argv]) == 2
    told = capsys.readouterr().err
    assert "line 2: guide names 2 texts for 1 concepts" in told and "line 3: concept 'star" in told
    assert told.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_plan_that_has_changed_is_refused(batch, method, tmp_path):  # noqa: F811
    assert batch("name\nstar\n")[0] == 0
    before = sorted(tmp_path.rglob("*"))
    code, out, err = batch("name\nstar\nred\n")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "another plan, of 1 rows ('red' not among them)" in err and "are another plan file" in err
    assert "other settings (steps was 4, is 9)" in batch("name\nstar\n", "--config.steps=9")[2]
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    assert "holds no batch: name another folder" in batch("name\nstar\n", out="mine")[2]


def test_status_refuses_what_is_no_batch(capsys, tmp_path):
    assert main(["batch", "status", str(tmp_path)]) == 2
    assert "holds no batch" in capsys.readouterr().err


def test_a_full_disk_is_no_concepts_fault(batch, method, tmp_path, monkeypatch):  # noqa: F811
    from aegis_jax.batch import erasing

    def full(*args, **more):
        raise aegis_jax.AegisError("no space left while writing") from OSError(28, "No space left on device")

    monkeypatch.setattr(erasing, "write_drift", full)
    code, _, err = batch("name\nstar\nred\n")
    assert code == 2 and "no space left" in err
    monkeypatch.undo()


@pytest.mark.parametrize("fate", ["touched", "moved", "cut off"])
def test_a_base_that_goes_meanwhile_is_no_concepts_fault(batch, method, folder, tmp_path, monkeypatch, fate):  # noqa: F811
    """Nor of those that another worker is at: the claims are free at once, and the same command goes on."""
    base = shutil.copytree(folder, tmp_path / "base")
    file, aside = base / "unet/diffusion_pytorch_model.safetensors", tmp_path / "aside"
    status, whole = file.stat(), erasing.write_drift

    def gone(*args, **more):
        if fate == "touched":
            os.utime(file, ns=(0, status.st_mtime_ns + 1))
        elif fate == "moved":
            file.rename(aside)
        else:
            os.truncate(file, status.st_size - 1)
        return whole(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(erasing, "write_drift", gone)
        code, out, err = batch("name\nstar\nred\n", "--model", base)
    assert code == 2 and out == "" and f"{file} {'does not exist' if fate == 'moved' else 'has changed'}" in err
    assert not list((tmp_path / "out").glob("failed/*")) and not list((tmp_path / "out").glob("attempts/*"))
    if fate == "moved":
        aside.rename(file)
    elif fate == "cut off":
        shutil.copy(folder / "unet" / file.name, file)
    assert batch("name\nstar\nred\n", "--model", base)[0] == 0


def test_a_mesh_of_a_config_file_is_refused_before_anything_is_written(batch, method, tmp_path):  # noqa: F811
    config = tmp_path / "mesh.py"
    keys = {"batch": 2, "mesh": {"data": 2}}
    config.write_text(f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({keys})\n")
    code, out, err = batch("name\nstar\n", "--config", config)
    assert code == 2 and out == "" and err.count("\n") == 1 and "mesh.data=2 x mesh.fsdp=1: a batch has no mesh" in err
    assert not (tmp_path / "out").exists()


def test_the_command_that_is_printed_can_be_typed(batch, method, folder, tmp_path):  # noqa: F811
    base = shutil.copytree(folder, tmp_path / "a base")
    file = base / "unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    code, out, _ = batch("name\nstar\n", "--model", base, "--variant", "fp16", out="an out")
    typed = shlex.split(out.splitlines()[-1].removeprefix("apply "))
    assert code == 0 and typed[:2] == ["aegis", "apply"] and typed[-1] == "DIR"
    assert main([*typed[1:-1], str(tmp_path / "erased")]) == 0


def test_a_full_device_is_no_concepts_fault(batch, tmp_path, monkeypatch):
    def full(*args, **more):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(erasing, "erase_group", full)
    for options, advice in (
        (("--lanes=2",), "lower --lanes, or lower --config.batch"),
        (("--lanes=1",), "; lower --conf"),
    ):
        code, _, err = batch("name\nstar\nred\n", *options)
        assert code == 2 and "memory is full" in err and advice in err
    assert "--lanes" not in err and not list((tmp_path / "out").glob("attempts/*"))


def test_a_worker_that_breaks_before_its_first_row_does_not_end_the_batch(batch, monkeypatch):
    def broken(*args, **more):
        raise ValueError("no such plugin")

    monkeypatch.setattr(console, "load_pipeline", broken)
    code, out, err = batch("name\nstar\n")
    assert code == 134 and out == "" and "no such plugin" in err


def test_errors_of_no_known_kind_are_told_apart_from_concepts_that_fail(batch, tmp_path, monkeypatch):
    """A scheduler tries this worker again, and takes the batch for unfinished."""

    def broken(*args, **more):
        raise ValueError("no such kernel")

    monkeypatch.setattr(erasing, "erase_group", broken)
    code, out, err = batch("name\n" + "".join(f"{name}\n" for name in ("star", "red", "blue")), "--lanes", "1")
    assert code == 134 and out == "" and "no such kernel" in err
    assert not list((tmp_path / "out").glob("failed/*"))
