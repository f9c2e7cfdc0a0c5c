"""run/erase.py: the run folder, what comes out, and what is refused."""

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import aegis_jax
from aegis_jax.erasure.aegis.config import EraseConfig
from aegis_jax.errors import AegisError
from aegis_jax.models.model import flatten, unflatten
from aegis_jax.run import erase as run_erase
from aegis_jax.run.asked import settings
from aegis_jax.run.config import RunConfig
from aegis_jax.run.folder import disk_errors
from tests.run.runs import erase, files, metrics


def test_the_run_folder(cheap_step, folder, tmp_path):
    result = erase(folder, tmp_path / "run")
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "config.json", "manifest.json", "metrics.jsonl", "per_tensor.safetensors", "pipeline",
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
    monkeypatch.setattr(run_erase, "off_device", lambda pipeline: run_erase._with_params(pipeline, jax.device_get))
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


def test_overwriting_follows_no_link(finished, folder, tmp_path):
    for name in ("pipeline", "checkpoints"):
        shutil.move(finished / name, tmp_path / name)
        (finished / name).symlink_to(tmp_path / name)
    (tmp_path / "pipeline" / "notes.txt").write_text("mine")
    before = files(tmp_path / "pipeline"), files(tmp_path / "checkpoints")
    erase(folder, finished, overwrite=True, keys={"steps": 2})
    assert (files(tmp_path / "pipeline"), files(tmp_path / "checkpoints")) == before
    assert (finished / "pipeline" / "model_index.json").is_file() and not (finished / "pipeline").is_symlink()
    assert [p.name for p in (finished / "checkpoints").iterdir()] == ["2"]


def test_a_result_stays_until_the_one_that_replaces_it_is_there(finished, folder, monkeypatch):
    before = files(finished / "pipeline")

    def full(*args, **more):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(RunConfig, "method", dataclasses.replace(RunConfig().method, step=full))
        with pytest.raises(MemoryError):
            erase(folder, finished, overwrite=True, keys={"seed": 1})
        assert not (finished / "pipeline").exists()  # the folder tells of the new run by now
        assert files(finished / "previous_pipeline") == before
        with pytest.raises(MemoryError):
            erase(folder, finished, overwrite=True, keys={"seed": 2})
    assert files(finished / "previous_pipeline") == before
    erase(folder, finished, resume=True, keys={"seed": 2})
    assert files(finished / "pipeline") != before and not (finished / "previous_pipeline").exists()


def test_what_is_left_of_a_result_is_no_obstacle(finished, folder):
    (finished / "pipeline" / "model_index.json").unlink()
    erase(folder, finished, overwrite=True)
    assert (finished / "pipeline" / "model_index.json").is_file()


def test_what_diffusers_would_not_load_is_refused_before_training(cheap_step, folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "config.json").write_text("{}")
    assert aegis_jax.sample(aegis_jax.load_pipeline(model), "a", steps=1).shape == (1, 16, 16, 3)
    with pytest.raises(AegisError, match=r'safety_checker has no safetensors.*"safety_checker": \[null, null\]'):
        erase(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(AegisError, match="safety_checker has no safetensors"):
        aegis_jax.save_pipeline(aegis_jax.load_pipeline(model), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


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


def test_too_little_space_is_refused_first(cheap_step, folder, tmp_path, monkeypatch):

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(AegisError, match="no space left for .*checkpoints and the result need"):
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


def test_a_vae_that_is_not_finite_is_refused_before_training(cheap_step, folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    path = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    key = "decoder.conv_out.weight"
    save_file({**tensors, key: tensors[key] * np.nan}, path, {"format": "pt"})
    for out in (tmp_path / "run", None):
        with pytest.raises(AegisError, match=f"'{key}' has values that are not finite"):
            aegis_jax.erase(model, "star", overrides=[("steps", "7")], out=out)
    assert not (tmp_path / "run").exists()


def test_disk_errors_pass_others_on(tmp_path):
    with pytest.raises(AegisError, match="no space left"):
        with disk_errors(tmp_path):
            raise ValueError("RESOURCE_EXHAUSTED: write failed [OS error 28: No space left on device]")
    with pytest.raises(ValueError, match="^other$"):
        with disk_errors(tmp_path):
            raise ValueError("other")


def test_the_worlds_settings_are_taken_however_it_is_named():
    wanted = settings("world", "red", None)
    overrides = [("model", "world"), ("concepts", "red")]
    assert settings(None, None, None, overrides) == wanted
    assert settings("world", None, None, overrides[1:]) == wanted != settings("world", "star", None)


def test_a_concept_that_is_named_twice_counts_once():
    for given in (
        {"concepts": ["star", "red", "star"]},
        {"concepts": ["star ", " red", "star"]},
        {"overrides": [("concepts", "star,red,star")]},
    ):
        run = settings("world", given.get("concepts"), None, given.get("overrides", ()))
        assert run.concepts == ("star", "red")


def test_a_run_of_an_older_spelling_is_gone_on_with():
    """Spaces around a concept, and one given twice, were once kept: what is recorded so stays so."""
    saved = dataclasses.replace(settings("world", "star", None), concepts=("star ", "star"))
    assert settings(None, ["star"], None, saved=saved).concepts == ("star ", "star")
    assert settings(None, None, None, saved=saved).concepts == ("star ", "star")
    with pytest.raises(AegisError, match="concepts"):
        settings(None, ["heart"], None, saved=saved)
