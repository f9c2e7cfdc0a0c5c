"""What a run carries (State), what it never changes (Frozen), and what a step asks of theta (Goal).

All are pytrees. Shapes: B latents, h w latent size, L tokens, d token-embedding width, K concepts, P prefixes of each.
"""

import dataclasses
from typing import Any

import jax

from aegis_jax.diffusion.conditioning import Conditioning
from aegis_jax.diffusion.schedule import Schedule
from aegis_jax.erasure.aegis.words import Vocabulary
from aegis_jax.erasure.programs import pytree
from aegis_jax.models.model import Graph


@pytree(data="cond eps")
@dataclasses.dataclass(frozen=True)
class Goal:
    """What theta shall predict: under `cond` (G rows, latent i has row i mod G) the noise eps (B, h, w, C)."""

    cond: Conditioning
    eps: jax.Array


@pytree(data="step drift opt_state v p omega conflict kappa latents")
@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from step to step, and all that a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done.
      drift: theta - theta0 of the trainable tensors, float32, stacked {group: (n, *shape)} (groups.py); 0 at step 0.
      opt_state: Adam's moments, like `drift`; bfloat16 with `low_memory`.
      v, p: soft tokens of the targets and of the adversarial prompts, (P K, k, d); row i belongs to concept i mod K.
      omega: projection strength of each tensor, {group: (n,)} float32.
      conflict: sign of <g_e, g_r> of each tensor in the step before, {group: (n,)} float32; 0 at step 0.
      kappa: how hard each concept is pushed away in context (context.py), (K,) float32; None unless words.context is
        push.
      latents: pools of trajectories by what they serve (latents.Pool); empty when z_t is drawn afresh each step.
    """

    step: jax.Array
    drift: dict
    opt_state: Any
    v: jax.Array
    p: jax.Array
    omega: dict
    conflict: dict
    kappa: jax.Array | None
    latents: dict


@pytree(
    data="unet low_bits text schedule concept_emb empty_emb target_template prompt_template word_ids vocabulary",
    meta="unet_graph text_graph latent_shape placement",
)
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What an erasure reads and never changes.

    Attributes:
      unet: theta0, nested parameters in the compute dtype.
      low_bits: what rounding theta0 to the compute dtype has taken from the trainable tensors (trainable.low_bits):
        the drift is added before the rounding, so that no step is lost in it.
      text: the text encoder's parameters, float32.
      concept_emb: c_e, K rows. empty_emb: c_0, one row.
      target_template, prompt_template: token embeddings of [BOS, slots, concept, EOS, PAD...], (K, L, d), with slots
        for v and for p.
      word_ids: token ids that soft tokens start from, (W,) int32.
      vocabulary: what random prompts are made of (words.py), or None if there are none.
      latent_shape: (h, w, C) of z.
      placement: None on one device, else says where a batch and a tensor lie (parallel.mesh.Placement).
    """

    unet: dict
    low_bits: dict
    text: dict
    schedule: Schedule
    concept_emb: Conditioning
    empty_emb: Conditioning
    target_template: jax.Array
    prompt_template: jax.Array
    word_ids: jax.Array
    vocabulary: Vocabulary | None
    unet_graph: Graph
    text_graph: Graph
    latent_shape: tuple[int, int, int]
    placement: Any = None
