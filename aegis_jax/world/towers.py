"""Small image networks of the world: convolutional towers (judge, CLIP), residual ones (second judge), committees.

Images are (B, 32, 32, 3) in [-1, 1], features (B, width).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from aegis_jax.models import initial
from aegis_jax.models.convolution import Conv


class ConvTower(nnx.Module):
    """Convolutions down to 4x4, then a dense layer over what is left of the plane."""

    def __init__(self, config, *, rngs):
        widths, pad = config["widths"], ((1, 1), (1, 1))
        self.convs = nnx.List(
            Conv(n_in, n_out, (3, 3), strides=stride, padding=pad, rngs=rngs)
            for n_in, n_out, stride in zip([3, *widths[:-1]], widths, config["strides"], strict=True)
        )
        self.norms = nnx.List(initial.GroupNorm(n, num_groups=8, rngs=rngs) for n in widths)
        self.dense = initial.Linear(4 * 4 * widths[-1], config["features"], rngs=rngs)

    def __call__(self, x_BHWC):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BHWC = jax.nn.silu(norm(conv(x_BHWC)))
        return jax.nn.silu(self.dense(x_BHWC.reshape(len(x_BHWC), -1)))


class ResidualTower(nnx.Module):
    """Residual convolutions between patch merges down to 4x4, the plane kept: features 16 * widths[-1]."""

    def __init__(self, config, *, rngs):
        widths, same = config["widths"], ((1, 1), (1, 1))
        inputs = [3, *widths[:-1]]
        self.merges = nnx.List(
            initial.Conv(n_in, n_out, (size, size), strides=2, padding="SAME", rngs=rngs)
            for n_in, n_out, size in zip(inputs, widths, [4] + [2] * (len(widths) - 1), strict=True)
        )
        stages = [[width] * blocks for width, blocks in zip(widths, config["blocks"], strict=True)]
        self.convs = nnx.List(Conv(n, n, (3, 3), padding=same, rngs=rngs) for stage in stages for n in stage)
        self.norms = nnx.List(initial.GroupNorm(n, num_groups=1, rngs=rngs) for stage in stages for n in stage)
        self.blocks = tuple(config["blocks"])
        self.norm = initial.LayerNorm(widths[-1], rngs=rngs)

    def __call__(self, x_BHWC):
        layers = iter(zip(self.convs, self.norms, strict=True))
        for merge, blocks in zip(self.merges, self.blocks, strict=True):
            x_BHWC = merge(x_BHWC)
            for _ in range(blocks):
                conv, norm = next(layers)
                x_BHWC = x_BHWC + jax.nn.relu(conv(norm(x_BHWC)))
        return self.norm(x_BHWC).reshape(len(x_BHWC), -1)


TOWERS = {"conv": ConvTower, "residual": ResidualTower}


class Headed(nnx.Module):
    """A tower and a linear head on it: (B, 32, 32, 3) -> features (B, width) and outputs (B,
    config["outputs"]).
    """

    def __init__(self, config, *, rngs):
        self.tower = TOWERS[config["architecture"]](config, rngs=rngs)
        self.head = initial.Linear(config["features"], config["outputs"], rngs=rngs)

    def __call__(self, x_BHWC):
        features = self.tower(x_BHWC)
        return features, self.head(features)


class Committee(nnx.Module):
    """Networks of one architecture that differ in their first weights: (B, 32, 32, 3) -> (members, B, outputs)."""

    def __init__(self, config, *, rngs):
        self.members = nnx.List(Headed(config, rngs=rngs) for _ in range(config["members"]))

    def __call__(self, x_BHWC):
        return jnp.stack([member(x_BHWC)[1] for member in self.members])
