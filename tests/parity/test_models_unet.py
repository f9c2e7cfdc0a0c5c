"""UNet2DConditionModel against diffusers: outputs and gradients, float32 on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.models import model as model_lib
from aegis_jax.models import unet

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from tests.parity import compare, torch_weights  # noqa: E402

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD14 = {
    "sample_size": 64,
    "block_out_channels": [32, 64, 128, 128],
    "layers_per_block": 2,
    "norm_num_groups": 16,  # 32 groups of the real 320 channels: several channels each
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    "attention_head_dim": 8,
    "cross_attention_dim": 48,
}
SD21 = {
    **SD14,
    "layers_per_block": 1,
    "attention_head_dim": [1, 2, 4, 4],
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "upcast_attention": True,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
}
TWO = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": [CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP],
    "attention_head_dim": 4,
    "cross_attention_dim": 20,
}
# name: (config, sample (B, h, w), t). Options that do not touch each other share a config.
CASES = {
    "sd14": (SD14, (1, 8, 8), [981]),
    "sd21": (SD21, (1, 8, 8), [1]),
    "24x40_batch_3": ({**TWO, "layers_per_block": [1, 2]}, (3, 24, 40), [0, 499, 999]),
    "one_attention_sizes_that_do_not_halve": (
        {
            "block_out_channels": [8, 16, 16, 24],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": [DOWN, CROSS_DOWN, DOWN, DOWN],
            "up_block_types": [UP, UP, UP, UP],
            "mid_block_type": "UNetMidBlock2D",
            "attention_head_dim": 2,
            "cross_attention_dim": 20,
        },
        (2, 20, 12),
        250,
    ),
    "lists": (
        {
            "block_out_channels": [16, 24, 32],
            "layers_per_block": [1, 2, 1],
            "norm_num_groups": 4,
            "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
            "up_block_types": [CROSS_UP, CROSS_UP, UP],
            "attention_head_dim": [2, 3, 4],
            "cross_attention_dim": [12, 20, 20],
            "transformer_layers_per_block": [3, 2, 1],
            "only_cross_attention": [False, True, False],
        },
        (2, 5, 7),
        [3, 700],
    ),
    "time_features_no_mid_block": (
        {
            **TWO,
            "mid_block_type": None,
            "center_input_sample": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "act_fn": "mish",
            "time_embedding_dim": 24,
            "time_embedding_act_fn": "gelu",
            "timestep_post_act": "relu",
        },
        (2, 4, 6),
        [999, 7],
    ),
    "inpainting_channels_scale_shift": (
        {
            **TWO,
            "in_channels": 9,
            "out_channels": 4,
            "conv_in_kernel": 5,
            "conv_out_kernel": 1,
            "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
            "mid_block_scale_factor": 1.4,
            "downsample_padding": 0,
            "norm_eps": 1e-3,
            "only_cross_attention": True,
        },
        (2, 7, 9),
        [20, 640],
    ),
    "odd_widths_heads_that_do_not_divide": (
        {
            **TWO,
            "block_out_channels": [15, 35],
            "norm_num_groups": 5,
            "attention_head_dim": 4,
            "act_fn": "ReLU",
            "transformer_layers_per_block": 2,
            "use_linear_projection": True,
            "dropout": 0.3,
            # Read by block types other than these four: without effect in diffusers too.
            "resnet_skip_time_act": True,
            "mid_block_only_cross_attention": True,
            "resnet_out_scale_factor": 2.0,
            "cross_attention_norm": "layer_norm",
        },
        (1, 6, 6),
        [77],
    ),
}


def reference(config, seed):
    torch.manual_seed(seed)
    return torch_weights.randomise(diffusers.UNet2DConditionModel(**config), seed)


def inputs(config, shape, seed):
    """sample (B, h, w, C), text (B, 7, D), weights of the loss (B, h, w, C_out)."""
    generator = np.random.default_rng(seed)
    width = np.max(config["cross_attention_dim"])
    shapes = (*shape, config.get("in_channels", 4)), (shape[0], 7, width), (*shape, 4)
    return [generator.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name):
    config, shape, t = CASES[name]
    module = reference(config, 1)
    sample, text, weights = inputs(config, shape, 2)
    torch_text = torch.from_numpy(text).requires_grad_()

    def run():
        return module(torch.from_numpy(sample).permute(0, 3, 1, 2), torch.tensor(t), torch_text)[0]

    compare.unit_output(module.conv_out, run)
    wanted = run()
    (wanted.permute(0, 2, 3, 1) * torch.from_numpy(weights)).sum().backward()

    graph, params = compare.ours(unet.UNet2DConditionModel, config, module)
    found, (params_grad, text_grad) = compare.value_and_gradients(
        lambda params, text: unet.apply(graph, params, sample, jnp.asarray(t), text),
        params,
        text,
        weights=weights,
    )
    compare.assert_output(found, compare.nhwc(wanted), f"unet {name}")
    gradients = {**model_lib.flatten(params_grad), "text": text_grad}
    wanted_gradients = {**torch_weights.gradients(module), "text": torch_text.grad.numpy()}
    compare.assert_gradients(gradients, wanted_gradients, f"unet {name}")


def test_configs_as_saved_by_diffusers_are_the_same_network(tmp_path):
    """config.json as written, with all its defaults spelled out, gives the same structure."""
    diffusers.UNet2DConditionModel(**TWO).save_config(tmp_path)
    saved = diffusers.UNet2DConditionModel.load_config(tmp_path)
    assert saved["num_attention_heads"] is None and "_diffusers_version" in saved
    found = model_lib.abstract(unet.UNet2DConditionModel, saved)
    assert found.graph == model_lib.abstract(unet.UNet2DConditionModel, TWO).graph


SIMPLE = "SimpleCrossAttnDownBlock2D"
REFUSED = [
    {"_class_name": "UNet2DModel"},
    {"num_class_embeds": 10},
    {"class_embed_type": "timestep"},
    {"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
    {"encoder_hid_dim": 12},
    {"encoder_hid_dim_type": "text_proj"},
    {"time_cond_proj_dim": 12},
    {"time_embedding_type": "fourier"},
    {"dual_cross_attention": True},
    {"attention_type": "gated"},
    {"class_embeddings_concat": True},
    {"num_attention_heads": 4},
    {"norm_num_groups": None},
    {"norm_num_groups": 6},
    {"act_fn": "snake"},
    {"resnet_time_scale_shift": "ada_group"},
    {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
    {"down_block_types": [SIMPLE, DOWN]},
    {"down_block_types": [CROSS_DOWN, "KDownBlock2D"]},
    {"up_block_types": ["ResnetUpsampleBlock2D", CROSS_UP]},
    {"transformer_layers_per_block": [[1, 2], [1]]},
    {"reverse_transformer_layers_per_block": [[1, 2], [1]]},
    {"layers_per_block": [1]},
    {"attention_head_dim": [1, 2, 3]},
    {"attention_head_dim": 4096},
    {"block_out_channels": [16]},
]


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: "-".join(change))
def test_unsupported_options_are_refused_by_name(change):
    with pytest.raises(AegisError) as caught:
        model_lib.abstract(unet.UNet2DConditionModel, {**TWO, **change})
    # What is wrong with the number of blocks may be put as a fault of either list.
    names = [*change, "block"] if "block_out_channels" in change else list(change)
    assert any(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


def test_all_refusals_come_at_once():
    change = {"num_class_embeds": 10, "act_fn": "snake", "dual_cross_attention": True}
    with pytest.raises(AegisError) as caught:
        model_lib.abstract(unet.UNet2DConditionModel, {**TWO, **change})
    assert all(name in str(caught.value) for name in change)


@pytest.mark.slow
def test_full_size_sd14():
    """859,520,964 random parameters, one forward pass at 64x64 latents."""
    config = {
        **SD14,
        "block_out_channels": [320, 640, 1280, 1280],
        "norm_num_groups": 32,
        "cross_attention_dim": 768,
    }
    module = reference(config, 1).requires_grad_(False)
    assert sum(parameter.numel() for parameter in module.parameters()) == 859_520_964
    sample, text, _ = inputs(config, (1, 64, 64), 2)
    text = np.tile(text, (1, 11, 1))
    latents = torch.from_numpy(sample).permute(0, 3, 1, 2)
    run = functools.partial(module, latents, torch.tensor([981]), torch.from_numpy(text))
    wanted = compare.nhwc(compare.unit_output(module.conv_out, lambda: run()[0]))
    graph, params = compare.ours(unet.UNet2DConditionModel, config, module)
    found = jax.jit(unet.apply, static_argnums=0)(graph, params, sample, jnp.array([981]), text)
    compare.assert_output(found, wanted, "unet full size SD1.4")
