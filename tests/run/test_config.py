"""run/config.py: layers, types, and what a mistake is answered with."""

import dataclasses

import pytest

from aegis_jax.erasure.presets import preset
from aegis_jax.errors import AegisError
from aegis_jax.run import config as run_config
from aegis_jax.run.config import RunConfig

OURS = ["sd14", "sd21", "world"]


def write(tmp_path, body):
    path = tmp_path / "mine.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(f"import ml_collections\n\n\ndef get_config():\n{lines}\n")
    return path


def test_layers(tmp_path):
    path = write(
        tmp_path,
        "c = ml_collections.ConfigDict()\n"
        "c.steps = 7\nc.learning_rate = 1\nc.concepts = ['a', 'b']\n"
        "c.grp = {'omega': 0.5}\nc.checkpoint = ml_collections.ConfigDict({'every': 3})\nreturn c",
    )
    run = run_config.load(path, [("steps", "9"), ("latents.offset", "true"), ("model", "x=y")])
    assert (run.erase.steps, run.model, run.concepts) == (9, "x=y", ("a", "b"))
    assert run.erase.learning_rate == 1.0 and type(run.erase.learning_rate) is float
    assert (run.erase.grp.omega, run.erase.latents.offset, run.checkpoint.every) == (0.5, True, 3)
    # Everything else is as the dataclasses have it.
    assert run.erase.soft == RunConfig().erase.soft and run.picture == RunConfig().picture


def test_values_are_what_merge_takes():
    run = run_config.load("sd14", [("concepts", "nudity"), ("grp.omega", "0.25"), ("checkpoint.keep", "5")])
    values = run_config.values(run)
    assert values["grp.omega"] == 0.25 and values["concepts"] == ["nudity"]
    assert values.keys() == run_config.keys().keys()
    assert run_config.merge(RunConfig(), values) == run


@pytest.mark.parametrize("name", OURS)
def test_our_configs_load(name):
    run = run_config.load(name)
    assert run.model and bool(run.concepts) == (name == "world")  # the others are told what to erase
    text = run_config.find(name).read_text()
    header = text.partition('"""\n\nimport')[0]
    for part in ("Command", "Hardware", "Expected", "Result"):
        assert part in header
    assert f"--config {name}" in header or name == "world"


def test_papers_settings():
    """Adam 1e-5, batch 1, 1000 steps, whole UNet, 50 DDIM steps, one trajectory a latent: the preset as it is."""
    for name in OURS[:2]:
        erase = run_config.load(name).erase
        assert (erase.learning_rate, erase.batch, erase.steps) == (1e-5, 1, 1000)
        assert erase.trainable == "full"
        assert (erase.latents.steps, erase.latents.refresh_every) == (50, 1)
        assert erase == preset("paper").settings


@pytest.mark.parametrize(
    ("pairs", "parts"),
    [
        ([("stps", "3")], ["'stps'", "'steps'"]),
        ([("omega", "1")], ["'omega'", "'grp.omega'"]),
        ([("grp.omga", "1")], ["'grp.omga'", "'grp.omega'"]),
        ([("grp", "1")], ["'grp' is a group", "grp.mu"]),
        ([("steps", "ten")], ["'steps'", "'ten'", "whole number"]),
        ([("steps", "1.5")], ["'steps'", "'1.5'", "whole number"]),
        ([("learning_rate", "fast")], ["'learning_rate'", "'fast'", "a number"]),
        ([("latents.shared", "maybe")], ["'latents.shared'", "'maybe'", "true or false"]),
        ([("trainable", "most")], ["trainable", "'most'", "xattn"]),
        ([("checkpoint.every", "0")], ["checkpoint.every", "0", "1 or more"]),
        ([("stps", "3"), ("batch", "x")], ["'stps'", "'batch'"]),  # all at once
    ],
)
def test_bad_overrides(pairs, parts):
    with pytest.raises(AegisError) as error:
        run_config.load(None, pairs)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_group_of_which_nothing_is_set_is_as_it_was(tmp_path):
    keys = {"steps": 7, "grp": {}, "mesh": {}, "latents": {"steps": 3}}
    path = write(tmp_path, f"return ml_collections.ConfigDict({keys})")
    plain = run_config.merge(RunConfig(), {"steps": 7, "latents.steps": 3})
    assert run_config.load(path) == run_config.merge(RunConfig(), run_config.flat(keys)) == plain
    with pytest.raises(AegisError, match="unknown config key 'stpes'; did you mean 'steps'.*'seed': got {}"):
        run_config.merge(RunConfig(), run_config.flat({"stpes": {}, "seed": {}}))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    """Each device would compute all of it."""
    pairs = [("mesh.data", "2"), ("mesh.fsdp", "3"), ("batch", "8")]
    with pytest.raises(AegisError, match=r"batch=8 is not divisible by the 6 devices of mesh.data=2 x mesh.fsdp=3"):
        run_config.load(None, pairs)
    assert run_config.load(None, [*pairs[:2], ("batch", "12")]).erase.batch == 12


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("return {'steps': 1}", ["dict", "ConfigDict"]),
        ("return ml_collections.ConfigDict({'steps': '9'})", ["'steps'", "'9'", "whole number"]),
        ("return ml_collections.ConfigDict({'steps': True})", ["'steps'", "True"]),
        ("return ml_collections.ConfigDict({'grp': {'mew': 1}})", ["'grp.mew'"]),
        ("return ml_collections.ConfigDict({'concepts': ['a', 1]})", ["'concepts'"]),
        ("return 1 / 0", ["ZeroDivisionError"]),
        ("return (", ["SyntaxError"]),
        ("import sys; sys.exit()", ["SystemExit"]),  # code 0 would say that the run was done
    ],
)
def test_bad_files(tmp_path, body, parts):
    path = write(tmp_path, body)
    with pytest.raises(AegisError) as error:
        run_config.load(path)
    for part in ["mine.py", *parts]:
        assert part in str(error.value)


def test_no_get_config(tmp_path):
    (tmp_path / "mine.py").write_text("steps = 1\n")
    with pytest.raises(AegisError, match="get_config"):
        run_config.load(tmp_path / "mine.py")


def test_missing_file_names_ours(tmp_path):
    with pytest.raises(AegisError, match="nowhere.py.*sd14, sd21, world"):
        run_config.load(tmp_path / "nowhere.py")


def test_every_key_is_plain():
    """Keys hold values that survive JSON and a command line; there are few enough to know."""
    keys = run_config.keys()
    assert set(keys.values()) <= {int, float, str, bool, tuple[str, ...]}
    assert len(keys) <= 41
    for field in dataclasses.fields(RunConfig):
        assert field.name == "erase" or field.name in {key.partition(".")[0] for key in keys}


EVIL = "raise SystemExit('executed')\n"


@pytest.mark.parametrize("installed", [True, False])
def test_our_names_are_ours_whatever_else_lies_around(tmp_path, monkeypatch, installed):
    """Another package's configs/ beside the installed package, or one in the current directory, is never run."""
    package = tmp_path / "site" / "aegis_jax"
    ours = package / "configs" if installed else package.parent / "configs"
    ours.mkdir(parents=True)
    (ours / "world.py").write_text("import ml_collections as m\nget_config = lambda: m.ConfigDict({'steps': 3})\n")
    for folder in (tmp_path / "here", tmp_path / "here" / "configs", *[package.parent / "configs"] * installed):
        folder.mkdir(exist_ok=True)
        (folder / "world.py").write_text(EVIL)
        (folder / "other.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(run_config, "__file__", str(package / "run" / "config.py"))
    assert run_config.load("world").erase.steps == 3
    with pytest.raises(AegisError, match="'other' not found.*one of world"):
        run_config.load("other")
    for path in ("world.py", "./world.py", "configs/world.py"):  # a path is the user's file
        with pytest.raises(AegisError, match="SystemExit: executed"):
            run_config.load(path)
    with pytest.raises(AegisError, match="not found: give a .py file"):
        run_config.load("configs/world")
