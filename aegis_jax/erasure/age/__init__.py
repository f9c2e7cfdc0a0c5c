"""AGE (Bui et al., ICLR 2025, arXiv 2501.18950): the concept becomes a mixture of words that an adversary chooses. Read
step.py first."""

from aegis_jax.erasure.age.config import AgeConfig, check
from aegis_jax.erasure.age.cost import unet_evaluations
from aegis_jax.erasure.age.setup import check_fit, setup
from aegis_jax.erasure.age.step import erase_step
from aegis_jax.erasure.method import Method
from aegis_jax.erasure.of_unet import drift, tensors


def described(config: AgeConfig, concepts: int) -> str:
    """Scale of a run, what a concept was turned into, and what it changes."""
    chosen = ", ".join(map(repr, config.target.words)) or "the tokenizer's words, by their nearness"
    return (
        f"{config.steps} steps of {config.batch} latent(s), Adam at {config.learning_rate:g}, trainable tensors: "
        f"{config.trainable}; the concept becomes a mixture that an adversary chooses from {chosen}. Only the UNet "
        "differs from the original: text encoder, VAE, tokenizer and scheduler are its own, byte for byte. No images "
        "were used."
    )


remedy = "lower learning_rate, target.weight or eta"
smaller = "lower --config.batch, set --config.low_memory=true or take --config.trainable=xattn"
method = Method(
    AgeConfig(), check, setup, erase_step, drift, described, tensors, remedy, smaller,
    check_concepts=check_fit, cost=unet_evaluations,
)  # fmt: skip
