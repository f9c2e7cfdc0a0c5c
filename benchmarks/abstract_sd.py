"""The state and the frozen side of an erasure of a Stable Diffusion that is only shapes."""

import jax
import numpy as np

from aegis_jax.erasure.aegis.config import EraseConfig
from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.models import clip, model, unet
from benchmarks import sd_configs

WIDTHS = {
    "sd14": (sd_configs.unet(), sd_configs.text_encoder()),
    "tiny": (
        sd_configs.unet((32, 32), 32, size=8, heads=2, attended=1),
        sd_configs.text_encoder(32, 2, 1, vocabulary=512),
    ),
    # Enough tokens in the first attention layers for the kernels that long sequences get.
    "small": (
        sd_configs.unet((32, 64), 32, size=32, heads=2, attended=1),
        sd_configs.text_encoder(32, 2, 1, vocabulary=512),
    ),
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
        pipeline = Pipeline(**built, vae=None, tokenizer=_Tokenizer(), scheduler=sd_configs.SCHEDULER)
        return setup(pipeline, "concept", config)

    return jax.eval_shape(run, {name: m.params for name, m in models.items()})
