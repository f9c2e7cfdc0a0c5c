"""What both sides of a benchmark are given: the same weights, prompts and random draws, from numpy alone.

Imports neither jax nor torch, so that each side's process holds one framework only. Tensors are keyed by diffusers'
(transformers') names and have PyTorch's layout.
"""

import dataclasses
import json
import math
import pathlib
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from aegis_jax.plan import stable_diffusion as sd_configs

WORLD = pathlib.Path(__file__).resolve().parent.parent / "aegis_jax" / "world" / "weights"
MODELS = ("tiny", "world", "quarter", "sd14")
STEPS = 50  # DDIM steps of a whole trajectory
ETA, BETA, GAMMA, GUIDANCE, LEARNING_RATE = 1.0, 1e-3, 1e-3, 3.0, 1e-5
OMEGA, MU, CAP = 0.5, 0.1, 1.0  # omega starts above 0, so that there is something to project
GIVEN = ("z_a", "z_b", "v", "p")  # what the gate hands from one side to the other, stage by stage

# 80 channels are no multiple of SD 1.4's 32 groups; 16 groups divide every width.
_RANDOM = {
    "tiny": lambda: (
        sd_configs.unet((16, 32), 32, size=8, groups=8, heads=2, layers=1),
        sd_configs.text_encoder(32, 2, 1, vocabulary=64, length=12),
    ),
    "quarter": lambda: (
        sd_configs.unet((80, 160, 320, 320), 192, size=32, groups=16),
        sd_configs.text_encoder(192, 3, 12, vocabulary=1000),
    ),
    "sd14": lambda: (sd_configs.unet(), sd_configs.text_encoder()),
}


class Words:
    """As much of a tokenizer as the step needs: whole words with known ids. Spares both sides the real tokenizer."""

    def __init__(self, ids: dict[str, int], *, bos: int, eos: int, pad: int, length: int):
        self._ids = ids
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.model_max_length = bos, eos, pad, length

    @property
    def word_ids(self) -> np.ndarray:
        return np.array(list(self._ids.values()), np.int32)

    def tokens(self, text: str) -> list[int]:
        return [self._ids[word] for word in text.split()]

    def row(self, *middle: int) -> list[int]:
        """[BOS, middle, EOS, PAD...]"""
        used = [self.bos_token_id, *middle, self.eos_token_id]
        return used + [self.pad_token_id] * (self.model_max_length - len(used))

    def ids(self, prompts) -> np.ndarray:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return np.array([self.row(*self.tokens(prompt)) for prompt in prompts], np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the concept that is erased from it."""

    name: str
    unet: dict
    text: dict
    scheduler: dict
    words: Words
    concept: str

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """float32 (T,), of the scaled-linear schedule that every model here has."""
        c = self.scheduler
        assert c["beta_schedule"] == "scaled_linear" and c["prediction_type"] == "epsilon" and not c["clip_sample"]
        ends = np.sqrt([c["beta_start"], c["beta_end"]])
        return np.cumprod(1 - np.linspace(*ends, c["num_train_timesteps"]) ** 2).astype(np.float32)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C)"""
        return self.unet["sample_size"], self.unet["sample_size"], self.unet["in_channels"]

    def tensors(self, component: str, shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
        """float32 weights of "unet" or "text" for {key: shape}; every key must exist with that shape."""
        if self.name == "world":
            return _stored(component, shapes)
        with ThreadPoolExecutor() as pool:  # numpy draws outside Python's lock; SD 1.4 takes 10 s of a core
            drawn = pool.map(lambda item: _drawn(f"{component}.{item[0]}", item[1]), shapes.items())
            return dict(zip(shapes, drawn))


def load(name: str, size: int | None = None) -> Case:
    """One of MODELS; `size` overrides the side of the latents (not the world's)."""
    if name == "world":
        config = {part: json.loads((WORLD / part / "config.json").read_text()) for part in ("unet", "text_encoder")}
        scheduler = json.loads((WORLD / "scheduler" / "scheduler_config.json").read_text())
        vocabulary = json.loads((WORLD / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        text = config["text_encoder"]
        bos, eos, pad = (text[f"{key}_token_id"] for key in ("bos", "eos", "pad"))
        words = Words(
            {"star": vocabulary["star</w>"]}, bos=bos, eos=eos, pad=pad, length=text["max_position_embeddings"]
        )
        return Case(name, config["unet"], text, scheduler, words, "star")
    unet, text = _RANDOM[name]()
    unet["sample_size"] = size or unet["sample_size"]
    last = text["vocab_size"] - 1
    words = Words({"concept": 5}, bos=last - 1, eos=last, pad=last, length=text["max_position_embeddings"])
    return Case(name, unet, text, sd_configs.SCHEDULER, words, "concept")


def _drawn(key: str, shape: tuple) -> np.ndarray:
    """A random tensor of the scale that PyTorch initialises with; nothing is 0, since zeros run faster than weights."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    noise = rng.standard_normal(shape, np.float32)
    if key.endswith(".bias"):
        noise *= np.float32(0.02)
    elif len(shape) == 1:  # a norm's scale
        noise = 1 + np.float32(0.1) * noise
    elif "_embedding.weight" in key and "embeddings." in key:  # CLIP's tables
        noise *= np.float32(0.02)
    else:
        noise *= np.float32(1 / math.sqrt(3 * math.prod(shape[1:])))
    return noise


def _stored(component: str, shapes: dict) -> dict:
    from safetensors.numpy import load_file

    folder, file = {
        "unet": ("unet", "diffusion_pytorch_model.safetensors"),
        "text": ("text_encoder", "model.safetensors"),
    }[component]
    found = {key.removeprefix("text_model."): x for key, x in load_file(WORLD / folder / file).items()}
    wrong = [key for key, shape in shapes.items() if key not in found or found[key].shape != tuple(shape)]
    assert not wrong and len(found) >= len(shapes), f"weights that do not fit: {wrong[:5]}"
    return {key: found[key].astype(np.float32) for key in shapes}


# --- random draws ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Draw:
    """One step's random draws, for its two latents (of the sign steps, of the loss): z_T (2, B, h, w, C) float32, s
    denoising steps done for either, t (2, B) int32."""

    z_T: np.ndarray
    s: int
    t: np.ndarray


def stops(count: int) -> list[int]:
    """`count` stop indices, evenly spaced over 0..STEPS-1, ends included; all of them once for STEPS."""
    return [round(i * (STEPS - 1) / max(count - 1, 1)) for i in range(count)]


def draw(case: Case, s: int, batch: int, seed: int) -> Draw:
    """The draws of a step whose latents stop after s denoising steps."""
    rng = np.random.default_rng([seed, s])
    stride = case.scheduler["num_train_timesteps"] // STEPS
    t = stride * (STEPS - 1 - s) + rng.integers(0, stride, (2, batch))
    return Draw(rng.standard_normal((2, batch, *case.latent_shape), np.float32), s, t.astype(np.int32))


def soft_tokens(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v and p (1, d) at the start: two fixed rows of the token table, off the grid by a little noise."""
    rng = np.random.default_rng(11)
    scale = 0.05 * table.std()
    rows = table[[7, 9]] + scale * rng.standard_normal((2, table.shape[1]), np.float32)
    return rows[:1].astype(np.float32), rows[1:].astype(np.float32)


# --- the state at which both sides are compared ---------------------------------------------------


def conflicting_drift(weights: dict, gradients: dict) -> dict:
    """{key: (int8 signs, size)}: a drift half of whose tensors oppose the gradient, so that GRP has work.

    A random drift would be orthogonal to the gradient up to 1/sqrt(n), and its cosines rounding noise. Of 2 % of the
    weights: with much less, what the losses are differences of lies within bfloat16's rounding.
    """
    result = {}
    for i, key in enumerate(sorted(weights)):
        signs = np.sign(gradients[key]).astype(np.int8) * (1 if i % 2 else -1)
        result[key] = signs, np.float32(2e-2 * np.sqrt(np.mean(np.square(weights[key]))) + 1e-7)
    return result


def save_drift(path, drift: dict) -> None:
    arrays = {f"signs:{key}": signs for key, (signs, _) in drift.items()}
    np.savez(path, **arrays, **{f"size:{key}": size for key, (_, size) in drift.items()})


def load_drift(path) -> dict:
    """{key: float32 drift in PyTorch's layout}"""
    with np.load(path) as file:
        keys = [key.removeprefix("signs:") for key in file if key.startswith("signs:")]
        return {key: file[f"signs:{key}"].astype(np.float32) * file[f"size:{key}"] for key in keys}
