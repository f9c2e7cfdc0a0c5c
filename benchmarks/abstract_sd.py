"""The state and the frozen side of an erasure of a Stable Diffusion that is only shapes."""

import jax
import numpy as np

from aegis_jax.erasure.config import EraseConfig
from aegis_jax.erasure.setup import setup
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.models import clip, model, unet

_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_CROSS = "CrossAttn{}Block2D"


def _unet(widths, size, text_width, heads):
    """SD 1.x: attention at every resolution but the lowest."""
    down = [_CROSS.format("Down")] * (len(widths) - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + [_CROSS.format("Up")] * (len(widths) - 1)
    return {
        "sample_size": size,
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": text_width,
        "attention_head_dim": heads,
    }


def _text(width, layers, heads, vocabulary):
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
    }


WIDTHS = {
    "sd14": (_unet([320, 640, 1280, 1280], 64, 768, 8), _text(768, 12, 12, 49408)),
    "tiny": (_unet([32, 32], 8, 32, 2), _text(32, 1, 2, 512)),
    # Enough tokens in the first attention layers for the kernels that long sequences get.
    "small": (_unet([32, 64], 32, 32, 2), _text(32, 1, 2, 512)),
}


class _Tokenizer:
    """Ids of the right number; their values do not matter to shapes."""

    model_max_length, bos_token_id, eos_token_id, pad_token_id = 77, 1, 2, 2
    word_ids = np.arange(10, 20)

    def tokens(self, text):
        return [10]

    def ids(self, prompts):
        return np.full((len(prompts), self.model_max_length), 2)


def abstract_run(width: str, config: EraseConfig):
    """(state, frozen) of an erasure of one concept, every leaf a `jax.ShapeDtypeStruct`; allocates nothing large."""
    unet_config, text_config = WIDTHS[width]
    models = {
        "unet": model.abstract(unet.UNet2DConditionModel, unet_config),
        "text_encoder": model.abstract(clip.CLIPTextModel, text_config),
    }

    def run(params):
        built = {name: model.Model(m.config, m.graph, params[name]) for name, m in models.items()}
        return setup(Pipeline(**built, vae=None, tokenizer=_Tokenizer(), scheduler=_SCHEDULER), "concept", config)

    return jax.eval_shape(run, {name: m.params for name, m in models.items()})
