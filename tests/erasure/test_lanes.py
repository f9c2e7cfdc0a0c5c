"""Lanes: K runs through one batch are K runs on their own, in as many convolutions as one."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.erasure import lanes, programs
from aegis_jax.erasure.aegis.setup import setup, setup_each
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.erasure.batched import batched
from aegis_jax.erasure.presets import preset
from aegis_jax.errors import AegisError
from tests.tiny import responsive

NAMES = ("star", "red heart", "dog")  # of one token and of two
STEPS = 3


def settings(method: str, refresh_every: int = 1, **more):
    """A preset at a small scale; kappa moves in the last step."""
    chosen = preset(method).settings
    latents = dataclasses.replace(chosen.latents, steps=4, refresh_every=refresh_every)
    scale = {"steps": STEPS, "batch": 2, "trainable": "xattn", "learning_rate": 1e-3, "compute_dtype": "float32"}
    return dataclasses.replace(chosen, **scale | more, latents=latents)


# Those that are not slow have between them fresh latents and pooled ones, a sign step, random words and the push.
CASES = {
    "esd": settings("esd", trainable="kv"),
    "aegis+ without the target, pooled": settings("aegis+-no-aet", 2),
    "aegis+": settings("aegis+"),
    "aegis+, pooled": settings("aegis+", 2),
    "aegis+shown": settings("aegis+shown", 2),
    "paper": settings("paper"),
    "released, pooled": settings("released", 2),
    "low memory": settings("paper", low_memory=True, compute_dtype="bfloat16"),
}
SLOW = list(CASES)[2:]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Runs on their own and as lanes: states and metrics on the host, and what was made on the way."""

    config: object
    alone: list
    alone_metrics: list  # [run][step]
    start: tuple  # (state, frozen, own), the state's buffers gone
    step: object
    gone: dict  # name of an array of the first state: whether it was donated
    state: object
    metrics: list  # [step]


def run_alone(pipeline, concept, config):
    state, frozen = setup(pipeline, concept, config)
    metrics = []
    for _ in range(STEPS):
        state, measured = erase_step(state, frozen, config)
        metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics


def named(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@pytest.fixture(scope="module", params=[pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def outcome(request, pipeline):
    pipeline = responsive(pipeline)
    config = CASES[request.param]
    alone, alone_metrics = zip(*(run_alone(pipeline, name, config) for name in NAMES))
    start = lanes.stack(setup_each(pipeline, list(NAMES), config))
    step = lanes.compiled_step(functools.partial(erase_step, config=config), *start)
    state, metrics = start[0], []
    for _ in range(STEPS):
        with jax.transfer_guard_host_to_device("disallow"):
            state, measured = step(state, start[1])
        metrics.append(jax.device_get(measured))
    gone = {name: x.is_deleted() for name, x in named(start[0]).items()}
    return Outcome(config, alone, alone_metrics, start, step, gone, state, metrics)


def test_lanes_are_runs_on_their_own(outcome):
    for k, (wanted, told) in enumerate(zip(outcome.alone, outcome.alone_metrics)):
        for ours, theirs in zip(outcome.metrics, told):
            assert ours.keys() == theirs.keys() and ours["t"][k] == theirs["t"]
            for name in {"L_e", "L_p", "L_aet", "L_adv"} & theirs.keys():
                tolerance = 1e-5 if name == "L_e" else 3e-5  # the others are small differences of like predictions
                if outcome.config.compute_dtype != "float32":
                    tolerance = 0.1
                # The absolute part is for the first step's L_p, 0 but for rounding.
                np.testing.assert_allclose(ours[name][k], theirs[name], tolerance, 1e-12, f"{NAMES[k]}, {name}")
        if outcome.config.compute_dtype == "float32":
            compare(jax.device_get(lanes.lane(outcome.state, k)), wanted)
        if "left_in_context" in told[-1]:  # what moves kappa
            np.testing.assert_allclose(outcome.metrics[-1]["left_in_context"][k], told[-1]["left_in_context"], 1e-3)
    if "left_in_context" in outcome.metrics[-1]:
        assert (outcome.metrics[-1]["left_in_context"] != 0).any()
    # Concepts differ, so lanes do.
    assert len({float(loss) for loss in outcome.metrics[-1]["L_e"]}) == len(NAMES)


def compare(ours, wanted):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    assert ours.step == wanted.step == STEPS and ours.opt_state.count == wanted.opt_state.count
    for name, mean in wanted.opt_state.mu.items():  # the gradients, before Adam divides small numbers by small ones
        error = np.linalg.norm(ours.opt_state.mu[name] - mean)
        assert error <= 1e-3 * np.linalg.norm(mean) + 1e-9, name
    for name in ("v", "p"):  # a sign step may turn where the gradient is nearly 0
        assert np.isclose(getattr(ours, name), getattr(wanted, name), rtol=0, atol=1e-7).mean() > 0.9, name
    for pool, theirs in wanted.latents.items():
        np.testing.assert_allclose(ours.latents[pool].z, theirs.z, 1e-3, 1e-3)
        for said in {"drawn", "number", "shown"} & vars(theirs).keys():
            np.testing.assert_array_equal(getattr(ours.latents[pool], said), getattr(theirs, said))
    if wanted.kappa is not None:
        np.testing.assert_allclose(ours.kappa, wanted.kappa, 1e-3)


def test_only_the_concept_is_a_lane_s_own(outcome, pipeline):
    """Of the frozen side; the rest is one array for all, not a copy for each."""
    _, frozen, own = outcome.start
    mine = {name for name, flag in named(own).items() if flag}
    fields = {"concept_emb", "target_template", "prompt_template", *["vocabulary"] * outcome.config.draws_words}
    assert {name.partition("/")[0] for name in mine} == fields
    if outcome.config.draws_words:
        assert len(set(np.asarray(frozen.vocabulary.size).tolist())) > 1  # of other concepts other words are left
    several = setup_each(pipeline, list(NAMES), outcome.config)
    shared = [named((each.unet, each.text, each.schedule)) for _, each in several]
    assert all(each[name] is x for each in shared for name, x in shared[0].items())


def convolutions(text: str) -> tuple[int, int]:
    """(convolutions, those of them that are grouped) in a compiled program."""
    lines = [line for line in text.splitlines() if re.search(r"= \S+ convolution\(", line)]
    return len(lines), sum(bool(re.search(r"(feature|batch)_group_count=(?!1\b)\d", line)) for line in lines)


def test_as_many_convolutions_as_a_single_run(outcome, pipeline):
    state, frozen = setup(pipeline, NAMES[0], outcome.config)
    with programs._collecting([]) as found:
        jax.eval_shape(functools.partial(erase_step, config=outcome.config), state, frozen)
    single = [call.lower(*args, **options).compile().as_text() for call, args, options in found]
    ours = [call.program.as_text() for call in outcome.step.calls]
    count = [convolutions(text) for text in single]
    assert sum(n for n, _ in count) == sum(convolutions(text)[0] for text in ours) > 20
    assert not any(grouped for text in ours for _, grouped in [convolutions(text)])


def test_a_kernel_for_each_lane_is_a_grouped_convolution():
    """What the refusal is for, and that the count above can fail."""
    convolve = jax.jit(lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), "SAME"))
    x, kernel, wanted = jnp.ones((3, 2, 4, 8, 8)), jnp.ones((3, 4, 4, 3, 3)), lambda shapes: True
    for args, flags, grouped in (((x, kernel), (True, True), 1), ((x, kernel[0]), (True, False), 0)):
        (call,) = batched(convolve, args, flags, wanted).calls
        assert convolutions(call.program.as_text()) == (1, grouped)


def test_settings_that_lanes_serve():
    refused = preset("paper").method.lanes.refused
    for trainable in ("kv", "xattn"):
        assert refused(settings("paper", trainable=trainable)) is None
    for trainable in ("full", "noxattn"):
        assert f"trainable={trainable}: each run has convolutions of its own" in refused(
            settings("paper", trainable=trainable)
        )


def test_what_a_single_step_donates_is_donated(outcome):
    large = [name for name in outcome.gone if name.startswith(("drift/", "opt_state/mu/", "opt_state/nu/", "latents/"))]
    assert large and all(outcome.gone[name] for name in large)
    state = outcome.state
    update = next(call.program for call in outcome.step.calls if call.name == "_update")
    bytes_of = sum(x.nbytes for x in jax.tree.leaves((state.drift, state.opt_state.mu, state.opt_state.nu)))
    assert update.memory_analysis().alias_size_in_bytes >= bytes_of


def test_a_step_finds_its_programs_compiled(outcome, caplog):
    state = jax.tree.map(jnp.copy, outcome.state)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        outcome.step(state, outcome.start[1])
        assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
        jax.jit(lambda x: x + 41.5)(jnp.ones(3))
        assert [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


def test_a_lane_that_is_not_finite_leaves_the_others_as_they_are(outcome):
    """Bit by bit, in the state and in the metrics; the repeat also shows that a step has no memory of its own."""
    frozen = outcome.start[1]
    clean = jax.tree.map(jnp.copy, outcome.state)
    broken = dataclasses.replace(clean, drift={name: d.at[1].set(jnp.nan) for name, d in clean.drift.items()})
    broken = jax.tree.map(jnp.copy, broken)
    ours, wanted = (jax.device_get(outcome.step(state, frozen)) for state in (broken, clean))
    for k in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, *(lanes.lane(state, k) for state, _ in (ours, wanted)))
        for name in wanted[1].keys() - {"per_tensor"}:
            assert ours[1][name][k] == wanted[1][name][k], name
    assert np.isnan(ours[1]["L_e"][1])
    for tree in ours:
        assert lanes.finite(tree).tolist() == [True, False, True]
    assert lanes.finite(wanted[0]).all() and lanes.finite(wanted[1]).all()


def test_runs_that_do_not_fit_together(pipeline):
    config = CASES["esd"]
    with pytest.raises(AegisError, match="runs of 1, 2 concepts cannot be set up together"):
        setup_each(pipeline, ["star", ["red", "dog"]], config)
    (state, first), (_, second) = setup_each(pipeline, ["star", "dog"], config)
    later = dataclasses.replace(state, step=jnp.int32(1))
    with pytest.raises(ValueError, match="different steps"):
        lanes.stack([(state, first), (later, second)])


def test_what_is_the_same_for_all_stays_a_branch():
    """A branch whose predicate has no axis is taken or not; a result that depends on nothing mapped has no axis."""

    @jax.jit
    def draw(done, x):
        return jax.lax.cond(done, lambda x: x, lambda x: jnp.sin(x) * 2, x)

    def function(count, x):
        return count + 1, draw(count > 2, x), jnp.float32(3)

    args, flags = (jnp.int32(1), jnp.arange(6.0).reshape(3, 2)), (False, True)
    step = batched(function, args, flags, lambda shapes: (False, True, True))
    assert any("conditional(" in call.program.as_text() for call in step.calls)
    for count in (1, 5):
        got = step(jnp.int32(count), args[1])
        wanted = args[1] if count > 2 else jnp.sin(args[1]) * 2
        assert got[0] == count + 1 and got[0].shape == ()
        np.testing.assert_allclose(got[1], wanted, 1e-6)
        np.testing.assert_array_equal(got[2], [3, 3, 3])
    with pytest.raises(TypeError, match=r"shape \(2,\) differs along the axis"):
        batched(function, args, flags, lambda shapes: (False, False, False))
    with pytest.raises(TypeError, match="made for"):
        step(args)
