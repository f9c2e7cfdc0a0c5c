"""The AEGIS training step by aegis_jax's own compiled programs, with every random draw given.

`step` is `erasure.step.erase_step` with its draw of z_T, s and t replaced by given ones. `parts` runs the same programs
one after the other with the values in between in the open: for the agreement gate and for times per phase.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.erasure import config as config_lib
from aegis_jax.erasure import groups, latents, target, trainable
from aegis_jax.erasure import step as step_lib
from aegis_jax.erasure.programs import compile_ahead
from aegis_jax.erasure.setup import setup
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.models import model as model_lib
from aegis_jax.models import unet as unet_lib
from aegis_jax.models.clip import CLIPTextModel
from aegis_jax.models.layout import from_torch, to_torch
from aegis_jax.models.unet import UNet2DConditionModel
from benchmarks import cases
from benchmarks.networks import build, key_of


def _by_key(stacked: dict, like: dict) -> dict[str, np.ndarray]:
    return {key_of(path): np.asarray(to_torch(path, x)) for path, x in groups.unstack(stacked, like).items()}


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
            aet=config_lib.AETConfig(beta=cases.BETA),
            prompt=config_lib.PromptConfig(gamma=cases.GAMMA),
            grp=config_lib.GRPConfig(omega=0.5, mu=cases.MU),
            latents=config_lib.LatentsConfig(steps=cases.STEPS, guidance=cases.GUIDANCE),
        )
        text = build(case, "text", CLIPTextModel, case.text)
        unet = build(case, "unet", UNet2DConditionModel, case.unet)
        pipeline = Pipeline(unet, None, text, case.words, case.scheduler)
        self.state, self.frozen = setup(pipeline, case.concept, self.config)
        v, p = cases.soft_tokens(np.asarray(text.params["text_model"]["embeddings"]["token_embedding"]["embedding"]))
        self.state = dataclasses.replace(self.state, v=jnp.asarray(v)[None], p=jnp.asarray(p)[None])
        # The start, of which only the small arrays are kept: a full-size state takes 14 GB.
        self.start = dataclasses.replace(
            self.state, **{name: _shapes(getattr(self.state, name)) for name in ("drift", "opt_state", "previous")}
        )

    def reset(self, drift: dict | None = None) -> None:
        """The state at step 0, or with a drift {key: array in PyTorch's layout}."""
        self.state = None  # freed before its successor is made
        zeros = {name: _zeros(getattr(self.start, name)) for name in ("drift", "opt_state", "previous")}
        if drift is not None:
            paths = model_lib.flatten(self.frozen.unet)
            zeros["drift"] = groups.stack({path: jnp.asarray(from_torch(path, drift[key_of(path)])) for path in paths})
        # A step donates what it is given, but neither omega nor the soft tokens.
        self.state = dataclasses.replace(self.start, **zeros)

    def _sample(self, state, draw):
        theta = trainable.add_drift(self.frozen.unet, state.drift, self.config.trainable)
        z_t = latents.partial_trajectory(
            self.frozen,
            theta,
            self.frozen.concept_emb[0],
            jnp.asarray(draw.z_T),
            jnp.int32(draw.s),
            config=self.config.latents,
        )
        return theta, z_t

    def _step(self, state, draw):
        theta, z_t = self._sample(state, draw)
        first, t = jnp.array([0]), jnp.asarray(draw.t)
        return step_lib.step_at(state, self.frozen, theta, first, z_t, t, self.config)

    def compile(self, draw) -> None:
        """Every program of the step at once, as `aegis_jax.erase` does before its first step."""
        compile_ahead(lambda state: self._step(state, draw), self.state)

    def step(self, draw):
        """One training step; returns L_e on the device."""
        self.state, metrics = self._step(self.state, draw)
        return metrics["L_e"]

    def _sign_step(self, unet, template, soft, z_t, t, goals, weights, size):
        frozen = self.frozen
        return target.sign_step(
            frozen.unet_graph,
            unet,
            frozen.text_graph,
            frozen.text,
            frozen.schedule,
            template,
            soft,
            z_t,
            t,
            jnp.stack(goals),
            jnp.array(weights, jnp.float32),
            jnp.float32(size),
        )

    def parts(self, draw, mark=lambda phase, *results: None) -> dict:
        """The step in the open; mark(phase, results) as each phase ends. Returns the values in between."""
        frozen, t = self.frozen, jnp.asarray(draw.t)
        noise = partial(step_lib._predict, frozen.unet_graph)
        encode = partial(step_lib._encode_soft, frozen.text_graph, frozen.text)
        theta, z_t = self._sample(self.state, draw)
        mark("sampling", z_t)
        c_e, twice = frozen.concept_emb[0], jnp.concatenate([t, t])
        pair = jnp.repeat(jnp.concatenate([c_e, frozen.empty_emb]), self.batch, axis=0)
        both = noise(frozen.unet, frozen.schedule, jnp.concatenate([z_t, z_t]), twice, pair)
        eps_concept, eps_empty = jnp.split(both, 2)
        eps_current = noise(theta, frozen.schedule, z_t, t, c_e)
        goals = [eps_current, eps_concept]
        v, _, grad_v = self._sign_step(
            frozen.unet, frozen.target_template, self.state.v, z_t, t, goals, (1, 1), cases.BETA
        )
        eps_target = noise(frozen.unet, frozen.schedule, z_t, t, encode(frozen.target_template, v))
        goal = eps_empty - self.config.eta * (eps_target - eps_empty)
        mark("AET", goal)
        template = frozen.prompt_template[0]
        goals = [eps_concept, eps_concept]
        p, _, grad_p = self._sign_step(theta, template, self.state.p, z_t, t, goals, (1, 0), cases.GAMMA)
        c_star = encode(template, p)
        mark("prompt", c_star)
        L_e = self._update(theta, z_t, t, c_star, goal)
        mark("erasure with GRP+Adam", self.state.drift, L_e)
        soft = {"v": v, "grad_v": grad_v, "p": p, "grad_p": grad_p}
        return {"z_t": z_t, "L_e": L_e} | {name: x[0] for name, x in soft.items()}

    def _update(self, theta, z_t, t, c_star, goal):
        state = self.state
        drift, opt_state, omega, previous, _, metrics = step_lib._erase_update(
            self.frozen,
            theta,
            state.drift,
            state.opt_state,
            state.omega,
            state.previous,
            z_t,
            t,
            c_star,
            goal,
            None,
            jnp.float32(self.config.learning_rate),
            trainable_set=self.config.trainable,
            grp=self.config.grp,
            remat=self.config.remat,
        )
        self.state = dataclasses.replace(state, drift=drift, opt_state=opt_state, omega=omega, previous=previous)
        return metrics["L_e"]

    def gate(self, draw, drift: dict | None) -> dict[str, np.ndarray]:
        """What the agreement gate compares, from the timed programs' own outputs.

        With omega 0 the projection does nothing, so that Adam's first moment after the first step is (1 - b1) g_e; the
        strengths that omega multiplies are kept for the hypergradient rule.
        """
        self.reset(drift)
        self.state = dataclasses.replace(self.state, omega=jnp.float32(0))
        found = {name: np.asarray(x, np.float32) for name, x in self.parts(draw).items()}
        like = model_lib.flatten(self.frozen.unet)
        moment = jax.tree.map(lambda m: m / 0.1, self.state.opt_state.mu)
        found |= {f"g_e:{key}": x for key, x in _by_key(moment, like).items()}
        found |= {f"strength:{key}": x for key, x in _by_scalar(self.state.previous["strength"], like).items()}
        # step() must be what parts() took apart.
        self.reset(drift)
        found["L_e of step()"] = np.asarray(self.step(draw), np.float32)
        return found

    def weights(self) -> dict[str, np.ndarray]:
        """theta0 by diffusers key, float32 in PyTorch's layout."""
        flat = model_lib.flatten(self.frozen.unet)
        return {key_of(path): np.asarray(to_torch(path, x), np.float32) for path, x in flat.items()}

    def evaluations(self, draw) -> int:
        """UNet evaluations (latents) of one step, counted where aegis_jax calls the network while it is traced."""
        seen, original = [], unet_lib.apply

        def counting(graph, params, sample, *args, **options):
            seen.append(sample.shape[0])
            return original(graph, params, sample, *args, **options)

        z_t, t = jnp.zeros(draw.z_T.shape), jnp.asarray(draw.t)

        def one_step(state, theta):
            return step_lib.step_at(state, self.frozen, theta, jnp.array([0]), z_t, t, self.config)[1]["L_e"]

        def sampling(theta, z_T, s):
            c_e = self.frozen.concept_emb[0]
            return latents.partial_trajectory(self.frozen, theta, c_e, z_T, s, config=self.config.latents)

        unet_lib.apply = counting
        try:
            with jax.disable_jit():  # so that a program used twice is traced twice
                jax.eval_shape(one_step, _shapes(self.state), _shapes(self.frozen.unet))
                core = sum(seen)
                seen.clear()
                jax.eval_shape(sampling, _shapes(self.frozen.unet), z_t, jnp.int32(1))
        finally:
            unet_lib.apply = original
        return core + draw.s * max(seen)


def _by_scalar(stacked: dict, like: dict) -> dict:
    return {key_of(path): np.asarray(x) for path, x in groups.unstack(stacked, like).items()}
