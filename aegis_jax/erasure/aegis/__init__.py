"""AEGIS, and all that lies between it and ESD, as one method with settings (`method`). Read step.py first."""

from aegis_jax.erasure.aegis.config import EraseConfig, check, latents_of_concepts
from aegis_jax.erasure.aegis.cost import unet_evaluations
from aegis_jax.erasure.aegis.setup import check_fit, setup, setup_each
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.erasure.method import Lanes, Method
from aegis_jax.erasure.of_unet import drift, tensors


def described(config: EraseConfig, concepts: int) -> str:
    """Scale of a run, how many latents each concept has had in it, what it changes and what it used."""
    counts = latents_of_concepts(config, concepts)
    each = f"{min(counts)}" + (f" or {max(counts)}" if max(counts) > min(counts) else "")
    started = f" They start from the solution of {config.start}, a closed form, at its defaults." * bool(config.start)
    return (
        f"{config.steps} steps of {config.batch} latent(s), Adam at {config.learning_rate:g}, trainable tensors: "
        f"{config.trainable}.{started} Latents of each concept: {each}. Only the UNet differs from the original: text "
        "encoder, VAE, tokenizer and scheduler are its own, byte for byte. The concept was given by name alone; no "
        "other data was used."
    )


def without_lanes(config: EraseConfig) -> str | None:
    """Why runs of these settings cannot share their convolutions, or None."""
    if config.trainable in ("xattn", "kv"):
        return None
    return f"trainable={config.trainable}: each run has convolutions of its own, only xattn and kv share theirs"


lanes = Lanes(setup_each, without_lanes)
remedy = "lower learning_rate, grp.omega, words.preserve or eta"
smaller = "lower --config.batch, set --config.low_memory=true or take --config.trainable=xattn"
method = Method(
    EraseConfig(), check, setup, erase_step, drift, described, tensors, remedy, smaller, lanes, check_fit,
    unet_evaluations,
)  # fmt: skip
