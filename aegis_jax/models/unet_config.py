"""Reads a UNet2DConditionModel config.json: fills defaults, spreads per-block settings, refuses what is unsupported."""

import re

from aegis_jax import kinds
from aegis_jax.models.layers import check_activation, per_block, refuse

# diffusers' defaults for keys that a file may leave out.
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}
_KINDS = {
    **dict.fromkeys(("in_channels", "out_channels", "norm_num_groups"), kinds.SIZE),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), kinds.KERNEL),
    **dict.fromkeys(("cross_attention_dim", "attention_head_dim"), kinds.one_or_each(kinds.SIZE)),
    "layers_per_block": kinds.one_or_each(kinds.LAYERS),
    **dict.fromkeys(("center_input_sample", "flip_sin_to_cos", "use_linear_projection"), kinds.FLAG),
    **dict.fromkeys(("down_block_types", "up_block_types"), kinds.each(kinds.NAME)),
    **dict.fromkeys(("time_embedding_act_fn", "timestep_post_act"), kinds.optional(kinds.NAME)),
    **dict.fromkeys(("mid_block_scale_factor", "norm_eps"), kinds.POSITIVE),
    "sample_size": kinds.optional(kinds.SIDES),
    "block_out_channels": kinds.each(kinds.SIZE),
    "transformer_layers_per_block": kinds.one_or_each(kinds.LAYERS_OR_NONE),
    "only_cross_attention": kinds.one_or_each(kinds.FLAG),
    "downsample_padding": kinds.COUNT,
    "freq_shift": kinds.NUMBER,
    "act_fn": kinds.NAME,
    "time_embedding_dim": kinds.optional(kinds.SIZE),
}
# Known to diffusers, meaningful only at these values here.
_ONLY = {
    "num_attention_heads": (None,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "num_class_embeds": (None,),
    "time_embedding_type": ("positional",),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
}
# Known to diffusers and read only by blocks and embeddings that are refused here: without effect at any value.
_IDLE = {
    "resnet_skip_time_act",
    "resnet_out_scale_factor",
    "cross_attention_norm",
    "mid_block_only_cross_attention",
    "addition_time_embed_dim",
    "addition_embed_type_num_heads",
    "projection_class_embeddings_input_dim",
}
_ACTIVATIONS = ("act_fn", "time_embedding_act_fn", "timestep_post_act")


def native_size(config: dict) -> tuple[int, int] | None:
    """(h, w) of the latents that a UNet was made for: its sample_size; None where config.json says none.

    A UNet from before diffusers 0.9 that says less than 64 means 64: Stable Diffusion 1.x was published so, and
    diffusers reads it so.
    """
    size, version = config.get("sample_size"), re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    if isinstance(size, int) and size < 64 and version and (int(version[1]), int(version[2])) < (0, 9):
        size = 64
    return (size, size) if isinstance(size, int) else size and tuple(size)


def unknown(config: dict) -> list[str]:
    """The keys that diffusers does not know either and reads past, such as what a trainer kept there of its EMA."""
    return [key for key in config if not key.startswith("_") and key not in {*_DEFAULTS, *_ONLY, *_IDLE}]


def check(config: dict) -> dict:
    """config.json -> the settings the UNet is built from.

    Per-block settings become lists (`heads`, `cross_attention_dim`, `layers_per_block`, ...).
    Raises `AegisError` naming every unsupported option at once.
    """
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    c = _DEFAULTS | {k: v for k, v in given.items() if k in _DEFAULTS}
    problems = []
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        problems.append(f"_class_name={config['_class_name']!r} (supported: UNet2DConditionModel)")
    for key, value in given.items():
        if key in _ONLY and value not in _ONLY[key]:
            problems.append(f"{key}={value!r} (supported: {_ONLY[key][0]!r})")
    malformed = kinds.problems(c, _KINDS)
    if malformed:  # what else is wrong cannot be told
        refuse(problems + malformed, "unet")
    c |= {key: c[key].lower() for key in _ACTIVATIONS if isinstance(c[key], str)}  # as diffusers does
    n = len(c["block_out_channels"])
    _check_choices(c, n, problems)
    refuse(problems, "unet")

    for key in ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "only_cross_attention"):
        c[key] = per_block(c[key], n, key)
    c["heads"] = per_block(c["attention_head_dim"], n, "attention_head_dim")
    _check_heads(c)
    c["time_embed_dim"] = c["time_embedding_dim"] or 4 * c["block_out_channels"][0]
    return c


def _check_heads(c: dict) -> None:
    """A head has at least one channel. Stage i of the way down and stage n - 1 - i of the way up share settings."""
    types = c["down_block_types"], c["up_block_types"][::-1]
    stages = list(zip(c["block_out_channels"], c["heads"], *types, strict=True))
    used = [(width, heads) for width, heads, *types in stages if any(t.startswith("CrossAttn") for t in types)]
    if c["mid_block_type"] == "UNetMidBlock2DCrossAttn":
        used.append(stages[-1][:2])
    refuse([f"attention_head_dim={heads} for {width} channels" for width, heads in used if heads > width][:1], "unet")


def _check_choices(c: dict, n: int, problems: list[str]) -> None:
    for key, allowed in (
        ("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D")),
        ("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D")),
    ):
        if len(c[key]) != n:
            problems.append(f"{key} has {len(c[key])} entries for {n} block_out_channels")
        for name in sorted(set(c[key]) - set(allowed)):
            problems.append(f"{key} contains {name} (supported: {', '.join(allowed)})")
    for key, allowed in (
        ("mid_block_type", ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)),
        ("resnet_time_scale_shift", ("default", "scale_shift")),
    ):
        if c[key] not in allowed:
            problems.append(f"{key}={c[key]!r} (supported: {', '.join(map(str, allowed))})")
    groups = c["norm_num_groups"]
    if any(width % groups for width in c["block_out_channels"]):
        problems.append(
            f"norm_num_groups={groups!r} (supported: a divisor of every entry of block_out_channels="
            f"{list(c['block_out_channels'])})"
        )
    for key in _ACTIVATIONS:
        if key == "act_fn" or c[key] is not None:
            check_activation(c[key], key, problems)
