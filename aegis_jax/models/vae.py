"""AutoencoderKL, encoder and decoder, driven by its diffusers config.json. NHWC; GroupNorm eps is 1e-6 throughout."""

import jax
import jax.numpy as jnp
from flax import nnx

from aegis_jax import kinds
from aegis_jax.models.attention import Attention
from aegis_jax.models.convolution import Conv
from aegis_jax.models.layers import (
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
    check_activation,
    conv,
    group_norm,
    refuse,
)
from aegis_jax.models.model import bind, full_precision

_EPS = 1e-6
_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_KINDS = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels"), kinds.SIZE),
    "layers_per_block": kinds.LAYERS,
    **dict.fromkeys(("down_block_types", "up_block_types"), kinds.each(kinds.NAME)),
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), kinds.FLAG),
    "block_out_channels": kinds.each(kinds.SIZE),
    "norm_num_groups": kinds.SIZE,
    "act_fn": kinds.NAME,
    "scaling_factor": kinds.POSITIVE,
}


def unknown(config: dict) -> list[str]:
    """The keys that diffusers does not know either and reads past."""
    return [key for key in config if not key.startswith("_") and key not in _DEFAULTS]


def _checked(config: dict) -> dict:
    """The config with defaults filled in; raises `AegisError` naming every unsupported option."""
    full = _DEFAULTS | {k: v for k, v in config.items() if not k.startswith("_")}
    problems = []
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        problems.append(f"_class_name={config['_class_name']!r} (supported: AutoencoderKL)")
    malformed = kinds.problems(full, _KINDS)
    if malformed:  # what else is wrong cannot be told
        refuse(problems + malformed, "vae")
    for name, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if set(full[name]) != {only} or len(full[name]) != len(full["block_out_channels"]):
            problems.append(f"{name}={full[name]} (supported: {only}, one per entry of block_out_channels)")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if full[name] is not None:
            problems.append(f"{name}={full[name]!r} (supported: null)")
    groups, widths = full["norm_num_groups"], full["block_out_channels"]
    if any(width % groups for width in widths):
        problems.append(
            f"norm_num_groups={groups!r} (supported: a divisor of every entry of block_out_channels={list(widths)})"
        )
    full["act_fn"] = full["act_fn"].lower()  # as diffusers does
    check_activation(full["act_fn"], "act_fn", problems)
    refuse(problems, "vae")
    return full


class VAEAttention(Attention):
    """Single-head self-attention over pixels, with its own norm and residual."""

    def __init__(self, channels, groups, *, rngs):
        super().__init__(channels, channels, 1, channels, qkv_bias=True, rngs=rngs)
        self.group_norm = group_norm(channels, groups, _EPS, rngs)

    def __call__(self, x):
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(tokens, tokens).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels, c, *, rngs):
        resnet = lambda: ResnetBlock2D(  # noqa: E731
            channels, channels, groups=c["norm_num_groups"], eps=_EPS, act=c["act_fn"], rngs=rngs
        )
        # diffusers builds the attention between the two resnets; a config may leave it out.
        self.attentions = nnx.List(
            [VAEAttention(channels, c["norm_num_groups"], rngs=rngs)] if c["mid_block_add_attention"] else []
        )
        self.resnets = nnx.List([resnet(), resnet()])

    def __call__(self, x):
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class ResolutionBlock(nnx.Module):
    """The resnets of one resolution, then (but for the last) the change of resolution."""

    def __init__(self, n_in, n_out, layers, c, *, down=False, up=False, rngs):
        self.resnets = nnx.List(
            ResnetBlock2D(
                n_in if i == 0 else n_out, n_out, groups=c["norm_num_groups"], eps=_EPS, act=c["act_fn"], rngs=rngs
            )
            for i in range(layers)
        )
        if down:
            self.downsamplers = nnx.List([Downsample2D(n_out, padding=0, rngs=rngs)])
        if up:
            self.upsamplers = nnx.List([Upsample2D(n_out, rngs=rngs)])
        self.resamples = "downsamplers" if down else "upsamplers" if up else None

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.resamples is None else getattr(self, self.resamples)[0](x)


class Encoder(nnx.Module):
    def __init__(self, c, *, rngs):
        widths = c["block_out_channels"]
        self.conv_in = conv(c["in_channels"], widths[0], 3, rngs)
        inputs = [widths[0], *widths[:-1]]
        self.down_blocks = nnx.List(
            ResolutionBlock(n_in, n_out, c["layers_per_block"], c, down=i < len(widths) - 1, rngs=rngs)
            for i, (n_in, n_out) in enumerate(zip(inputs, widths))
        )
        self.mid_block = MidBlock(widths[-1], c, rngs=rngs)
        self.conv_norm_out = group_norm(widths[-1], c["norm_num_groups"], _EPS, rngs)
        self.conv_out = conv(widths[-1], 2 * c["latent_channels"], 3, rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, c, *, rngs):
        widths = c["block_out_channels"][::-1]
        self.conv_in = conv(c["latent_channels"], widths[0], 3, rngs)
        self.mid_block = MidBlock(widths[0], c, rngs=rngs)
        inputs = [widths[0], *widths[:-1]]
        self.up_blocks = nnx.List(
            ResolutionBlock(n_in, n_out, c["layers_per_block"] + 1, c, up=i < len(widths) - 1, rngs=rngs)
            for i, (n_in, n_out) in enumerate(zip(inputs, widths))
        )
        self.conv_norm_out = group_norm(widths[-1], c["norm_num_groups"], _EPS, rngs)
        self.conv_out = conv(widths[-1], c["out_channels"], 3, rngs)

    def __call__(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Raises `AegisError` for an unsupported option of the config, naming it."""

    def __init__(self, config, *, rngs):
        c = _checked(config)
        latent = c["latent_channels"]
        self.encoder = Encoder(c, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)
        self.has_quant_conv, self.has_post_quant_conv = c["use_quant_conv"], c["use_post_quant_conv"]
        if self.has_quant_conv:
            self.quant_conv = Conv(2 * latent, 2 * latent, (1, 1), rngs=rngs)
        if self.has_post_quant_conv:
            self.post_quant_conv = Conv(latent, latent, (1, 1), rngs=rngs)


def encode(graph, params, images):
    """Images (B, H, W, 3) in [-1, 1] -> mean and log-variance, each (B, h, w, 4), not multiplied by scaling_factor."""
    vae = bind(graph, params)
    with full_precision(images.dtype):
        moments = vae.encoder(images)
        if vae.has_quant_conv:
            moments = vae.quant_conv(moments)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def decode(graph, params, latents):
    """Latents (B, h, w, 4), already divided by scaling_factor -> images (B, H, W, 3), about [-1, 1]."""
    vae = bind(graph, params)
    with full_precision(latents.dtype):
        return vae.decoder(vae.post_quant_conv(latents) if vae.has_post_quant_conv else latents)
