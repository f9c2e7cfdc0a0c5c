"""erasure/texts.py: how a concept is found in texts."""

import numpy as np
import pytest

from aegis_jax.erasure.texts import check_text_width, naming
from aegis_jax.errors import AegisError


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


def test_a_width_of_text_that_no_attention_has_is_no_matter():
    encoder = {"text_model": {"final_layer_norm": {"bias": np.zeros(32)}}}
    unet = {"block_out_channels": [32, 64], "cross_attention_dim": [32, 48], "mid_block_type": "UNetMidBlock2D"}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D"] * 2}
    check_text_width(unet, encoder)
    with pytest.raises(AegisError, match=r"cross_attention_dim=\[32, 48\] .* hidden_size is 32"):
        check_text_width(unet | {"mid_block_type": "UNetMidBlock2DCrossAttn"}, encoder)
