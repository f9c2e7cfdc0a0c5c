"""The `aegis` command: bad input is one line and exit code 2; good input does the work."""

import io
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import aegis_jax
import aegis_jax.run.attack
import aegis_jax.run.console
import aegis_jax.run.erase
from aegis_jax.cli import main
from aegis_jax.run import config, console
from tests.cli.told import picture_of, refused

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["required"]),
        (["eraze"], ["eraze", "erase"]),
        (["erase", "--modle", "world"], ["--modle"]),
        (["erase", "--config.steps", "5"], ["--config.key=value"]),
        (["sample", "--model", "world", "--prompt", "a", "--config.steps=5"], ["--config.steps=5"]),
        (["sample", "--model", "world", "--prompt", "a", "--images", "0"], ["--images 0"]),
        (["sample", "--model", "world"], ["--prompt"]),
        (["sample", "--model", "world", "--prompt", "a", "--prompts", "x.csv"], ["not allowed with", "--prompt"]),
        (["sample", "--model", "world", "--prompts", "nowhere.csv"], ["nowhere.csv"]),
        (["sample", "--model", "world", "--prompt", "a", "--height", "33"], ["height = 33", "multiple of 4"]),
        (["sample", "--model", "world", "--prompt", "a", "--batch", "0"], ["--batch 0"]),
        (["erase"], ["no model"]),
        (["erase", "--concept", "star"], ["no model"]),
        (["erase", "--model", "world", "--concepts", "none.csv"], ["none.csv", "does not exist"]),
        (["erase", "--resume"], ["--out"]),
        (["erase", "--auto-resume"], ["--out"]),
        (["erase", "--overwrite", "--resume", "--out", "x"], ["not allowed with"]),
        (["erase", "--model", "world", "--concept", "star", "--config", "nope"], ["nope", "sd14"]),
        (["erase", "--model", "world", "--config.stpes=5"], ["'stpes'", "'steps'"]),
        (["erase", "--model", "world", "--config.steps=many"], ["steps", "'many'", "whole number"]),
        (["erase", "--model", "nowhere", "--concept", "star"], ["nowhere", "does not exist"]),
        (["erase", "--model", "~nobody-here/x", "--concept", "star"], ["~nobody-here", "home"]),
        (["erase", "--model", "world", "--concept", "star", "--out", "~nobody-here/x"], ["~nobody-here", "home"]),
        (["erase", "--resume", "--out", "nowhere"], ["nothing to resume", "nowhere"]),
        (["verify"], ["DIR"]),
        (["world"], ["required"]),
    ],
)
def test_bad_arguments(capsys, tmp_path, monkeypatch, argv, parts):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *argv)
    for part in parts:
        assert part in message
    assert not list(tmp_path.iterdir())


def drop_unet(model):
    shutil.rmtree(model / "unet")


def pickle_weights(model):
    (model / UNET).rename(model / "unet" / "diffusion_pytorch_model.bin")


def other_architecture(model):
    index = json.loads((model / "model_index.json").read_text())
    index["_class_name"] = "FluxPipeline"
    (model / "model_index.json").write_text(json.dumps(index))


def truncate(model):
    content = (model / UNET).read_bytes()
    (model / UNET).write_bytes(content[: len(content) // 2])


def absurd_header(model):
    content = (model / UNET).read_bytes()
    (model / UNET).write_bytes(struct.pack("<Q", 2**62) + content[8:])


def wrong_width(model):
    config = json.loads((model / "unet" / "config.json").read_text())
    config["cross_attention_dim"] = 24
    (model / "unet" / "config.json").write_text(json.dumps(config))


def empty(model):
    shutil.rmtree(model)
    model.mkdir()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (empty, ["model_index.json"]),
        (drop_unet, ["unet"]),
        (pickle_weights, ["pickle", "safe_serialization"]),
        (other_architecture, ["FluxPipeline"]),
        (truncate, ["diffusion_pytorch_model.safetensors"]),
        (absurd_header, ["diffusion_pytorch_model.safetensors"]),
        (wrong_width, ["attn2"]),
    ],
)
def test_bad_models(capsys, folder, tmp_path, damage, parts):
    model = shutil.copytree(folder, tmp_path / "model")
    damage(model)
    message = refused(capsys, "erase", "--model", model, "--concept", "star", "--out", tmp_path / "run")
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("concept", "parts"), [("  ", ["empty"]), ("star " * 40, ["tokens"]), ("", ["empty"])])
def test_bad_concepts(capsys, folder, tmp_path, concept, parts):
    message = refused(capsys, "erase", "--model", folder, "--concept", concept, "--out", tmp_path / "run")
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()


KEYS = ("--config.steps=3", "--config.trainable=kv", "--config.picture.images=0")


def test_erase_and_what_it_refuses_afterwards(capsys, cheap_step, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    erase = ("erase", "--model", str(folder), "--concept", "star", *KEYS)
    assert main(list(erase)) == 0
    out, err = capsys.readouterr()
    assert str(tmp_path / "runs" / "star" / "pipeline") in out
    assert "step 3/3" in err and "steps/s" in err and "left" in err
    assert aegis_jax.load_pipeline(tmp_path / "runs" / "star" / "pipeline")
    assert main(list(erase)) == 0  # the next free folder
    assert (tmp_path / "runs" / "star-2" / "pipeline").is_dir()
    capsys.readouterr()
    assert "exists" in refused(capsys, *erase, "--out", "runs/star")
    other = refused(capsys, *erase, "--out", "runs/star", "--resume", "--config.seed=1")
    assert "seed was 0, is 1" in other
    heart = refused(capsys, "erase", "--concept", "heart", "--out", "runs/star", "--resume")
    assert "concepts was ['star'], is ['heart']" in heart
    assert main(["erase", "--resume", "--out", "runs/star"]) == 0


def test_auto_resume_begins_or_goes_on(capsys, cheap_step, folder, tmp_path, monkeypatch):
    """The same command each time, as a scheduler gives it; a run of other settings is neither touched nor resumed."""
    erase = [
        "erase",
        "--model",
        str(folder),
        "--concept",
        "star",
        *KEYS,
        "--auto-resume",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(erase) == 0
    assert "step 3/3" in capsys.readouterr().err
    result = (tmp_path / "run" / "manifest.json").read_bytes()
    assert main(erase) == 0
    assert "finished already" in capsys.readouterr().err
    assert "seed was 0, is 1" in refused(capsys, *erase, "--config.seed=1")
    assert (tmp_path / "run" / "manifest.json").read_bytes() == result
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "exists" in refused(capsys, *erase[:-1], tmp_path / "mine")


def test_a_device_without_memory(capsys, monkeypatch, folder, tmp_path):
    def full(*args, **more):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nlong story")

    monkeypatch.setattr(aegis_jax.run.erase, "_train", full)
    argv = ("erase", "--model", folder, "--concept", "star", "--out")
    message = refused(capsys, *argv, tmp_path / "run", *KEYS)
    assert "memory is full" in message and "--config.batch" in message and "long story" not in message
    message = refused(capsys, *argv, tmp_path / "closed", "--config.method=uce")  # which has no batch
    assert "memory is full" in message and "JAX_PLATFORMS=cpu" in message and "--config.batch" not in message


# What a GPU says, and a CPU in the middle of a program.
FULL = (
    "RESOURCE_EXHAUSTED: Out of memory",
    "INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes.",
)


@pytest.mark.parametrize("said", FULL)
def test_a_device_without_memory_for_pictures(capsys, monkeypatch, folder, tmp_path, said):
    def full(*args, **more):
        raise jax.errors.JaxRuntimeError(f"{said}\nlong story")

    monkeypatch.setattr(aegis_jax.run.console, "sample_images", full)
    assert main(["sample", "--model", str(folder), "--prompt", "a", "--out", str(tmp_path / "s")]) == 2
    err = capsys.readouterr().err
    assert f"memory is full ({said}); lower --batch" in err and "long story" not in err


def test_a_folder_that_cannot_be_written(capsys, cheap_step, folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refused(
        capsys, "erase", "--model", folder, "--concept", "star", *KEYS,
        "--out", tmp_path / "file" / "run",
    )  # fmt: skip
    assert "file" in message and (tmp_path / "file").read_text() == "mine"


def test_paths_that_lead_nowhere(capsys, cheap_step, folder, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    strange = tmp_path / "mod\udce9l"
    erase = ("erase", "--concept", "star", *KEYS)
    for path, part in ((tmp_path / "circle", "links in a circle"), (strange, "not UTF-8")):
        assert part in refused(capsys, *erase, "--model", path, "--out", tmp_path / "run")
        assert part in refused(capsys, *erase, "--model", folder, "--out", path)
        assert part in refused(capsys, "verify", path)
        sample = ("sample", "--model", folder, "--prompt", "a", "--steps", "1")
        assert part in refused(capsys, *sample, "--out", path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("[" * 100_000)
    for how in ("--resume", "--overwrite"):
        assert "holds no run" in refused(capsys, *erase, "--model", folder, "--out", tmp_path / "run", how)


def test_an_out_that_cannot_be_is_refused_before_the_computing(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(aegis_jax.run.console, "sample_images", None)
    monkeypatch.setattr(aegis_jax.run.attack, "METHODS", {})
    (tmp_path / "file").write_text("mine")
    sample = ("sample", "--model", folder, "--prompt", "a")
    attack = ("attack", "--model", folder, "--concept", "dog", "--images", picture_of(tmp_path))
    for argv in ((*sample, "--out", tmp_path / "file"), (*attack, "--out", tmp_path / "file" / "sub")):
        assert main([str(a) for a in argv]) == 2
        assert "file" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(TypeError):  # the stand-in for sampling
        main([str(a) for a in (*sample, "--out", tmp_path / "new" / "s")])
    capsys.readouterr()
    refused(capsys, *sample, "--out", tmp_path / "new" / "s", "--steps", "0")
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_run_folder_is_told_from_a_pipeline(capsys, cheap_step, folder, tmp_path):
    argv = ["erase", "--model", folder, "--concept", "star", *KEYS, "--out", tmp_path / "run"]
    assert main([str(a) for a in argv]) == 0
    capsys.readouterr()
    found = refused(capsys, "sample", "--model", tmp_path / "run", "--prompt", "a", "--out", tmp_path / "s")
    assert f"its result is {tmp_path / 'run' / 'pipeline'}" in found
    shutil.rmtree(tmp_path / "run" / "pipeline")
    found = refused(capsys, "sample", "--model", tmp_path / "run", "--prompt", "a", "--out", tmp_path / "s")
    assert "no result yet" in found


def test_settings_that_messages_advise_are_there():
    package = Path(aegis_jax.__file__).parent
    files = [package / "cli.py", *package.glob("run/*.py"), *package.glob("erasure/**/*.py")]
    advised = {key for path in files for key in re.findall(r"--config\.([a-z_.]+)=", path.read_text(encoding="utf-8"))}
    assert advised >= {"low_memory", "trainable"} and advised - {"key"} <= config.keys().keys()


@pytest.mark.parametrize(
    ("concepts", "wanted"),
    [(["J.M.W. Turner"], "j-m-w-turner"), (["梵高"], "梵高"), (["Dr. Seuss", "a/b.c"], "dr-seuss-a-b-c")],
)
def test_run_folders_are_named_after_the_concepts(tmp_path, monkeypatch, concepts, wanted):
    monkeypatch.chdir(tmp_path)
    with console.free_folder(concepts) as first, console.free_folder(concepts) as second:  # two processes at once
        assert [first.as_posix(), second.as_posix()] == [f"runs/{wanted}", f"runs/{wanted}-2"]
    with pytest.raises(KeyError), console.free_folder(concepts):
        raise KeyError
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == sorted([wanted, f"{wanted}-2"])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_is_not_utf8(cheap_step, folder, tmp_path, monkeypatch, encoding):
    """A path and a concept that it cannot show are written as escapes, and the command ends as on any other."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr("sys." + name, stream)
    erase = ["erase", "--model", str(folder), "--concept", "梵高", *KEYS, "--out", str(tmp_path / "梵高")]
    sample = ["sample", "--model", str(folder), "--prompt", "梵高的星夜", "--steps", "1", "--out", str(tmp_path / "夜")]
    report = SimpleNamespace(text=lambda: "agree on 梵高", agrees=True)
    monkeypatch.setattr("aegis_jax.run.verify.verify", lambda *args, **more: report)
    for argv in (erase, sample, ["verify", "梵高"]):
        assert main(argv) == 0
    assert main(["verify", "梵高", "--nope"]) == 2
    for stream in streams:
        stream.flush()
    shown = streams[0].buffer.getvalue().decode(encoding)
    assert str(tmp_path) + "/\\u68b5\\u9ad8" in shown and "agree on \\u68b5" in shown


def test_variants_of_the_weights(capsys, cheap_step, tiny, tmp_path):
    folder = tiny(dtype="float16", variant="fp16")
    capsys.readouterr()  # what diffusers had to say
    erase = ["erase", "--model", str(folder), "--concept", "star", *KEYS, "--out", str(tmp_path / "run")]
    assert "--variant fp16" in refused(capsys, *erase)
    assert main([*erase, "--variant", "fp16"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["variant"] == "fp16"
    assert main(["erase", "--resume", "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "c.py").write_text(
        "import ml_collections as m\n"
        "keys = {'steps': 3, 'trainable': 'kv', 'concepts': ['star'], 'picture': {'images': 0}}\n"
        "get_config = lambda: m.ConfigDict(keys)\n"
    )
    assert main(["erase", "--resume", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "c.py")]) == 0
    sample = ["sample", "--model", str(folder), "--prompt", "a", "--steps", "1", "--out", str(tmp_path / "s")]
    assert main([*sample, "--variant", "fp16"]) == 0
    capsys.readouterr()
    assert "revision" in refused(capsys, *sample, "--overwrite", "--revision", "main")


def test_verify_without_torch_says_how_to_get_it(capsys, folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'aegis_jax[torch]'" in refused(capsys, "verify", folder)


def test_what_is_printed_on_a_closed_stream_goes_nowhere_else(tmp_path):
    """With 2>&- Python has no sys.stderr, and print would take standard output in its place."""
    command = f'"{sys.executable}" -m aegis_jax world show --out nowhere/a.png 2>&-'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and not list(tmp_path.iterdir())
