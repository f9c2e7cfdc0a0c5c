"""One pipeline for all tests of the step: the fewest layers that still have cross-attention, for fast compilation."""

import functools

import pytest

import aegis_jax


@pytest.fixture(scope="session")
def fewest(tiny):
    """fewest(**options) -> the folder of such a pipeline, with further options of tests/tiny.py."""
    unet = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 8,
        "attention_head_dim": 2,
    }
    return functools.partial(tiny, unet=unet, text={"num_hidden_layers": 1})


@pytest.fixture(scope="session")
def folder(fewest):
    return fewest()


@pytest.fixture(scope="session")
def pipeline(folder):
    return aegis_jax.load_pipeline(folder)
