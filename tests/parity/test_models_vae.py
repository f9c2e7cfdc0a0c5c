"""AutoencoderKL against diffusers: both directions, outputs and gradients, float32 on the CPU."""

import functools

import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.models import model as model_lib
from aegis_jax.models import vae

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tests.parity import compare, torch_weights  # noqa: E402


def blocks(*widths):
    n = len(widths)
    return {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
    }


SD = {
    **blocks(16, 32, 64, 64),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TWO = {**blocks(8, 16), "norm_num_groups": 4}
# name: (config, images (B, H, W))
CASES = {
    "sd": (SD, (1, 32, 16)),
    "odd_sizes_batch_3": ({**TWO, "layers_per_block": 2}, (3, 13, 22)),
    "no_attention": (
        {**blocks(8, 12, 16), "norm_num_groups": 4, "mid_block_add_attention": False},
        (2, 9, 8),
    ),
    "no_quant_convs": ({**TWO, "use_quant_conv": False, "use_post_quant_conv": False}, (1, 8, 8)),
    "8_latent_channels_grey_images": (
        {**TWO, "latent_channels": 8, "in_channels": 1, "out_channels": 2, "act_fn": "mish"},
        (1, 10, 6),
    ),
    "one_level_one_group": ({**blocks(10), "norm_num_groups": 1, "act_fn": "GELU"}, (2, 5, 7)),
}


def reference(config):
    torch.manual_seed(1)
    return torch_weights.randomise(diffusers.AutoencoderKL(**config), 1)


def nchw(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    """Both directions at once: loss = <weights, mean> + <weights, logvar> + <weights, decoded>."""
    config, (B, H, W) = CASES[name]
    module = reference(config)
    generator = np.random.default_rng(2)
    images = generator.standard_normal((B, H, W, config.get("in_channels", 3)), np.float32)
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    latent_shape = (B, H // scale, W // scale, config.get("latent_channels", 4))
    latents = generator.standard_normal(latent_shape, np.float32)

    compare.unit_output(module.encoder.conv_out, lambda: module.encode(nchw(images))[0].mean)
    compare.unit_output(module.decoder.conv_out, lambda: module.decode(nchw(latents))[0])
    torch_latents = nchw(latents).requires_grad_()
    torch_images = nchw(images).requires_grad_()
    posterior = module.encode(torch_images)[0]
    wanted = [posterior.mean, posterior.logvar, module.decode(torch_latents)[0]]
    weights = [generator.standard_normal(compare.nhwc(w).shape, np.float32) for w in wanted]
    sum((w * nchw(weight)).sum() for w, weight in zip(wanted, weights, strict=True)).backward()

    graph, params = compare.ours(vae.AutoencoderKL, config, module)

    def both(params, images, latents):
        return [*vae.encode(graph, params, images), vae.decode(graph, params, latents)]

    found, (params_grad, images_grad, latents_grad) = compare.value_and_gradients(
        both, params, images, latents, weights=weights
    )
    for part, ours, theirs in zip(("mean", "logvar", "decoded"), found, wanted, strict=True):
        compare.assert_output(ours, compare.nhwc(theirs), f"vae {name} {part}")
    gradients = model_lib.flatten(params_grad) | {"images": images_grad, "latents": latents_grad}
    wanted_gradients = torch_weights.gradients(module) | {
        "images": compare.nhwc(torch_images.grad),
        "latents": compare.nhwc(torch_latents.grad),
    }
    compare.assert_gradients(gradients, wanted_gradients, f"vae {name}")


def test_log_variance_is_clipped_as_in_diffusers():
    config = {**TWO, "use_quant_conv": False}
    module = reference(config)
    with torch.no_grad():
        module.encoder.conv_out.weight *= 1000
    images = np.random.default_rng(0).standard_normal((1, 8, 8, 3), np.float32)
    graph, params = compare.ours(vae.AutoencoderKL, config, module)
    _, logvar = compare.compiled(functools.partial(vae.encode, graph), params, images)
    assert float(logvar.min()) == -30 and float(logvar.max()) == 20
    with torch.no_grad():
        wanted = compare.nhwc(module.encode(nchw(images))[0].logvar)
    np.testing.assert_allclose(logvar, wanted, atol=2e-3)  # of values around 1000 before the clip


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "AutoencoderTiny"},
        {"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
        {"up_block_types": ["UpDecoderBlock2D"]},
        {"act_fn": "snake"},
        {"norm_num_groups": 3},
        {"shift_factor": 0.1},
        {"latents_mean": [0.0] * 4},
    ],
    ids=lambda change: "-".join(change),
)
def test_unsupported_options_are_refused_by_name(change):
    with pytest.raises(AegisError, match=next(iter(change))):
        model_lib.abstract(vae.AutoencoderKL, {**TWO, **change})
