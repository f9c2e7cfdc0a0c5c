"""erasure/texts.py: how a concept is found in texts."""

import pytest

from aegis_jax.erasure.texts import naming


@pytest.mark.parametrize(
    "concept, text, said",
    [
        ("cat", "a Cat.", True),
        ("cat", "cat", True),
        ("cat", "a category of caterpillars", False),
        ("star", "a starlet", False),
        ("Van Gogh", "in van gogh's style", True),
        ("R2-D2 (droid)", "the r2-d2 (droid) rolls", True),
        ("梵高", "梵高的画", True),
        (" star ", "a star", True),
    ],
)
def test_a_name_is_found_as_words_of_its_own(concept, text, said):
    assert bool(naming(concept).search(text)) == said
