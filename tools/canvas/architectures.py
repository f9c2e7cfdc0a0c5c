"""The configs of the canvas's parts, as tools/world/architectures.py has those of the world."""

from aegis_jax.canvas import tokenizer
from tools.world import architectures as world

TEXT = world.TEXT | {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "projection_dim": 96,
}
VISION = {
    "architecture": "conv",
    "widths": [32, 64, 96, 128],
    "strides": [2, 1, 2, 2],
    "features": 192,
    "outputs": TEXT["projection_dim"],
}
PROJECTION = (TEXT["hidden_size"], TEXT["projection_dim"])
VAE = world.VAE | {"block_out_channels": [24, 48, 64]}
UNET = world.UNET | {"block_out_channels": [96, 192], "cross_attention_dim": TEXT["hidden_size"]}
SCHEDULER = world.SCHEDULER
MEMBERS = 2
_CONV = {
    "architecture": "conv",
    "widths": [32, 48, 64, 96],
    "strides": [2, 1, 2, 2],
    "features": 128,
}
_RESIDUAL = {
    "architecture": "residual",
    "widths": [32, 64, 96],
    "blocks": [1, 2, 1],
    "features": 16 * 96,
}
# {name: config}, less "outputs": these follow from what is drawn (subject.py).
JUDGES = {"judge": _CONV | {"members": MEMBERS}, "second_judge": _RESIDUAL | {"members": MEMBERS}}


def text_config() -> dict:
    """The text encoder's config.json; vocabulary and special ids follow the tokenizer."""
    return world.with_vocabulary(TEXT, tokenizer.vocabulary())
