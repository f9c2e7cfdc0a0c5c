"""What an attacker is given: what each case draws by, and settings that are refused before anything is drawn."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax import attacks
from aegis_jax.attacks import configure, find, p4d, recall, spaces
from aegis_jax.attacks.given import Given, Pictures, case_numbers, check, key_of
from aegis_jax.attacks.guided import Drawer
from aegis_jax.attacks.search import Search
from aegis_jax.diffusion.conditioning import encode
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from tests.run import untrained

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
PROMPTS, SEEDS = ["a church", "a red church", "a red church on the sky"], [7, 8, 9]


def given(rows, **more):
    prompts, seeds = ([of[k] for k in rows] for of in (PROMPTS, SEEDS))
    return Given(IMAGES[rows], prompts, seeds, **more)


def test_a_case_is_numbered_by_its_seed_and_what_it_was_made_from():
    numbers = case_numbers(given([0, 1, 2]))
    assert numbers.dtype == np.uint32 and len(set(numbers)) == 3
    np.testing.assert_array_equal(case_numbers(given([2, 1])), numbers[[2, 1]])
    control = Given(IMAGES[:1], ["a thing"], [7 + 2**32], made_from=PROMPTS[:1])  # the same aim and noise
    assert case_numbers(control) == numbers[0] == 955449053  # in every process, on every machine
    again = case_numbers(given([0, 1, 0]))
    np.testing.assert_array_equal(again[:2], numbers[:2])
    assert again[2] not in again[:2]  # exact repeats draw apart


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(untrained.write(tmp_path_factory.mktemp("untrained") / "pipeline"))


def searched(pipeline, what):
    """Where P4D-K's learnt tokens start: of so many as the second prompt has."""
    return Search(pipeline, what, p4d.k_plan(pipeline, what.prompts, configure(p4d.K, {}))).variable[:, :2]


def recalled(pipeline, what):
    drawer, cond = Drawer(pipeline, what, len(what.prompts)), encode(pipeline, what.prompts)
    return recall._Attack(drawer, cond, what.images, configure(recall.NAME, {}), 0.0, None).adv


def bred(pipeline, what):
    settings = {"tokens": 2, "population": 8, "generations": 2}
    return find("ring-a-bell").run(pipeline, "church", what, configure("ring-a-bell", settings)).losses.T


def probed(pipeline, what):
    return find("noise-probe").run(pipeline, "church", what, configure("noise-probe", {"levels": "1"})).latents


@pytest.mark.parametrize("drawn", [searched, recalled, bred, probed])
def test_what_a_row_draws_does_not_depend_on_its_place(pipeline, drawn):
    one, other = (np.asarray(drawn(pipeline, given(rows, original=pipeline, steps=2))) for rows in ([2, 1], [1, 0]))
    np.testing.assert_allclose(one[1], other[0], rtol=1e-5)
    assert not np.allclose(one[0], one[1])


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_draws_are_of_one_generator_whatever_the_default_is(generator):
    draw = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(key_of(7, 5), k), (3,), jnp.float32))
    wanted = draw(jnp.arange(3))
    np.testing.assert_array_equal(wanted[0], jax.random.normal(
        jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 5), 0), (3,), jnp.float32
    ))  # fmt: skip
    with jax.default_prng_impl(generator):
        np.testing.assert_array_equal(draw(jnp.arange(3)), wanted)
        np.testing.assert_array_equal(draw(jnp.arange(1, 2))[0], wanted[1])
    for file in pathlib.Path(attacks.__file__).parent.glob("*.py"):
        assert file.read_text("utf-8").count("random.key(") == (file.name == "given.py"), file


@pytest.mark.parametrize("partitionable", [True, False])
def test_starting_words_do_not_depend_on_the_longest_prompt(partitionable):
    space, table = spaces.Nearest(0.1, 0.1, decoupled=True), jnp.eye(500)
    with jax.threefry_partitionable(partitionable):
        keys = jax.random.split(key_of(0, 1), 3)
        few, many = (np.asarray(space.start(keys, table, count).argmax(-1)) for count in (2, 5))
    np.testing.assert_array_equal(few, many[:, :2])
    assert len(set(many.ravel())) > 12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": []}, "images are float64 of shape .0,., wanted uint8"),
        ({"images": [IMAGES[0], IMAGES[1, :8]]}, "images are of several shapes, wanted uint8"),
        ({"images": IMAGES[..., 0]}, "images are uint8 of shape .3, 16, 16., wanted uint8"),
        ({"seeds": ["a", "b", "c"]}, "seeds = .'a', 'b', 'c'., wanted a whole number for each image"),
        ({"seeds": [1, 2.0, 3]}, "seeds = .1, 2.0, 3., wanted a whole number for each image"),
        ({"seeds": 5}, "seeds = 5, wanted a whole number for each image"),
        ({"beside": IMAGES[:2]}, "beside has 2 images for 3 prompts"),
        ({"beside": IMAGES.astype(float)}, "beside are float64"),
        ({"without": Pictures(IMAGES, ["a dog"])}, "without has 3 images and 1 prompts"),
        ({"without": Pictures(IMAGES[:0], [])}, "without are uint8 of shape .0, 16, 16, 3., wanted uint8"),
    ],
)
def test_pictures_and_what_goes_with_them_agree(change, message):
    """JAX takes the last row for one that is not there, so that nothing would say so later."""
    with pytest.raises(AegisError, match=message):
        Given(**{"images": IMAGES, "prompts": PROMPTS, "seeds": SEEDS} | change)


def test_lists_of_pictures_and_numpys_seeds_are_taken():
    found = Given(list(IMAGES), PROMPTS, np.array(SEEDS, np.int32), without=Pictures(list(IMAGES), ("a", "b", "c")))
    np.testing.assert_array_equal(found.images, IMAGES)
    np.testing.assert_array_equal(found.without.images, IMAGES)
    assert found.seeds == SEEDS and found.without.prompts == ["a", "b", "c"]
    np.testing.assert_array_equal(case_numbers(found), case_numbers(given([0, 1, 2])))


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("cce", {"steps": "5"}, "steps='5', wanted a whole number"),
        ("unlearndiffatk", {"tokens": 2.0}, "tokens=2.0, wanted a whole number"),
        ("unlearndiffatk", {"iterations": 10**12}, "iterations=1000000000000, wanted a whole number below 2"),
        ("tina", {"iterations": True}, "iterations=True, wanted a whole number"),
        ("tina", {"learning_rate": "fast"}, "learning_rate='fast', wanted a finite float32 number"),
        ("word-search", {"seed": "a"}, "seed='a', wanted a whole number from 0 to"),
        ("ring-a-bell", {"crossover": np.nan}, "crossover=nan, wanted a finite float32 number"),
        ("ring-a-bell", {"mutation": np.inf}, "mutation=inf, wanted a finite float32 number"),
        ("ring-a-bell", {"mutation": 1.5}, "mutation=1.5, wanted 0 to 1"),
        ("ring-a-bell", {"crossover": -0.1}, "crossover=-0.1, wanted 0 to 1"),
        ("ring-a-bell-embedding", {"eta": np.inf}, "eta=inf, wanted a finite float32 number"),
        ("word-search", {"population": 1}, "population=1, wanted at least 2"),
        ("unlearndiffatk", {"weight_decay": np.nan}, "weight_decay=nan, wanted a finite float32 number"),
        ("p4d-n", {"weight_decay": -1.0}, "weight_decay=-1.0, wanted 0 or more"),
        ("tina", {"learning_rate": np.inf}, "learning_rate=inf, wanted a finite float32 number"),
        ("recall", {"learning_rate": 1e39}, "learning_rate=1e\\+39, wanted a finite float32 number"),
        ("soft-prompt", {"learning_rate": np.inf}, "learning_rate=inf, wanted a finite float32 number"),
        ("noise-probe", {"levels": "0.1,nan,0.2"}, "levels='0.1,nan,0.2', wanted ascending numbers"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(method, settings, message):
    with pytest.raises(AegisError, match=f"attack {method}: {message}"):
        check(method, configure(method, settings), 25)


@pytest.mark.parametrize("method", ["ring-a-bell", "word-search", "unlearndiffatk", "tina", "recall", "revival", "cce"])
def test_the_published_settings_are_not(method):
    check(method, configure(method, {}), 50)
