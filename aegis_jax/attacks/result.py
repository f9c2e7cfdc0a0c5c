"""What every attack gives back, whatever it moves: what to feed a pipeline, what that cost, and whether it worked."""

import dataclasses

import numpy as np

from aegis_jax.diffusion.conditioning import Conditioning
from aegis_jax.diffusion.template import Template

PLACEHOLDER = "<aegis>"  # stands in `prompts` for the soft tokens, as a textual inversion's name does
# Of a restart, where there is a judge. What needed no attack is counted apart from what the attack brought back.
NOT_NEEDED, SUCCEEDED, FAILED = "no attack needed", "attack succeeded", "attack failed"
BACKWARD = 1.08  # of a forward pass, to text or latents: by operator counts on the UNet of SD 1.4
TO_WEIGHTS = 2  # the same to all weights
ATTACK = "attack"  # the first group of `AttackResult.levels`; others are its controls


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What an attack found, in R rows: its restarts or, with several prompts or pictures, those of each in turn.

    Attributes:
      prompts: R texts to give a pipeline; PLACEHOLDER stands for all of a row's soft tokens.
      conditioning: the encoded prompts, R rows; feed them to the UNet in place of a prompt's.
      losses: (steps, R), what was minimised, along the way; NaN after a row's end.
      unet_evaluations: cost of all rows in forward passes at batch 1, generating for the judge included; a backward
        pass counts BACKWARD.
      seconds: of all rows.
      generated: pictures drawn on the way, of attacks without the weights, which pay in these.
      soft_tokens: learnt token embeddings (R, k, d), of attacks by embedding.
      template: where they stand.
      ids: token ids (R, L) that a search for words ended with, whose text `prompts` is.
      same_tokens: whether that text gives these ids again, (R,); where not, what was judged is the text.
      seeds: of attacks by prompt, (R,): of the start noise with which a row's prompt is shown, the first with which it
        showed the concept; None: the prompts' own.
      latents: start noise (R, h, w, C) found, of attacks by latent; or where drawing goes on, of those by picture.
      first: (R,), the number of DDIM's step that goes on from `latents`; None: the first of all.
      known: what stays of each picture while it is drawn, of inpainting (guided.Known).
      images: uint8 (R, H, W, 3), what the judge saw of each row, of attacks that draw pictures in their own way.
      pipeline: that which draws them, of attacks by weights.
      levels: {group: {level: (n,) bool}}, whether the judge saw the concept in each prompt at each level of an attack
        that has these (steps of fine-tuning, wordings, noise). The group ATTACK is the attack itself.
      shifted: whether `conditioning` is not what `prompts` encode to, so that it itself is what to feed.
      held_out: {goal: (R,)}, losses on what the attacker held out; the draws are the same for all restarts and, with
        the same seed, for all members of a family.
      pick: the restart that the attacker takes by his own loss.
      outcomes: NOT_NEEDED, SUCCEEDED or FAILED for each row; None where no judge was asked.
    """

    prompts: list[str]
    conditioning: Conditioning
    losses: np.ndarray
    unet_evaluations: float
    seconds: float
    generated: int = 0
    soft_tokens: np.ndarray | None = None
    template: Template | None = None
    ids: np.ndarray | None = None
    same_tokens: np.ndarray | None = None
    seeds: list[int] | None = None
    latents: np.ndarray | None = None
    first: np.ndarray | None = None
    known: object = None
    images: np.ndarray | None = None
    pipeline: object = None
    levels: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    shifted: bool = False
    held_out: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    pick: int | None = None
    outcomes: list[str] | None = None
