"""d0, d1, d2 of the AEGIS paper: how far noise predictions lie apart, with what the paper leaves open said here.

  d0   the model before erasure: a related word against the concept
  d1   before against after erasure, the same word
  d2   the erased model: a word against its adversarial version

A good erasure raises d1 and d2 over the concept's words and leaves d1 near 0 for unrelated ones. A distance is the root
mean square over a latent's elements, and its mean over n latents. Latents are the word's own: the model before erasure
makes them of it, from the same n starts for all words, up to the timestep that is looked at.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from aegis_jax.diffusion.conditioning import Conditioning, encode, per_latent
from aegis_jax.diffusion.sample import latent_shape, noise_of, plan, predict_noise, sample_latents
from aegis_jax.diffusion.schedule import make_schedule
from aegis_jax.errors import AegisError


def distances(
    original,
    erased,
    concept: str,
    words: str | Sequence[str],
    *,
    adversarial: Mapping[str, str | Conditioning] | None = None,
    n: int = 8,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 7.5,
    at: int = -1,
) -> dict:
    """{"t": timestep, "n": latents, "words": {word: {"d0": ..., "d1": ..., "d2": ...}}}.

    words: words or whole prompts, or one. adversarial: for some of them what an attack found, a text or one row of
    conditioning; d2 is None for the others. at: which of the `steps` timesteps of DDIM, counted as Python counts: the
    paper speaks of the last, taken here for that where the picture is all but done; at 0, the first, it is noise.

    Raises `AegisError` for words of `adversarial` that are not among `words`, and models of other latents.
    """
    words, adversarial = [words] if isinstance(words, str) else words, dict(adversarial or {})
    unknown = sorted(set(adversarial) - set(words))
    if unknown or not words or n < 1:
        raise AegisError(f"diagnostics of {len(words)} words and {n} latents; adversarial has {unknown} besides")
    if latent_shape(original) != latent_shape(erased):
        raise AegisError(f"latents of {latent_shape(original)} before erasure and {latent_shape(erased)} after")
    timesteps, guidance = plan(original, steps, guidance)
    if not -steps <= at < steps:
        raise AegisError(f"at={at} is none of {steps} timesteps")
    start, number = noise_of([seed] * n, latent_shape(original), np.arange(n, dtype=np.int32)), at % steps
    t, of_concept = int(timesteps[number]), encode(original, concept)
    found = {}
    for word in words:
        latents = _latents(original, encode(original, word), start, timesteps, guidance, number)
        before, after = (_prediction(model, latents, t, word) for model in (original, erased))
        other = adversarial.get(word)
        found[word] = {
            "d0": _apart(before, _prediction(original, latents, t, of_concept)),
            "d1": _apart(before, after),
            "d2": None if other is None else _apart(after, _prediction(erased, latents, t, other)),
        }
    return {"t": t, "n": n, "words": found}


def _latents(pipeline, cond: Conditioning, start, timesteps, guidance: float, number: int):
    """The latents at timesteps[number] of guided DDIM from `start`."""
    unet, cond = pipeline.unet, per_latent(cond, len(start))
    uncond = per_latent(encode(pipeline, ""), len(start)) if guidance > 1 else None  # as `sample` has it
    return sample_latents(
        unet.graph, unet.params, make_schedule(pipeline.scheduler), cond, uncond, start, timesteps, guidance,
        last=number,
    )  # fmt: skip


def _prediction(pipeline, latents, t: int, text: str | Conditioning):
    """By the model's own text encoder, which some methods change too."""
    cond = encode(pipeline, text) if isinstance(text, str) else text
    return predict_noise(pipeline, latents, t, per_latent(cond, len(latents)))


def _apart(predictions, others) -> float:
    difference = np.asarray(predictions, np.float64) - np.asarray(others, np.float64)
    return float(np.sqrt(np.square(difference).mean((1, 2, 3))).mean())
