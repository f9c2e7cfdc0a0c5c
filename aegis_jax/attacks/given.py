"""What an attacker has beside the model under attack, and how he looks at what it generates."""

import dataclasses
import hashlib
import numbers
import operator
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.attacks.images import checked
from aegis_jax.diffusion.conditioning import Conditioning, encode, per_latent
from aegis_jax.diffusion.sample import generate, latent_shape, noise_of
from aegis_jax.diffusion.schedule import ddim_timesteps
from aegis_jax.errors import AegisError


@dataclasses.dataclass(frozen=True)
class Pictures:
    """uint8 images (m, H, W, 3) and m prompts, what each was made from ("" where that is not known)."""

    images: np.ndarray
    prompts: list[str]


@dataclasses.dataclass(frozen=True)
class Given:
    """Pictures of the concept, and what goes with them.

    Attributes:
      images: uint8 (n, H, W, 3), from the model before erasure, or real ones.
      prompts: n texts to attack.
      seeds: n seeds of the start noise that each prompt is tried with, as `aegis sample` takes them.
      original: the pipeline before erasure, where the attacker has it.
      judge: uint8 images (m, H, W, 3) -> (m,) bool, whether each shows the concept; None: nobody says.
      probability: images -> (m,), how likely each shows the concept, by a classifier of the attacker's.
      similarity: (images, other images) -> (m,), by which P4D keeps the best of its prompts; None: by its loss.
      steps, guidance: of what is generated for the judge, by DDIM.
      made_from: n texts, what each picture was made from and what an attack aims at; by default `prompts`. A control's
        `prompts` do not name the concept: then the aim is still the concept, or it could bring nothing back.
      beside: for each prompt a picture of the concept that another prompt has made, uint8 (n, H, W, 3), for an attack
        that takes what else a picture shows for no success; by default the next prompt's.
      ladder: {rung: wordings} of the concept, for the attack of that name.
      without: pictures that do not show the concept, for attacks that train on them or take them as a control.
    """

    images: np.ndarray
    prompts: list[str]
    seeds: list[int]
    original: object = None
    judge: Callable | None = None
    similarity: Callable | None = None
    probability: Callable | None = None
    steps: int = 50
    guidance: float = 7.5
    made_from: list[str] | None = None
    beside: np.ndarray | None = None
    ladder: dict[str, list[str]] | None = None
    without: Pictures | None = None

    def __post_init__(self):
        # Looked at here, since JAX takes the last row for one beyond it: a picture too few would go unnoticed.
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("images", checked(self.images, "images"))
        put("seeds", _whole_numbers(self.seeds))
        if self.made_from is None:
            put("made_from", self.prompts)
        if not len(self.images) == len(self.prompts) == len(self.seeds) == len(self.made_from):
            counts = f"{len(self.images)} images, {len(self.prompts)} prompts, {len(self.seeds)} seeds"
            raise AegisError(f"attack: {counts}: wanted one prompt and one seed for each image")
        if self.beside is not None:
            put("beside", checked(self.beside, "beside"))
            if len(self.beside) != len(self.prompts):
                raise AegisError(
                    f"beside has {len(self.beside)} images for {len(self.prompts)} prompts, wanted as many"
                )
        if self.without is not None:
            images, prompts = checked(self.without.images, "without"), self.without.prompts
            if len(images) != len(prompts):
                raise AegisError(f"without has {len(images)} images and {len(prompts)} prompts, wanted as many")
            put("without", Pictures(images, list(prompts)))


def is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _whole_numbers(seeds) -> list[int]:
    try:
        found = list(seeds)
        if not any(isinstance(seed, bool) for seed in found):
            return list(map(operator.index, found))  # of whole numbers of any library
    except TypeError:
        pass
    raise AegisError(f"seeds = {seeds!r:.80}, wanted a whole number for each image")


def key_of(seed: int, kind: int) -> jax.Array:
    """Of an attack's draws, by its seed and by a number of its own, which no other part of the program has."""
    # The generator is named: others (JAX_DEFAULT_PRNG_IMPL) may draw by the place in a batch.
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), kind)


def case_numbers(given: Given) -> np.ndarray:
    """What each case draws by, uint32 (n,): of its seed and of what it was made from, so not of what stands beside it.

    Cases that are equal in both are told apart by their order.
    """
    seen, found = Counter(), []
    for case in zip((int(seed) % 2**32 for seed in given.seeds), given.made_from):
        text = f"{case[0]} {seen[case]} {case[1]}"
        found.append(int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big"))
        seen[case] += 1
    return np.array(found, np.uint32)


def needed(given: Given, method: str) -> None:
    """Refuses an attack that compares with the model before erasure where that is not known."""
    if given.original is None:
        raise AegisError(f"attack {method} needs the model before erasure; pass it as original (--original)")


def check(method: str, config, steps: int) -> None:
    """Raises `AegisError` for settings of an attack that cannot be, whatever it is given. steps: DDIM's, of its images.

    What a config says of itself: `choices` {setting: its values}, `positive` (those that are to be above 0), and
    `check(method, steps)` for all else.
    """
    for name, values in getattr(config, "choices", {}).items():
        if getattr(config, name) not in values:
            raise AegisError(f"attack {method}: {name}={getattr(config, name)!r}, wanted one of: {', '.join(values)}")
    for name, kind in ((field.name, field.type) for field in dataclasses.fields(config) if field.name != "seed"):
        value = getattr(config, name)
        if kind is int and not (is_whole(value) and value < 2**31):  # the programs count in int32
            raise AegisError(f"attack {method}: {name}={value!r:.80}, wanted a whole number below 2**31")
        if kind is float and not (isinstance(value, numbers.Real) and abs(value) <= float(np.finfo(np.float32).max)):
            raise AegisError(f"attack {method}: {name}={value!r:.80}, wanted a finite float32 number")
    for name in getattr(config, "positive", ()):
        if not getattr(config, name) > 0:
            raise AegisError(f"attack {method}: {name}={getattr(config, name)!r}, wanted more than 0")
    if not getattr(config, "weight_decay", 0) >= 0:
        raise AegisError(f"attack {method}: weight_decay={config.weight_decay!r}, wanted 0 or more")
    seed = getattr(config, "seed", 0)
    if not (is_whole(seed) and 0 <= seed < 2**32):
        raise AegisError(f"attack {method}: seed={seed!r:.80}, wanted a whole number from 0 to 2**32 - 1")
    if hasattr(config, "check"):
        config.check(method, steps)


def per_picture(steps: int, guidance: float) -> int:
    """UNet evaluations of a picture; at a guidance of 1 or less there is none, as in `sample`."""
    return steps * (1 + (guidance > 1))


@dataclasses.dataclass
class Viewer:
    """Generates what prompts show, in batches of one size, and counts what that costs."""

    pipeline: object
    given: Given
    batch: int  # images per call: one shape, one compilation
    unet_evaluations: float = 0.0

    def noise(self, seeds: list[int]) -> np.ndarray:
        """Start noise (n, h, w, C)."""
        return np.asarray(noise_of(seeds, latent_shape(self.pipeline)))

    def __call__(self, prompts: list[str] | Conditioning, start) -> np.ndarray:
        """uint8 images (n, H, W, 3) of n prompts, or of encoded ones, from start noise (n, h, w, C)."""
        n, guidance = len(start), self.given.guidance
        filled = np.minimum(np.arange(-(-n // self.batch) * self.batch), n - 1)
        if isinstance(prompts, Conditioning):
            cond = take(prompts, filled)
        else:
            cond = encode(self.pipeline, [prompts[i] for i in filled])
        uncond = per_latent(encode(self.pipeline, ""), len(filled)) if guidance > 1 else None
        timesteps = ddim_timesteps(self.pipeline.scheduler, self.given.steps)
        noise = jnp.asarray(np.asarray(start)[filled])
        images = generate(self.pipeline, cond, uncond, noise, timesteps, guidance, batch=self.batch)
        self.unet_evaluations += n * per_picture(self.given.steps, guidance)
        return images[:n]

    def shown(self, prompts: list[str] | Conditioning, start) -> np.ndarray:
        """Whether the judge sees the concept, (n,) bool."""
        return np.asarray(self.given.judge(self(prompts, start)), bool)


def take(rows, numbers):
    """These rows of a pytree."""
    return jax.tree.map(lambda x: x[numbers], rows)


def groups(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    """`numbers` in groups of one size: the last is filled up with repeats of its last, for one shape compiles once."""
    return [numbers[np.minimum(np.arange(i, i + size), len(numbers) - 1)] for i in range(0, len(numbers), size)]
