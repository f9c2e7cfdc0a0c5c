"""Drawing from a picture instead of from noise alone: from a step of DDIM on, or with a part of the picture known.

Shapes: n pictures, h w C latents.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from aegis_jax.attacks.given import Given, groups, per_picture, take
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.result import FAILED, NOT_NEEDED, SUCCEEDED
from aegis_jax.attacks.rows import per_call
from aegis_jax.diffusion.conditioning import Conditioning, encode, per_latent
from aegis_jax.diffusion.sample import decode, latent_shape, noise_of, pixels_per_latent, sample_latents, to_uint8
from aegis_jax.diffusion.schedule import ddim_timesteps, make_schedule, noised
from aegis_jax.errors import AegisError

# Groups of `AttackResult.levels` beside the attack itself.
OTHER_PICTURE = "picture without the concept"
NO_TEXT = "empty prompt"
NO_MODEL = "picture alone"


@dataclasses.dataclass(frozen=True)
class Known:
    """A part of pictures that stays as it is: mask (n, h, w, 1), 1 where it does; z_0 and noise (n, h, w, C)."""

    mask: np.ndarray
    z_0: np.ndarray
    noise: np.ndarray


class Drawer:
    """Draws with the settings of `given`, as many pictures to a call as fit; counts what that costs."""

    def __init__(self, pipeline, given: Given, count: int):
        self.pipeline, self.given = pipeline, given
        self.schedule = make_schedule(pipeline.scheduler)
        self.timesteps = ddim_timesteps(pipeline.scheduler, given.steps)
        self.stride = len(self.schedule.alphas_cumprod) // given.steps
        self.size = per_call(count, math.prod(latent_shape(pipeline)[:2]))[0]
        self.empty = encode(pipeline, "")
        self.unet_evaluations = 0.0

    def encoded(self, images) -> np.ndarray:
        """Latents (n, h, w, C) of uint8 images, refused if they are not of the size that the model draws."""
        z_0, wanted = np.asarray(encode_images(self.pipeline, images)), latent_shape(self.pipeline)
        if z_0.shape[1:] != wanted:
            h, w = (count * pixels_per_latent(self.pipeline) for count in wanted[:2])
            raise AegisError(f"pictures are {np.shape(images)[2]}x{np.shape(images)[1]}, but the model draws {w}x{h}")
        return z_0

    def noise(self, seeds) -> np.ndarray:
        """As `aegis sample` draws it, (n, h, w, C)."""
        return np.asarray(noise_of(list(seeds), latent_shape(self.pipeline)))

    def noised(self, z_0, noise, step: int) -> np.ndarray:
        """Latents at the noise level that DDIM's step number `step` begins from; z_0 itself after the last."""
        if step >= len(self.timesteps):
            return np.asarray(z_0)
        t = jnp.full(len(z_0), int(self.timesteps[step]), jnp.int32)
        return np.asarray(noised(self.schedule, jnp.asarray(z_0), t, jnp.asarray(noise)))

    def latents(self, cond: Conditioning, z, first: int = 0, last: int | None = None, known: Known | None = None):
        """From latents z (n, h, w, C) as step `first` begins to those as step `last` does (None: to the end).

        cond: n rows. known: put back after every step, at that step's noise level.
        """
        last, done = self.given.steps if last is None else last, np.array(z)
        spans = [(first, last)] if known is None else [(k, k + 1) for k in range(first, last)]
        for numbers in groups(np.arange(len(done)), self.size):
            part, rows = jnp.asarray(done[numbers]), take(cond, numbers)
            for begin, end in spans:
                part = self._denoised(rows, part, begin, end)
                if known is not None:
                    mask, z_0, noise = (x[numbers] for x in (known.mask, known.z_0, known.noise))
                    part = mask * self.noised(z_0, noise, end) + (1 - mask) * part
            done[numbers] = np.asarray(part)
        self.unet_evaluations += len(done) * per_picture(last - first, self.given.guidance)
        return done

    def _denoised(self, cond, z, first: int, last: int):
        unet, guidance = self.pipeline.unet, self.given.guidance
        uncond = per_latent(self.empty, len(z)) if guidance > 1 else None
        how = {"first": jnp.int32(first), "last": jnp.int32(last)}
        return sample_latents(unet.graph, unet.params, self.schedule, cond, uncond, z, self.timesteps, guidance, **how)

    def images(self, latents) -> np.ndarray:
        """uint8 (n, H, W, 3)."""
        parts = [to_uint8(decode(self.pipeline, latents[i])) for i in groups(np.arange(len(latents)), self.size)]
        return np.concatenate(parts)[: len(latents)]

    def shown(self, images) -> np.ndarray:
        """Whether the judge sees the concept, (n,) bool."""
        return np.asarray(self.given.judge(images), bool)

    def plain(self, prompts: Conditioning, noise) -> tuple[np.ndarray, np.ndarray]:
        """(whether the prompts alone show it (n,); their images)."""
        images = self.images(self.latents(prompts, noise))
        return self.shown(images), images


def outcomes(plain, hits) -> list[str]:
    """Of each prompt, by whether it shows the concept alone, and under the attack."""
    return [NOT_NEEDED if before else SUCCEEDED if hit else FAILED for before, hit in zip(plain, hits, strict=True)]


def others(given: Given) -> tuple[np.ndarray, list[str]]:
    """(images, prompts) without the concept, one for each prompt of `given`; repeated where there are fewer."""
    rows = np.arange(len(given.prompts)) % len(given.without.images)
    return given.without.images[rows], [given.without.prompts[row] for row in rows]
