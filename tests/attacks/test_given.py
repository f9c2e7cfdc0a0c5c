"""What an attacker is given: what each case draws by, and settings that are refused before anything is drawn."""

import numpy as np
import pytest

from aegis_jax.attacks import configure, find, p4d, recall
from aegis_jax.attacks.given import Given, case_numbers, check
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


@pytest.mark.parametrize(
    "method, settings, message",
    [
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
