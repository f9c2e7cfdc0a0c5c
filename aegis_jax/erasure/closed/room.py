"""The closed forms as methods: texts in, the change of the projections out.

All is known once pipeline and texts are, so `start` solves, tensor by tensor on the host, and the one step hands the
solution over. NumPy's float64 for the reason that uce.py gives: these are tens of systems of at most some thousand
unknowns, and an accelerator has either no float64 or a slow one.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.erasure.closed import oce, projections, rece, speed, uce
from aegis_jax.erasure.closed.config import OCEConfig, RECEConfig, SPEEDConfig, UCEConfig, check
from aegis_jax.erasure.closed.rows import check_texts, encoded, erased_and_goals, moment_of_words
from aegis_jax.erasure.method import Method
from aegis_jax.erasure.texts import check_text_width
from aegis_jax.errors import AegisError
from aegis_jax.models.layout import torch_key

_FORMS = {"kv": "keys and values", "k": "keys", "v": "values"}


@partial(jax.tree_util.register_dataclass, data_fields=["step", "drift"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
    """step: int32 scalar. drift: {path: change of the projection (d, out), float32}, 0 before the step."""

    step: jax.Array
    drift: dict


@dataclasses.dataclass(frozen=True)
class Solution:
    """What the step hands over: the drift, and the metrics (`projections.solved`)."""

    drift: dict
    metrics: dict


def _started(solve, pipeline, concepts, config, placement=None) -> tuple[State, Solution]:
    """Raises `AegisError` for texts that cannot be taken, a UNet without cross-attention, and for a mesh."""
    check(config)
    if placement is not None:
        raise AegisError(f"method={config.method} is solved on the host: leave mesh.data and mesh.fsdp at 1")
    concepts = [concepts] if isinstance(concepts, str) else list(concepts)
    check_fit(pipeline, concepts, config)
    texts = encoded(pipeline, [*concepts, *config.guide, *config.preserve, ""])
    drift, metrics = solve(pipeline, concepts, texts, config)
    drift = {path: jnp.asarray(x) for path, x in drift.items()}
    metrics = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)
    zeros = {path: jnp.zeros_like(x) for path, x in drift.items()}
    return State(jnp.int32(0), zeros), Solution(drift, metrics)


def check_fit(pipeline, concepts: list[str], config) -> None:
    """Raises `AegisError` for texts that `start` would refuse."""
    check_texts(pipeline.tokenizer, concepts, config.guide, config.preserve)
    check_text_width(pipeline.unet.config, pipeline.text_encoder.params)
    projections.paths(pipeline.unet.params, config.projections)


def _stacked(pairs) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.concatenate(rows) for rows in zip(*pairs))


def _preserved(texts, config) -> np.ndarray:
    none = np.zeros((0, texts[""].embedding.shape[1]))
    return np.concatenate([none, *(texts[text].rows(config.preserve_tokens) for text in config.preserve)])


def _weights(config) -> dict:
    return {key: getattr(config, key) for key in ("erase_scale", "preserve_scale", "lamb")}


def solve_uce(pipeline, concepts, texts, config: UCEConfig) -> tuple:
    """UCE (uce.py) for all concepts jointly: ({path: drift}, metrics)."""
    x, goals = _stacked(erased_and_goals(texts, concepts, config.guide, config.tokens))
    preserved = _preserved(texts, config)
    change = uce.edit(x, goals, preserved, **_weights(config))
    return projections.solved(pipeline.unet.params, config.projections, lambda _, w: change @ w, (x, goals), preserved)


def solve_rece(pipeline, concepts, texts, config: RECEConfig) -> tuple:
    """RECE (rece.py) likewise."""
    x, goals = _stacked(erased_and_goals(texts, concepts, config.guide, config.tokens))
    whole, whole_goals = _stacked(erased_and_goals(texts, concepts, config.guide, "all"))
    preserved, identity = _preserved(texts, config), np.eye(x.shape[1])
    gram = sum(w @ w.T for _, w in projections.matrices(pipeline.unet.params, config.projections))
    factor = identity + uce.edit(x, goals, preserved, **_weights(config))
    for _ in range(config.epochs):
        against = rece.adversary(whole, factor, gram, config.regular_scale)
        factor = (identity + uce.edit(against, whole_goals, preserved, **_weights(config))) @ factor
    change = factor - identity
    return projections.solved(pipeline.unet.params, config.projections, lambda _, w: change @ w, (x, goals), preserved)


def solve_speed(pipeline, concepts, texts, config: SPEEDConfig) -> tuple:
    """SPEED (speed.py) likewise."""
    first = 1 if config.tokens == "all" else 0
    pairs = [(c[first:], g[first:]) for c, g in erased_and_goals(texts, concepts, config.guide, config.tokens)]
    empty = texts[""].embedding
    rows = [texts[text].rows("last") if texts[text].last else empty[1:] for text in config.preserve]
    preserved = np.concatenate(rows or [np.zeros((0, empty.shape[1]))])
    problem = speed.Problem.of(pairs, preserved, speed.invariants(empty), config)
    drift, metrics = projections.solved(
        pipeline.unet.params, config.projections, problem.change, _stacked(pairs), preserved
    )
    if not any(x.any() for x in drift.values()) and metrics["L_e_before"] > 0:
        raise AegisError(
            f"preserve leaves no direction free at threshold={config.threshold:g}; raise it or preserve less"
        )
    return drift, metrics


def solve_oce(pipeline, concepts, texts, config: OCEConfig) -> tuple:
    """OCE (oce.py) likewise. It does not minimise L_e, which may grow."""
    x, goals = _stacked(erased_and_goals(texts, concepts, config.guide, config.tokens))
    preserved = _preserved(texts, config)
    moment = moment_of_words(pipeline, config.generic_words, config.seed)
    scales = _weights(config) | {"generic_scale": config.generic_scale}
    change = lambda _, w: oce.change(w, x, goals, preserved, moment, **scales)  # noqa: E731
    return projections.solved(pipeline.unet.params, config.projections, change, (x, goals), preserved)


def step(state: State, frozen: Solution, config) -> tuple[State, dict]:
    return State(state.step + 1, frozen.drift), dict(frozen.metrics)


def drift(pipeline, state: State, config) -> dict:
    return {"unet": state.drift}


def described(config, concepts: int) -> str:
    """What is changed, towards what, holding what."""
    goals = ", ".join(map(repr, config.guide))
    held = ", ".join(map(repr, config.preserve)) or "nothing"
    what = f"{concepts} concepts jointly" if concepts > 1 else "one concept"
    return (
        f"A closed form, solved in float64: {what} erased towards {goals}, holding {held}. Only the "
        f"{_FORMS[config.projections]} of the UNet's cross-attention differ from the original: the rest of it, text "
        "encoder, VAE, tokenizer and scheduler are its own, byte for byte. No images were used."
    )


def tensors(pipeline, config) -> list[str]:
    return [torch_key(path) for path in projections.paths(pipeline.unet.params, config.projections)]


def _method(settings, solve) -> Method:
    remedy = "check the model's weights, or raise lamb"
    smaller = "a closed form needs no accelerator: set JAX_PLATFORMS=cpu"
    start = partial(_started, solve)
    return Method(settings, check, start, step, drift, described, tensors, remedy, smaller, check_concepts=check_fit)


METHODS = {
    "uce": _method(UCEConfig(), solve_uce),
    "rece": _method(RECEConfig(), solve_rece),
    "speed": _method(SPEEDConfig(), solve_speed),
    "oce": _method(OCEConfig(), solve_oce),
}
