"""The AEGIS training step by aegis_jax's own compiled programs, with every random draw given.

`JaxStep._step` is `erasure.aegis.step.erase_step` with its draws of the two latents and of v and p replaced by given
ones, its parts called by name: for the agreement gate and for times per phase.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.erasure import groups, latents, trainable
from aegis_jax.erasure.aegis import config as config_lib
from aegis_jax.erasure.aegis import rectify
from aegis_jax.erasure.aegis import step as step_lib
from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.programs import compile_ahead, given
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.models import model as model_lib
from aegis_jax.models import unet as unet_lib
from aegis_jax.models.clip import CLIPTextModel
from aegis_jax.models.layout import from_torch, to_torch
from aegis_jax.models.unet import UNet2DConditionModel
from benchmarks import cases
from benchmarks.networks import build, key_of


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


class JaxStep:
    def __init__(self, case, batch: int, dtype: str):
        self.case, self.batch = case, batch
        self.config = config_lib.EraseConfig(
            batch=batch,
            learning_rate=cases.LEARNING_RATE,
            eta=cases.ETA,
            compute_dtype=dtype,
            soft=config_lib.SoftConfig(beta=cases.BETA, gamma=cases.GAMMA, life="run"),
            grp=config_lib.GRPConfig(omega=cases.OMEGA, mu=cases.MU),
            latents=config_lib.LatentsConfig(steps=cases.STEPS),
        )
        assert latents.GUIDANCE == cases.GUIDANCE and self.config.grp.cap == cases.CAP
        text = build(case, "text", CLIPTextModel, case.text)
        unet = build(case, "unet", UNet2DConditionModel, case.unet)
        pipeline = Pipeline(unet, None, text, case.words, case.scheduler)
        self.state, self.frozen = setup(pipeline, case.concept, self.config)
        v, p = cases.soft_tokens(np.asarray(text.params["text_model"]["embeddings"]["token_embedding"]["embedding"]))
        # The start, of which only the small arrays are kept, on the host, since a step donates what it is given.
        self.start = dataclasses.replace(
            jax.device_get(dataclasses.replace(self.state, drift={}, opt_state=())),
            v=v[None], p=p[None], drift=_shapes(self.state.drift), opt_state=_shapes(self.state.opt_state),
        )  # fmt: skip
        self.reset()

    def reset(self, drift: dict | None = None) -> None:
        """The state at step 0, or with a drift {key: array in PyTorch's layout}."""
        self.state = None  # freed before its successor is made
        zeros = {name: _zeros(getattr(self.start, name)) for name in ("drift", "opt_state")}
        if drift is not None:
            paths = model_lib.flatten(self.frozen.unet)
            zeros["drift"] = groups.stack({path: jnp.asarray(from_torch(path, drift[key_of(path)])) for path in paths})
        small = jax.tree.map(jnp.array, dataclasses.replace(self.start, drift={}, opt_state=()))
        self.state = dataclasses.replace(small, **zeros)

    def _sampled(self, theta, cond, draw, which: int) -> latents.Noised:
        z_T, s = jnp.asarray(draw.z_T[which]), jnp.int32(draw.s)
        z = latents.partial_trajectory(self.frozen, theta, cond, z_T, s, steps=cases.STEPS, offset=False)
        return latents.Noised(z, jnp.asarray(draw.t[which]))

    def _step(self, state, draw, mark=lambda phase, *results: None):
        """(state, metrics, values in between); mark(phase, results) as each phase ends."""
        frozen, config, concepts = self.frozen, self.config, jnp.zeros(1, jnp.int32)
        theta = trainable.add_drift(frozen.unet, state.drift, config.trainable, frozen.low_bits)
        attack = self._sampled(theta, frozen.concept_emb, draw, 0)
        mark("sampling, attack", attack.z)
        v, p, metrics = step_lib._adversaries(frozen, theta, concepts, attack, state.v, state.p, config)
        c_prime, c_star = step_lib.prompts_of(frozen, concepts, v, p, config)
        mark("sign steps", c_prime, c_star)
        loss = self._sampled(theta, c_prime, draw, 1)
        mark("sampling, loss", loss.z)
        goal, push = step_lib.goal_of(frozen, loss, c_prime, c_star, given(config.eta))
        mark("target", push)
        between = {"z_a": attack.z, "z_b": loss.z, "v": v[0], "p": p[0]}  # copies: the update donates the state
        turn = step_lib._turn(state.step, 1, 1, self.batch)
        state = dataclasses.replace(state, v=v, p=p)
        args = theta, turn, loss, goal, push, jax.random.key(0), config
        state, more = step_lib._descend(state, frozen, *args)
        mark("erasure with GRP+Adam", state.drift, more["L_e"])
        return state, metrics | more, between

    def compile(self, draw) -> None:
        """Every program of the step at once, as `aegis_jax.erase` does before its first step."""
        compile_ahead(lambda state: self._step(state, draw)[:2], self.state)

    def step(self, draw, mark=lambda phase, *results: None):
        """One training step; returns L_e on the device."""
        self.state, metrics, _ = self._step(self.state, draw, mark)
        return metrics["L_e"]

    def gate(self, draw, drift: dict | None) -> dict[str, np.ndarray]:
        """What the agreement gate compares, from the timed programs' own outputs.

        With omega 0 the projection does nothing, so that Adam's first moment after the first step is (1 - b1) g_e.
        """
        self.reset(drift)
        self.state = dataclasses.replace(self.state, omega=rectify.per_tensor(self.state.drift, 0.0))
        self.state, metrics, between = self._step(self.state, draw)
        found = {name: np.asarray(x, np.float32) for name, x in between.items()}
        found["L_e"] = np.asarray(metrics["L_e"], np.float32)
        like = model_lib.flatten(self.frozen.unet)
        moment = jax.tree.map(lambda m: m / 0.1, self.state.opt_state.mu)
        gradients = groups.unstack(moment, like)
        found |= {f"g_e:{key_of(path)}": np.asarray(to_torch(path, x)) for path, x in gradients.items()}
        cosines = zip(groups.order(like), np.asarray(metrics["per_tensor"]["cosine"]), strict=True)
        return found | {f"cosine:{key_of(path)}": x for path, x in cosines}

    def weights(self) -> dict[str, np.ndarray]:
        """theta0 by diffusers key, float32 in PyTorch's layout."""
        flat = model_lib.flatten(self.frozen.unet)
        return {key_of(path): np.asarray(to_torch(path, x), np.float32) for path, x in flat.items()}

    def evaluations(self, draw) -> int:
        """UNet evaluations (latents) of one step, counted where aegis_jax calls the network while it is traced."""
        seen, original, trajectory = [], unet_lib.apply, latents.partial_trajectory

        def counting(graph, params, sample, *args, **options):
            seen.append(sample.shape[0])
            return original(graph, params, sample, *args, **options)

        unet_lib.apply = counting
        try:
            with jax.disable_jit():  # so that a program used twice is traced twice
                latents.partial_trajectory = lambda frozen, theta, cond, z_T, s, **options: z_T
                jax.eval_shape(lambda state: self._step(state, draw)[1]["L_e"], _shapes(self.state))
                core = sum(seen)
                seen.clear()
                latents.partial_trajectory = trajectory
                sampling = partial(trajectory, self.frozen, steps=cases.STEPS, offset=False)
                args = _shapes(self.frozen.unet), self.frozen.concept_emb, jnp.asarray(draw.z_T[0]), jnp.int32(1)
                jax.eval_shape(sampling, *args)
        finally:
            unet_lib.apply, latents.partial_trajectory = original, trajectory
        return core + 2 * draw.s * max(seen)
