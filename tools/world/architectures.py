"""The configs of the world's parts: VAE, UNet, scheduler and text encoder as diffusers reads them; CLIP; the judges."""

from aegis_jax.world import captions, judge, tokenizer
from aegis_jax.world.concepts import ATTRIBUTES

TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "intermediate_size": 512,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": tokenizer.MAX_LENGTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": 64,
}
# CLIP's image tower. Convolutional, because a vision transformer of this size learns shapes too slowly on a CPU.
VISION = {
    "architecture": "conv",
    "widths": [32, 64, 96, 128],
    "strides": [2, 1, 2, 2],
    "features": 128,
    "outputs": TEXT["projection_dim"],
}
PROJECTION = (TEXT["hidden_size"], TEXT["projection_dim"])  # text features to the common space
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 32,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 16,
    "norm_eps": 1e-5,
    "cross_attention_dim": TEXT["hidden_size"],
    "attention_head_dim": 4,  # diffusers' misnomer: the number of heads
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
_CONV = {
    "architecture": "conv",
    "widths": [32, 48, 64, 80],
    "strides": [2, 1, 2, 2],
    "features": 64,
}
_RESIDUAL = {
    "architecture": "residual",
    "widths": [24, 48, 96],
    "blocks": [1, 2, 1],
    "features": 16 * 96,
}
JUDGES = {
    name: config | {"outputs": sum(judge.classes(ATTRIBUTES)), "members": 4}
    for name, config in zip(judge.NAMES, (_CONV, _RESIDUAL), strict=True)
}


def text_config() -> dict:
    """The text encoder's config.json; vocabulary and special ids follow the tokenizer."""
    vocab, _ = tokenizer.build(captions.words())
    return with_vocabulary(TEXT, vocab)


def with_vocabulary(config: dict, vocab: dict[str, int]) -> dict:
    """A text encoder's config with the size and the special ids of a vocabulary."""
    end = vocab[tokenizer.EOS]
    return config | {
        "vocab_size": len(vocab),
        "bos_token_id": vocab[tokenizer.BOS],
        "eos_token_id": end,
        "pad_token_id": end,
    }
