"""The cases of the step's parity tests: pipelines, concepts, latents, soft tokens, omega and P_before."""

import dataclasses
import functools
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import aegis_jax
from tests.parity import torch_aegis
from tests.tiny import tiny_pipeline

SPREAD = {  # omegas dealt out to the tensors in turn: with mu = 0.1 some reach the floor, some the cap
    "spread": (0.0, 0.05, 0.5, 0.97, 1.0),
    "spread far": (0.0, 0.05, 1.0, 3.4, 5000.0),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Cases that share model, batch, m' and k share the compiled networks, mu and cap the compiled rule."""

    name: str
    model: str
    concept: str
    batch: int
    aet_tokens: int
    prefix_tokens: int
    omega: object  # a number, or a key of SPREAD
    before: str = "none"  # see `before_of`
    current: str = "moved"  # every tensor | "partly": cross-attention's only | "original": none
    eta: float = 1.0
    beta: float = 3e-3
    gamma: float = 7e-3
    mu: float = 0.1
    cap: float = 1.0


# The fewest layers that still have cross-attention, to compile in little time; the models have their own parity tests.
SMALL = {"block_out_channels": (16,), "norm_num_groups": 8, "attention_head_dim": 2}
MODELS = {
    "epsilon": {
        "unet": {**SMALL, "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)},
        "text": {"num_hidden_layers": 1},
    },
    "v": {
        "v_prediction": True,
        "unet": {**SMALL, "down_block_types": ("DownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)},
    },
    "two levels": {},
}
FAST = [
    Case("one of each", "epsilon", "star", 1, 1, 1, omega=0.5),
    Case("first step", "epsilon", "church", 1, 1, 1, omega=0.0, current="original"),
    Case("original, P before", "epsilon", "dog", 1, 1, 1, omega=0.5, before="mixed", current="original"),
    Case("conflict persists", "epsilon", "zebra", 1, 1, 1, omega=0.5, before="same", eta=2.5),
    Case("conflict flips", "epsilon", "red star", 1, 1, 1, omega=0.25, before="opposite"),
    Case("floor", "epsilon", "star", 1, 1, 1, omega=0.03, before="same"),
    Case("cap", "epsilon", "star", 1, 1, 1, omega=0.97, before="opposite"),
    Case("omega per tensor", "epsilon", "zebra, red!", 1, 1, 1, omega="spread", before="mixed"),
    Case("released", "epsilon", "cat", 1, 1, 1, omega="spread far", before="mixed", mu=0.2, cap=1e6),
    Case("no sign step of v", "epsilon", "star", 1, 1, 1, omega=1.0, beta=0.0),
    Case("no sign step of p", "epsilon", "star", 1, 1, 1, omega=1.0, gamma=0.0),
    Case("some tensors moved", "epsilon", "square", 1, 1, 1, omega="spread", before="mixed", current="partly"),
    Case("more of v than of p", "epsilon", "blue heart", 3, 3, 1, omega=0.5, before="mixed"),
    Case("v-prediction", "v", "a red heart", 3, 2, 3, omega="spread", before="mixed", eta=3.0),
    Case("v, conflict flips", "v", "zebra", 3, 2, 3, omega=0.5, before="opposite"),
    Case("v, first step", "v", "square", 3, 2, 3, omega=0.5, current="original"),
]
SLOW = Case("two levels", "two levels", "blue square", 3, 1, 2, omega="spread", before="mixed", eta=2.0)


def case_of(name):
    return next(case for case in FAST if case.name == name)


# --- what is given to both ------------------------------------------------------------------------


def perturb(folder, destination, only="", seed=1, size=0.05):
    """Copies a pipeline and adds noise to every tensor of its UNet whose key contains `only`."""
    shutil.copytree(folder, destination)
    path = destination / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    moved = {
        key: weight
        + size * (only in key) * (weight.std(correction=0) + 0.1) * torch.randn(weight.shape, generator=generator)
        for key, weight in load_file(path).items()
    }
    save_file(moved, path, {"format": "pt"})
    return destination


def loader(root):
    """load(model, current="original") -> (in PyTorch, in JAX), written below the folder `root` once."""

    @functools.cache
    def load(model, current="original"):
        folder = root / model / current
        if current == "original":
            tiny_pipeline(folder, seed=3, **MODELS[model])
        else:
            load(model)
            perturb(root / model / "original", folder, only="attn2" if current == "partly" else "")
        return torch_aegis.load(folder), aegis_jax.load_pipeline(folder)

    return load


def soft_and_latents(case):
    rng = np.random.default_rng(len(case.name))

    def latent(*levels):
        return rng.normal(size=(case.batch, 8, 6, 4)).astype(np.float32), np.array(levels, np.int32)[: case.batch]

    return {
        "attack": latent(617, 0, 999),
        "loss": latent(41, 980, 500),
        "v": (0.05 * rng.normal(size=(case.aet_tokens, 32))).astype(np.float32),
        "p": (0.05 * rng.normal(size=(case.prefix_tokens, 32))).astype(np.float32),
    }


def omega_of(case, keys):
    if case.omega not in SPREAD:
        return case.omega
    choices = SPREAD[case.omega]
    return {key: choices[index % len(choices)] for index, key in enumerate(keys)}


def before_of(kind, projection, seed):
    """P_before from about this step's P: the conflict was as it is ("same"), or was not ("opposite").

    "mixed" deals out both, zeros and noise, which is also what stands for a P that is 0.
    """
    rng = np.random.default_rng(seed)
    choices = {"same": [2.0], "opposite": [-0.5], "mixed": [2.0, -0.5, 0.0, None]}[kind]
    before = {}
    for index, (key, p) in enumerate(projection.items()):
        factor = choices[index % len(choices)]
        use_noise = factor is None or (factor != 0 and not p.any())
        before[key] = (rng.normal(size=p.shape) if use_noise else factor * p.numpy()).astype(np.float32)
    return before
