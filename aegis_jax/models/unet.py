"""UNet2DConditionModel of Stable Diffusion 1.x and 2.x, driven by its diffusers config.json. NHWC.

Unusual points, all of them diffusers':
- `attention_head_dim` means the *number* of heads (an old misnomer that the files still carry);
- GroupNorm eps is `norm_eps` (1e-5) in resnets and at the end, 1e-6 before attention;
- latents whose sides are no multiple of the total downsampling are upsampled to their skip connection's size.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from aegis_jax.models.attention import Attention, Transformer2DModel
from aegis_jax.models.layers import (
    ACTIVATIONS,
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    conv,
    group_norm,
    sinusoidal,
)
from aegis_jax.models.model import Graph, bind, full_precision
from aegis_jax.models.unet_config import check


def _keep(part, *inputs):
    return part(*inputs)


def _recompute(part, *inputs):
    """Keeps nothing of a part but its inputs for the backward pass, which computes the part once more."""
    return jax.checkpoint(lambda *inputs: part(*inputs))(*inputs)


class Stage(nnx.Module):
    """One resolution: resnets, each followed by a transformer where the block type has attention.

    diffusers spreads this over CrossAttnDownBlock2D, DownBlock2D, CrossAttnUpBlock2D, UpBlock2D and the two mid
    blocks; they differ in which of the parts below exist and in what is concatenated on the way.
    """

    def __init__(self, widths_in, n_out, c, *, block=None, rngs, resnet_scale=1.0):
        """`widths_in`: input channels of each resnet. `block`: position of the stage's attention settings, or None."""
        groups = c["norm_num_groups"]
        self.resnets = nnx.List(
            ResnetBlock2D(
                n_in,
                n_out,
                time_width=c["time_embed_dim"],
                groups=groups,
                eps=c["norm_eps"],
                act=c["act_fn"],
                scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
                output_scale=resnet_scale,
                rngs=rngs,
            )
            for n_in in widths_in
        )
        self.has_attention = block is not None
        if self.has_attention:
            heads = c["heads"][block]
            self.attentions = nnx.List(
                Transformer2DModel(
                    n_out,
                    c["cross_attention_dim"][block],
                    heads,
                    n_out // heads,
                    layers=c["transformer_layers_per_block"][block],
                    groups=groups,
                    linear_projection=c["use_linear_projection"],
                    only_cross_attention=c["only_cross_attention"][block],
                    rngs=rngs,
                )
                for _ in widths_in
            )


class DownBlock(Stage):
    def __init__(self, widths_in, n_out, c, *, downsample, rngs, **stage):
        super().__init__(widths_in, n_out, c, rngs=rngs, **stage)
        self.has_downsampler = downsample
        if downsample:
            self.downsamplers = nnx.List([Downsample2D(n_out, padding=c["downsample_padding"], rngs=rngs)])

    def __call__(self, x, temb, context, run):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = run(resnet, x, temb)
            if self.has_attention:
                x = run(self.attentions[i], x, context)
            skips.append(x)
        if self.has_downsampler:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UpBlock(Stage):
    def __init__(self, widths_in, n_out, c, *, upsample, rngs, **stage):
        super().__init__(widths_in, n_out, c, rngs=rngs, **stage)
        self.has_upsampler = upsample
        if upsample:
            self.upsamplers = nnx.List([Upsample2D(n_out, rngs=rngs)])

    def __call__(self, x, skips, temb, context, size, run):
        for i, resnet in enumerate(self.resnets):
            # Joined inside the part: the skip connection is kept already, and joined it would be kept once more.
            joined = lambda x, skip, temb, resnet=resnet: resnet(jnp.concatenate([x, skip], axis=-1), temb)  # noqa: E731
            x = run(joined, x, skips.pop(), temb)
            if self.has_attention:
                x = run(self.attentions[i], x, context)
        return self.upsamplers[0](x, size) if self.has_upsampler else x


class MidBlock(nnx.Module):
    """Resnet - transformer - resnet (UNetMidBlock2DCrossAttn), or a single resnet (UNetMidBlock2D)."""

    def __init__(self, width, c, *, rngs):
        last = len(c["block_out_channels"]) - 1
        with_attention = c["mid_block_type"] == "UNetMidBlock2DCrossAttn"
        resnet = lambda: ResnetBlock2D(  # noqa: E731
            width,
            width,
            time_width=c["time_embed_dim"],
            groups=c["norm_num_groups"],
            eps=c["norm_eps"],
            act=c["act_fn"],
            scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
            output_scale=c["mid_block_scale_factor"],
            rngs=rngs,
        )
        self.resnets = nnx.List([resnet(), resnet()] if with_attention else [resnet()])
        self.attentions = nnx.List(
            [
                Transformer2DModel(
                    width,
                    c["cross_attention_dim"][last],
                    c["heads"][last],
                    width // c["heads"][last],
                    layers=c["transformer_layers_per_block"][last],
                    groups=c["norm_num_groups"],
                    linear_projection=c["use_linear_projection"],
                    only_cross_attention=False,
                    rngs=rngs,
                )
            ]
            if with_attention
            else []
        )

    def __call__(self, x, temb, context, run):
        x = run(self.resnets[0], x, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:]):
            x = run(resnet, run(attention, x, context), temb)
        return x


class UNet2DConditionModel(nnx.Module):
    """Raises `AegisError` naming every unsupported option of the config."""

    def __init__(self, config, *, rngs):
        c = check(config)
        self.c = _Static(c)
        widths, layers = c["block_out_channels"], c["layers_per_block"]
        n = len(widths)
        self.conv_in = conv(c["in_channels"], widths[0], c["conv_in_kernel"], rngs)
        self.time_embedding = TimestepEmbedding(
            widths[0], c["time_embed_dim"], act=c["act_fn"], post_act=c["timestep_post_act"], rngs=rngs
        )
        inputs = [widths[0], *widths[:-1]]
        self.down_blocks = nnx.List(
            DownBlock(
                [inputs[i]] + [widths[i]] * (layers[i] - 1),
                widths[i],
                c,
                downsample=i < n - 1,
                block=i if c["down_block_types"][i].startswith("CrossAttn") else None,
                rngs=rngs,
            )
            for i in range(n)
        )
        if c["mid_block_type"] is not None:
            self.mid_block = MidBlock(widths[-1], c, rngs=rngs)
        self.up_blocks = nnx.List(self._up_block(j, inputs, c, rngs) for j in range(n))
        self.conv_norm_out = group_norm(widths[0], c["norm_num_groups"], c["norm_eps"], rngs)
        self.conv_out = conv(widths[0], c["out_channels"], c["conv_out_kernel"], rngs)

    @staticmethod
    def _up_block(j, inputs, c, rngs):
        """The j-th up block mirrors down block i = n - 1 - j and takes its skip connections, last one first."""
        widths, layers = c["block_out_channels"], c["layers_per_block"]
        i = len(widths) - 1 - j
        below = widths[min(i + 1, len(widths) - 1)]
        skips = [widths[i]] * layers[i] + [inputs[i]]
        hidden = [below] + [widths[i]] * layers[i]
        return UpBlock(
            [h + s for h, s in zip(hidden, skips)],
            widths[i],
            c,
            upsample=i > 0,
            block=i if c["up_block_types"][j].startswith("CrossAttn") else None,
            rngs=rngs,
        )

    def __call__(self, sample, t, context, *, remat=False):
        c, run = self.c, _recompute if remat else _keep
        if c["center_input_sample"]:
            sample = 2 * sample - 1.0
        t = jnp.broadcast_to(jnp.asarray(t), (sample.shape[0],))
        features = sinusoidal(
            t, c["block_out_channels"][0], flip_sin_to_cos=c["flip_sin_to_cos"], freq_shift=c["freq_shift"]
        )
        temb = self.time_embedding(features.astype(sample.dtype))
        if c["time_embedding_act_fn"] is not None:
            temb = ACTIVATIONS[c["time_embedding_act_fn"]](temb)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, temb, context, run)
            skips += block_skips
        if c["mid_block_type"] is not None:
            x = self.mid_block(x, temb, context, run)
        for block in self.up_blocks:
            # Where this block upsamples, the next block's first skip connection says to what size.
            remaining = skips[: -len(block.resnets)]
            size = remaining[-1].shape[1:3] if remaining else None
            x = block(x, skips, temb, context, size, run)
        return self.conv_out(ACTIVATIONS[c["act_fn"]](self.conv_norm_out(x)))


class _Static(dict):
    """The checked config as hashable module data, so that the graph stays a static argument of `jax.jit`."""

    def __hash__(self):
        return hash(repr(sorted(self.items(), key=lambda item: item[0])))


def without_flash(graph, params) -> Graph:
    """The same network for programs that the compiler splits over several devices: see `attend`."""
    module = bind(graph, params)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Attention):
            part.flash = False
    return Graph(nnx.split(module)[0])


def apply(graph, params, sample, t, encoder_hidden_states, *, remat: bool = False):
    """The network's raw output (noise or v, as the scheduler's prediction type says).

    Args: sample (B, h, w, C); t (B,) or scalar, training timesteps; encoder_hidden_states (B, L, D).
    remat: a backward pass computes each resnet and transformer once more instead of keeping what is inside them: the
    same numbers for less memory and one more forward pass.
    Returns (B, h, w, C_out) in the dtype of `sample`; float32 is computed in full (model.full_precision).
    """
    with full_precision(sample.dtype):
        return bind(graph, params)(sample, t, encoder_hidden_states, remat=remat)
