"""AdvUnlearn (Zhang et al., NeurIPS 2024, arXiv 2405.15234): ESD against prompts that bring the concept back, with
prompts to retain. Read step.py first."""

from aegis_jax.erasure import groups, trainable
from aegis_jax.erasure.advunlearn.config import AdvUnlearnConfig, check
from aegis_jax.erasure.advunlearn.cost import unet_evaluations
from aegis_jax.erasure.advunlearn.setup import check_fit, setup
from aegis_jax.erasure.advunlearn.step import erase_step
from aegis_jax.erasure.method import Method
from aegis_jax.models.layout import torch_key


def _component(config: AdvUnlearnConfig) -> str:
    return "text_encoder" if config.trainable == trainable.TEXT_ENCODER else "unet"


def drift(pipeline, state, config: AdvUnlearnConfig) -> dict:
    """{"text_encoder" or "unet": {path: theta - theta0}} of the trained tensors."""
    params = getattr(pipeline, _component(config)).params
    return {_component(config): trainable.drift_by_path(params, state.drift, config.trainable)}


def described(config: AdvUnlearnConfig, concepts: int) -> str:
    """Scale of a run, what it was held against, what it changes and what it retained."""
    retained = ", ".join(map(repr, config.retain.prompts)) or "a small neutral set"
    parts = {"text_encoder": "text encoder", "unet": "UNet"}
    part, others = parts.pop(_component(config)), ", ".join(parts.values())
    attack = "without an attack"
    if config.warm_up < config.steps:
        attack = (
            f"from step {config.warm_up + 1} on against a prompt that {config.attack.steps} steps of attack have found"
        )
    return (
        f"{config.steps} steps of {config.batch} latent(s), Adam at {config.learning_rate:g}, trainable tensors: "
        f"{config.trainable}; {attack}. Retained with weight {config.retain.weight:g}: {retained}. "
        f"Only the {part} differs from the original: {others}, VAE, tokenizer and scheduler are its own, byte for "
        "byte. No images were used."
    )


def tensors(pipeline, config: AdvUnlearnConfig) -> list[str]:
    """PyTorch keys of the trained tensors."""
    params = getattr(pipeline, _component(config)).params
    return [torch_key(path) for path in groups.order(trainable.select(params, config.trainable))]


remedy = "lower learning_rate or eta"
smaller = "lower --config.batch and --config.retain.batch, or set --config.low_memory=true"
method = Method(
    AdvUnlearnConfig(), check, setup, erase_step, drift, described, tensors, remedy, smaller,
    check_concepts=check_fit, cost=unet_evaluations,
)  # fmt: skip
