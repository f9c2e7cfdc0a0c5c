"""What a run carries (State) and what it never changes (Frozen). Both are pytrees.

Shapes: h w latent size, L tokens, d token-embedding width, D text width, K concepts, P prefixes of each.
"""

import dataclasses
from functools import partial
from typing import Any

import jax

from aegis_jax.diffusion.schedule import Schedule
from aegis_jax.erasure.words import Vocabulary
from aegis_jax.models.model import Graph


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "drift", "opt_state", "v", "p", "omega", "previous", "kappa", "latents"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from step to step, and all that a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done.
      drift: theta - theta0 of the trainable tensors, float32, stacked {group: (n, *shape)} (groups.py); 0 at step 0.
      opt_state: Adam's moments, like `drift`, in the config's `moments_dtype`.
      v: soft tokens of the AET, (P K, m', d); row i belongs to concept i mod K, as in `p`.
      p: soft tokens of the adversarial prompts, (P K, k, d).
      omega: projection strength in [0, 1], float32: a scalar, or {group: (n,)} with `grp.omega_per_tensor`.
      previous: last step's projection (rectify.projection), kept for the hypergradient rule only, else None; zeros at
        step 0.
      kappa: how hard each concept is pushed away in context (context.py), (K,) float32, 0 at step 0; None without
        `prompt.context_rate`.
      latents: buffer of trajectories (K, steps, M, h, w, C), or None when z_t is drawn afresh each step.
    """

    step: jax.Array
    drift: dict
    opt_state: Any
    v: jax.Array
    p: jax.Array
    omega: jax.Array | dict
    previous: dict | None
    kappa: jax.Array | None
    latents: jax.Array | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "unet",
        "text",
        "schedule",
        "concept_emb",
        "empty_emb",
        "target_template",
        "prompt_template",
        "vocabulary",
    ],
    meta_fields=["unet_graph", "text_graph", "latent_shape", "placement"],
)
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What an erasure reads and never changes.

    Attributes:
      unet: theta0, nested parameters in the compute dtype.
      text: the text encoder's parameters, float32.
      concept_emb: c_e of each concept, (K, 1, L, D).
      empty_emb: c_0, (1, L, D).
      target_template: token embeddings of [BOS, slot x m', EOS, PAD...], (1, L, d).
      prompt_template: token embeddings of [BOS, slot x k, concept, EOS, PAD...] per concept, (K, 1, L, d).
      vocabulary: what random prompts are made of (words.py), or None if there are none.
      latent_shape: (h, w, C) of z.
      placement: None on one device, else says where a batch and a tensor lie (parallel.mesh.Placement).
    """

    unet: dict
    text: dict
    schedule: Schedule
    concept_emb: jax.Array
    empty_emb: jax.Array
    target_template: jax.Array
    prompt_template: jax.Array
    vocabulary: Vocabulary | None
    unet_graph: Graph
    text_graph: Graph
    latent_shape: tuple[int, int, int]
    placement: Any = None
