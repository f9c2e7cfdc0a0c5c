"""A small untrained pipeline made without torch, and a cheap stand-in for the training step.

The step has the signature and the state of the real one, so that the tests of the run need not
compile five networks; `test_real_step.py` and the tests of the step itself cover the real one.
"""

import dataclasses
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.erasure import aegis, groups, trainable
from aegis_jax.erasure.aegis.state import State
from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import MODELS, Pipeline
from aegis_jax.io.tokenizer import Tokenizer
from aegis_jax.models import model
from tests.tiny import tiny_tokenizer, vocabulary

CONFIGS = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": [16],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "sample_size": 16,
        "block_out_channels": [16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "vocab_size": len(vocabulary()[0]),
        "hidden_act": "quick_gelu",
    },
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "num_train_timesteps": 1000,
}


def write(folder, seed=0, **unet):
    """Writes the pipeline as a diffusers folder and returns its path; unet: entries of its config that differ."""
    rng, configs = np.random.default_rng(seed), CONFIGS | {"unet": CONFIGS["unet"] | unet}
    models = {}
    for name, module_class in MODELS.items():
        abstract = model.abstract(module_class, configs[name])
        params = jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), abstract.params)
        models[name] = model.Model(abstract.config, abstract.graph, params)
    tokenizer = tiny_tokenizer(folder.parent / f"{folder.name}-tokenizer", max_length=16)
    pipeline = Pipeline(**models, tokenizer=Tokenizer(tokenizer), scheduler=SCHEDULER)
    save_pipeline(pipeline, folder)
    return folder


def setup(pipeline, concepts, config, placement):
    """Like `erasure.aegis.setup.setup`, without the networks; frozen is None."""
    drift = trainable.zero_drift(pipeline.unet.params, config.trainable)
    state = State(
        step=jnp.int32(0),
        drift=drift,
        opt_state=optax.scale_by_adam().init(drift),
        v=jnp.ones((len(concepts), 1, 16)),
        p=jnp.ones((len(concepts), 1, 16)),
        omega={name: jnp.zeros(len(d)) for name, d in drift.items()},
        conflict={name: jnp.zeros(len(d)) for name, d in drift.items()},
        kappa=None,
        latents={},
    )
    return state, None


@jax.jit
def _step(state, seed, learning_rate, poison):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradients = {k: jax.random.normal(key, x.shape) + x for k, x in state.drift.items()}
    update, opt_state = optax.scale_by_adam().update(gradients, state.opt_state)
    drift = jax.tree.map(lambda d, u: d - learning_rate * u, state.drift, update)
    loss = sum(jnp.sum(g**2) for g in gradients.values()) + poison["loss"]
    first = min(drift)
    drift[first] += poison["state"]
    new = State(
        step=state.step + 1,
        drift=drift,
        opt_state=opt_state,
        v=state.v + jnp.sign(gradients[first].ravel()[0]),
        p=state.p,
        omega={name: x + 0.01 for name, x in state.omega.items()},
        conflict={name: jnp.sign(g.reshape(len(g), -1)[:, 0]) for name, g in gradients.items()},
        kappa=None,
        latents={},
    )
    cosine = groups.gather({name: jnp.tanh(g.reshape(len(g), -1).mean(1)) for name, g in gradients.items()})
    per_tensor = {"cosine": cosine, "kept": groups.gather(new.conflict), "omega": groups.gather(new.omega)}
    return new, {"L_e": loss, "drift_norm": optax.tree.norm(drift), "per_tensor": per_tensor}


def erase_step(state, frozen, config):
    """Adam on noise. $FAKE_STEP (JSON) can set seconds per step, and a step whose loss or state is
    not a number.
    """
    wish = json.loads(os.environ.get("FAKE_STEP", "{}"))
    time.sleep(wish.get("seconds", 0))
    poison = {k: jnp.where(state.step + 1 == wish.get(k, 0), jnp.nan, jnp.float32(0)) for k in ("loss", "state")}
    return _step(state, config.seed, config.learning_rate, poison)


METHOD = dataclasses.replace(aegis.method, start=setup, step=erase_step)


def main(argv):
    """The `aegis` command with this step instead of the real one, for tests in a process apart."""
    from aegis_jax import cli
    from aegis_jax.run.config import RunConfig

    RunConfig.method = METHOD
    return cli.main(argv)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
