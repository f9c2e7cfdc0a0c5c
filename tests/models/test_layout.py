"""The leaf rule between PyTorch's tensors and ours."""

import jax
import numpy as np
import torch

from aegis_jax.models import layout


def test_keys():
    for path, key in {
        "down_blocks.0.resnets.1.conv1.kernel": "down_blocks.0.resnets.1.conv1.weight",
        "mid_block.attentions.0.norm.scale": "mid_block.attentions.0.norm.weight",
        "text_model.embeddings.token_embedding.embedding": ("text_model.embeddings.token_embedding.weight"),
        "time_embedding.linear_1.bias": "time_embedding.linear_1.bias",
    }.items():
        assert layout.torch_key(path) == key


def test_leaf_rules_against_torch_layers():
    """What the rule makes of torch's weights computes what torch computes."""
    generator = torch.Generator().manual_seed(0)
    linear, conv = torch.nn.Linear(3, 5), torch.nn.Conv2d(2, 4, 3, padding=1)
    x, image = torch.randn(7, 3, generator=generator), torch.randn(1, 2, 6, 5, generator=generator)
    kernel = layout.from_torch("a.kernel", linear.weight.detach().numpy())
    ours = x.numpy() @ kernel + linear.bias.detach().numpy()
    np.testing.assert_allclose(ours, linear(x).detach().numpy(), atol=1e-6)
    kernel = layout.from_torch("a.kernel", conv.weight.detach().numpy())
    out = jax.lax.conv_general_dilated(
        image.numpy().transpose(0, 2, 3, 1),
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    ours = np.asarray(out + conv.bias.detach().numpy()).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, conv(image).detach().numpy(), atol=1e-5)
    for shape, names in {
        (3, 3, 2, 4): ["x.kernel"],
        (3, 5): ["x.kernel", "x.embedding"],
        (7,): ["x.scale", "x.bias"],
    }.items():
        leaf = np.arange(np.prod(shape)).reshape(shape)
        for path in names:
            there = layout.to_torch(path, leaf)
            assert there.shape == layout.torch_shape(path, shape)
            assert (there.shape == shape) == (not path.endswith("kernel"))
            np.testing.assert_array_equal(layout.from_torch(path, there), leaf)
