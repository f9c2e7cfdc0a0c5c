"""Both sides of the loading benchmark, at tiny size in this process: same bits, nothing left behind."""

import pytest

from aegis_jax.plan import stable_diffusion as sd_configs
from benchmarks import pipeline_io, trials


@pytest.fixture(scope="module", params=["float32", "float16"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("io") / "model"
    return folder, request.param, pipeline_io.make(folder, "tiny", request.param)


def test_both_sides_hold_the_same_weights(made, tmp_path):
    folder, dtype, counts = made
    results = {side: [pipeline_io.one(side, folder, tmp_path, dtype)] for side in pipeline_io.SIDES}
    ours, theirs = (found[0] for found in results.values())
    assert ours["bits"] == theirs["bits"]
    assert ours["weights_bytes"] == theirs["weights_bytes"] == sum(counts.values()) * (4 if dtype == "float32" else 2)
    assert not list(tmp_path.iterdir())
    result = {
        "about": trials.about(),
        "dtype": dtype,
        "figures": {side: trials.figures(found) for side, found in results.items()},
        "ratios": {key: trials.ratio(*results.values(), key) for key in pipeline_io.ROWS},
    }
    text = pipeline_io.text(result)
    assert text.count("\n| ") == len(pipeline_io.ROWS) + 1 and "accelerate" in text


def test_the_full_size_is_that_of_sd14():
    import jax

    from aegis_jax.io.pipeline import MODELS
    from aegis_jax.models import model

    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(model.abstract(MODELS[name], config).params))
        for name, config in (("unet", sd_configs.unet()), ("vae", sd_configs.VAE), ("text_encoder", pipeline_io.TEXT))
    }
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
