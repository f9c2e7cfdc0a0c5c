"""Where soft tokens stand: templates against rows built by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.attacks.prompt import INSERTIONS, PLACES, insertion, template
from aegis_jax.diffusion.template import fill
from aegis_jax.errors import AegisError
from aegis_jax.io.tokenizer import Tokenizer
from tests.tiny import BOS, EOS, tiny_tokenizer, vocabulary

VOCABULARY, _ = vocabulary()
ID = {name: VOCABULARY[f"{name}</w>"] for name in ("red", "star", "sky")}
SLOT = "slot"


@pytest.fixture(scope="module", params=[EOS, "!"])
def tokenizer(request, tmp_path_factory):
    """One that pads with EOS as SD 1.x does, one with "!" as SD 2.x does."""
    folder = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), pad=request.param, max_length=10)
    return Tokenizer(folder), VOCABULARY[request.param]


@pytest.mark.parametrize(
    "place, words",
    [
        ("before", [BOS, SLOT, SLOT, SLOT, "red", "star", EOS]),
        ("behind", [BOS, "red", "star", SLOT, SLOT, SLOT, EOS]),
        ("alone", [BOS, SLOT, SLOT, SLOT, EOS]),
        ("neutral", [BOS, SLOT, SLOT, SLOT, "sky", EOS]),
    ],
)
def test_templates_are_the_rows_built_by_hand(tokenizer, place, words):
    tokenizer, pad = tokenizer
    known = ID | {BOS: VOCABULARY[BOS], EOS: VOCABULARY[EOS]}
    found = template(tokenizer, "red star", place, 3, "sky")
    assert len(found.ids) == len(found.slots) == 10
    for position, (token, slot) in enumerate(zip(found.ids, found.slots, strict=True)):
        word = words[position] if position < len(words) else None
        if word == SLOT:
            assert slot == position - words.index(SLOT)
        else:
            assert slot == -1 and token == (pad if word is None else known[word])


def test_soft_tokens_are_put_where_the_slots_say():
    rng = np.random.default_rng(0)
    tokens, soft = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 4, 3))
    slots = np.array([[-1, 0, 1, -1, -1], [-1, -1, -1, 3, 0]])
    found = fill(*map(jnp.asarray, (tokens, slots, soft)))
    wanted = tokens.copy()
    wanted[0, 1], wanted[0, 2], wanted[1, 3], wanted[1, 4] = soft[0, 0], soft[0, 1], soft[1, 3], soft[1, 0]
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"place": "around"}, "place='around' is unknown; choose one of: before, behind, alone, neutral"),
        ({"tokens": 7}, "exceed the 10 positions"),
        ({"concept": " "}, "has no tokens"),
        ({"place": "neutral", "neutral": "thing"}, "neutral='thing' is not one whole word"),  # spelled in pieces here
        ({"place": "neutral", "neutral": "red star"}, "not one whole word"),
        ({"place": "neutral", "neutral": "a"}, "not one whole word"),
    ],
)
def test_what_cannot_be_is_named(tokenizer, change, message):
    settings = {"concept": "red star", "place": "before", "tokens": 3} | change
    with pytest.raises(AegisError, match=message):
        template(tokenizer[0], **settings)


def test_a_place_without_the_concept_needs_no_room_for_it(tokenizer):
    found = template(tokenizer[0], "red star", "alone", 8)
    assert (found.slots >= 0).sum() == 8


def test_tokens_are_counted_before_a_list_of_them_is_made(tokenizer):
    count = 10**15  # of which no list fits into any memory
    for place in PLACES:
        with pytest.raises(AegisError, match=f"{count} learnt tokens exceed the 10 positions"):
            template(tokenizer[0], "red star", place, count, "sky")
    for place in INSERTIONS:
        with pytest.raises(AegisError, match=f"{count} learnt tokens make 10000.* tokens, but the text encoder sees 8"):
            insertion(tokenizer[0], "red star", place, count, "unlearndiffatk")
