"""STEREO (Srivatsan et al., CVPR 2025, arXiv 2408.16807): search for prompts that bring the concept back, then erase it
once against all of them. Read step.py first."""

from aegis_jax.erasure.method import Method
from aegis_jax.erasure.of_unet import drift, tensors
from aegis_jax.erasure.stereo.config import StereoConfig, check
from aegis_jax.erasure.stereo.setup import check_fit, setup
from aegis_jax.erasure.stereo.step import erase_step


def described(config: StereoConfig, concepts: int) -> str:
    """Scale of a run, what it searched and what it changes."""
    anchors = ", ".join(map(repr, config.once.anchors)) or "a few simple ones"
    return (
        f"{config.steps} steps of {config.batch} latent(s), Adam at {config.learning_rate:g} times "
        f"{config.search.rate:g} and {config.once.rate:g}, trainable tensors: {config.trainable}. In "
        f"{config.search.rounds} rounds the concept was erased and found again, from {config.inversion.pictures} "
        f"pictures that the original drew; then erased once, with all that was found, beside anchors ({anchors}). Only "
        "the UNet differs from the original: text encoder, VAE, tokenizer and scheduler are its own, byte for byte."
    )


remedy = "lower learning_rate, once.negative or inversion.learning_rate"
smaller = "lower --config.batch, set --config.low_memory=true or take --config.trainable=xattn"
method = Method(
    StereoConfig(), check, setup, erase_step, drift, described, tensors, remedy, smaller, check_concepts=check_fit
)
