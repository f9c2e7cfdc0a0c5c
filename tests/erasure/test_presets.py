"""Presets: what the names stand for, and how a run changes from one to another without changing its scale."""

import dataclasses
import itertools
import pathlib

import pytest

from aegis_jax.erasure.aegis.config import EraseConfig, LatentsConfig
from aegis_jax.erasure.presets import PRESETS, preset, switched
from aegis_jax.errors import AegisError
from aegis_jax.run import config as run_config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says_and_can_be_run(name):
    found = preset(name)
    found.method.check(found.settings)
    assert found.name == found.settings.method == name
    assert found.about and "\n" not in found.about


def test_no_two_names_are_of_the_same_settings():
    start = lambda settings: getattr(settings, "start", "")  # noqa: E731  # which goes by the name
    plain = {name: (dataclasses.replace(x.settings, method=""), start(x.settings)) for name, x in PRESETS.items()}
    same = [(a, b) for a, b in itertools.combinations(plain, 2) if plain[a] == plain[b]]
    assert not same
    assert len({found.about for found in PRESETS.values()}) == len(PRESETS)


def test_the_papers_numbers():
    """The table of the method's page: what the paper's appendix states, and what the published command runs."""
    paper, released = preset("paper").settings, preset("released").settings
    for settings in (paper, released):
        soft, latents = settings.soft, settings.latents
        assert (soft.use, soft.life, soft.beta, soft.gamma, soft.tokens, soft.prefixes) == (
            "both", "step", 1e-3, 1e-3, 1, 1,
        )  # fmt: skip
        assert (settings.steps, settings.batch, settings.learning_rate, settings.eta) == (1000, 1, 1e-5, 1.0)
        assert settings.trainable == "full"
        assert (latents.steps, latents.refresh_every, latents.shared) == (50, 1, False)
        assert (settings.words.preserve, settings.words.context) == (0.0, "none")
        assert (settings.grp.rule, settings.grp.omega) == ("released", 0.0)
    assert (paper.grp.mu, paper.grp.cap, paper.latents.offset) == (0.1, 1.0, False)
    assert (released.grp.mu, released.grp.cap, released.latents.offset) == (0.2, 1e6, True)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("paper-no-aet", "target"), ("paper-no-prompt", "prompt"), ("aegis+-no-aet", "target"),
        ("aegis+-no-prompt", "prompt"),
    ],
)  # fmt: skip
def test_an_ablation_leaves_out_the_part_that_it_is_named_after(name, off):
    settings = preset(name).settings
    assert (settings.has_target, settings.has_prompt) == (off != "target", off != "prompt")
    whole = preset(name.partition("-no-")[0]).settings
    assert dataclasses.replace(settings, method=whole.method, soft=whole.soft) == whole


def test_an_unknown_name_is_answered_with_those_that_there_are():
    with pytest.raises(AegisError) as error:
        preset("aegis++")
    message = str(error.value)
    assert "'aegis++'" in message and "did you mean 'aegis+'?" in message and "\n" not in message
    assert all(name in message for name in PRESETS)


@pytest.mark.parametrize("name", [3, None, ["esd"], {"esd": 1}])
def test_what_is_no_name_is_refused_as_a_name(name):
    with pytest.raises(AegisError, match="unknown method"):
        preset(name)


CLOSED = [name for name, found in PRESETS.items() if found.settings.steps == 1]


def test_the_closed_forms_published_numbers():
    """As the published code has them by default (docs/method.md says where ours differ)."""
    uce, first, rece, speed, oce = (preset(name).settings for name in ("uce", "uce-2023", "rece", "speed", "oce"))
    for settings in (uce, first, rece):
        assert (settings.guide, settings.erase_scale, settings.projections) == (("",), 1.0, "kv")
    assert (uce.tokens, uce.preserve, uce.preserve_scale, uce.lamb) == ("last", (), 1.0, 0.5)
    assert (first.tokens, first.preserve_tokens, first.preserve, first.lamb) == ("from_last", "all", ("",), 0.5)
    assert (rece.epochs, rece.regular_scale, rece.lamb, rece.preserve_scale) == (3, 0.1, 0.1, 0.1)
    assert (speed.threshold, speed.aug_num, speed.retain_scale, speed.lamb) == (0.1, 10, 1.0, 0.0)
    assert (speed.projections, speed.tokens, speed.guide) == ("v", "last", ("",))
    assert (oce.erase_scale, oce.generic_scale, oce.preserve_scale, oce.lamb) == (1.0, 0.5, 0.3, 1.5)
    assert (oce.projections, oce.tokens, oce.guide) == ("v", "last", ("",))


@pytest.mark.parametrize("name", CLOSED)
def test_to_and_from_a_closed_form_the_seed_alone_is_kept(name):
    """It has one step, whatever the scale before; and that is no scale for what comes after."""
    world = dataclasses.replace(run_config.load("world").erase, seed=5)
    made = switched(world, name)
    assert made == dataclasses.replace(preset(name).settings, seed=5)
    assert switched(made, "esd") == dataclasses.replace(preset("esd").settings, seed=5)
    assert switched(made, "uce").lamb == 0.5


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in CLOSED])
def test_switching_keeps_the_scale_and_nothing_else(name):
    scale = {
        "steps": 7, "batch": 3, "seed": 5, "learning_rate": 0.1, "trainable": "kv", "compute_dtype": "float32",
        "low_memory": True,
    }  # fmt: skip
    found = preset(name)
    other = dataclasses.replace(
        preset("aegis+").settings, eta=9.0, latents=LatentsConfig(steps=11, refresh_every=13, offset=True), **scale
    )
    made = switched(other, name)
    assert {key: getattr(made, key) for key in scale} == scale | {
        key: getattr(found.settings, key) for key in found.own
    }
    assert (made.latents.steps, made.latents.refresh_every) == (11, 13)
    own = found.settings
    back = {key: getattr(own, key) for key in scale}
    latents = dataclasses.replace(made.latents, steps=own.latents.steps, refresh_every=own.latents.refresh_every)
    assert dataclasses.replace(made, latents=latents, **back) == own


def test_esds_variants():
    """ESD-x and ESD-u by the first code's sets; by that of 2025 (esd_sd.py): eta 2 there is 1 here, since its target
    counts from the concept's own prediction, 200 steps of Adam at 5e-5, latents of the frozen model, t on the grid, and
    no norm is trained."""
    esd, old, new = (preset(name).settings for name in ("esd", "esd-u", "esd-u-2025"))
    assert (esd.eta, esd.latents.shared, esd.soft.use, esd.grp.rule) == (1.0, True, "none", "none")
    assert old == dataclasses.replace(esd, method="esd-u", trainable="noxattn")
    assert (new.eta, new.steps, new.learning_rate, new.trainable) == (1.0, 200, 5e-5, "layers")
    assert dataclasses.asdict(new.latents) == dataclasses.asdict(esd.latents)
    drawn = [(settings.latents.levels, settings.latents.by_original) for settings in (esd, new)]
    assert drawn == [("interval", False), ("grid", True)]
    assert preset("esd-x").settings.trainable == preset("esd-x-2025").settings.trainable == "xattn"


def test_what_is_a_presets_own_neither_comes_nor_stays():
    world = run_config.load("world").erase
    assert switched(world, "esd-u").trainable == "noxattn" and switched(world, "esd-u-2025").steps == 200
    new = switched(world, "esd-u-2025")
    run = run_config.merge(run_config.RunConfig(), {"method": "esd-u-2025"}, [("latents.steps", "9")])
    assert new.latents.levels == run.erase.latents.levels == "grid" and run.erase.latents.steps == 9
    back = switched(new, "esd")
    assert back.latents.levels == "interval"
    assert (back.trainable, back.steps, back.batch) == ("full", 1000, world.batch)


def test_a_method_on_the_command_line_keeps_the_scale_of_the_file():
    """`--config world --config.method=esd`: ESD, with the world's steps, batch, rate, tensors and pool."""
    world, run = run_config.load("world"), run_config.load("world", [("method", "esd")])
    erase, esd = run.erase, preset("esd").settings
    assert (erase.steps, erase.batch, erase.learning_rate, erase.trainable) == (500, 4, 1e-4, "xattn")
    assert erase.latents == dataclasses.replace(esd.latents, refresh_every=50)
    assert erase.method == "esd" and (erase.soft, erase.grp, erase.words) == (esd.soft, esd.grp, esd.words)
    assert dataclasses.replace(run, erase=world.erase) == world
    assert world.erase.words != esd.words  # aegis+, of which nothing is left


def test_settings_on_top_of_a_method_stay_on_top():
    run = run_config.load(None, [("grp.mu", "0.5"), ("method", "released"), ("steps", "3")])
    settings = preset("released").settings
    assert run.erase == dataclasses.replace(settings, steps=3, grp=dataclasses.replace(settings.grp, mu=0.5))


def test_an_unknown_method_in_a_config_is_refused():
    with pytest.raises(AegisError, match="unknown method 'esdd'; did you mean 'esd'"):
        run_config.load("world", [("method", "esdd")])
    with pytest.raises(AegisError, match=r"unknown method \['esd'\]"):
        run_config.merge(run_config.RunConfig(), {"method": ["esd"]})


def test_the_default_is_the_paper():
    assert run_config.RunConfig().erase == EraseConfig() == preset("paper").settings


def test_the_page_lists_every_preset_as_it_is():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "method.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` | {found.about} |" for name, found in PRESETS.items()]
