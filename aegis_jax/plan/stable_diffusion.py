"""Config files of Stable Diffusion 1.4, at its own widths or others, and of 2.1. Imports neither jax nor torch."""

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def unet(widths=(320, 640, 1280, 1280), context=768, *, size=64, groups=32, heads=8, layers=2, attended=3):
    """Attention at the first `attended` resolutions, of which SD 1.4 has four."""
    attention = [i < attended for i in range(len(widths))]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(widths),
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        "cross_attention_dim": context,
        "attention_head_dim": heads,  # diffusers' misnomer: the number of heads
        "norm_num_groups": groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
    }


def text_encoder(width=768, heads=12, layers=12, *, vocabulary=49408, length=77):
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": length,
        "vocab_size": vocabulary,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


# By the names of our config files: what `shapes.of_configs` takes. SD 2.1 is that of 768 pixels.
MODELS = {
    "sd14": {"unet": unet(), "vae": VAE, "text_encoder": text_encoder(), "scheduler": SCHEDULER},
    "sd21": {
        "unet": unet(context=1024, size=96, heads=[5, 10, 20, 20]) | {"use_linear_projection": True},
        "vae": VAE | {"sample_size": 768},
        "text_encoder": text_encoder(1024, 16, 23) | {"hidden_act": "gelu"},
        "scheduler": SCHEDULER | {"prediction_type": "v_prediction"},
    },
}
