"""Training's own `erase_step`, AEGIS and its ablations, against the float64 PyTorch transcription of the method.

Starts from a random drift, so that there is something to retain, and from a given z_t and t.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from aegis_jax.erasure import baselines, groups, rectify, trainable  # noqa: E402
from aegis_jax.erasure import step as step_lib  # noqa: E402
from aegis_jax.erasure.config import AETConfig, EraseConfig, GRPConfig, PreserveConfig, PromptConfig, check  # noqa: E402
from aegis_jax.erasure.setup import setup  # noqa: E402
from aegis_jax.models.layout import torch_key  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402

CONCEPT, OMEGA, RATE = "red star", 0.5, 1e-3
FIXED = GRPConfig(omega_rule="fixed", omega=OMEGA)
AEGIS = EraseConfig(
    learning_rate=RATE,
    eta=2.0,
    trainable="xattn",
    aet=AETConfig(beta=2e-3),
    prompt=PromptConfig(gamma=5e-3),
    grp=FIXED,
)
VARIANTS = {
    "AEGIS": AEGIS,
    "w/o AET, hypergradient": dataclasses.replace(
        baselines.variant(AEGIS, "w/o AET"), grp=GRPConfig(omega=OMEGA, mu=0.03)
    ),
    "w/o adversarial prompt, w/o DGR": dataclasses.replace(
        baselines.variant(AEGIS, "w/o adversarial prompt"),
        grp=GRPConfig(retention="constant", weight=0.3),
    ),
    "ESD": baselines.variant(AEGIS, "ESD"),
    "whole tree": dataclasses.replace(AEGIS, grp=dataclasses.replace(FIXED, scope="tree")),
    "w/o AET, one omega per tensor": dataclasses.replace(
        baselines.variant(AEGIS, "w/o AET"), grp=GRPConfig(omega_per_tensor=True, mu=0.03)
    ),
    "projection after Adam": dataclasses.replace(AEGIS, grp=dataclasses.replace(FIXED, after_adam=True)),
}


def float64(x):
    return np.asarray(x, np.float64)


@pytest.fixture(scope="module")
def given(pipeline):
    """z_t, t and a drift in conflict with about half of the tensors, {dotted path: array}."""
    rng = np.random.default_rng(5)
    chosen = trainable.select(pipeline.unet.params, AEGIS.trainable)
    return {
        "z_t": rng.normal(size=(1, 8, 8, 4)).astype(np.float32),
        "t": np.array([333], np.int32),
        "drift": {path: 0.05 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in chosen.items()},
    }


@pytest.fixture(scope="module")
def reference(folder, given):
    """The transcription's inputs, with the drift added to PyTorch's own tensors ((in, out) kernels to (out, in))."""
    original = torch_aegis.load(folder)
    unet = copy.deepcopy(original.unet)
    weights = dict(unet.named_parameters())
    with torch.no_grad():
        for path, d in given["drift"].items():
            weights[torch_key(path)].add_(torch.as_tensor(d.T))
    current = dataclasses.replace(original, unet=unet)
    return torch_aegis.prepare(original, current, CONCEPT, given["z_t"], given["t"])


def one_step(monkeypatch, pipeline, config, given):
    """(state before, state after, metrics) of one `erase_step`, on the host, with the given z_t, t and drift."""
    monkeypatch.setattr(
        step_lib.latents_lib,
        "fresh",
        lambda *args, **kwargs: (jnp.asarray(given["z_t"]), jnp.asarray(given["t"]), jnp.int32(33)),
    )
    state, frozen = setup(pipeline, CONCEPT, config)
    state = dataclasses.replace(state, drift=groups.stack(given["drift"]))
    if state.previous is not None:  # as after a few steps
        rng = np.random.default_rng(6)
        noise = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32))  # noqa: E731
        mean = jax.tree.map(lambda x: 1e-2 * noise(x), state.opt_state.mu)
        variance = jax.tree.map(lambda x: 2 * x**2 + 1e-6, mean)
        state = dataclasses.replace(
            state,
            previous=jax.tree.map(noise, state.previous),
            opt_state=state.opt_state._replace(count=jnp.int32(3), mu=mean, nu=variance),
        )
    if config.grp.omega_per_tensor:
        rng = np.random.default_rng(7)
        spread = lambda x: jnp.asarray(rng.uniform(0.1, 0.9, x.shape).astype(np.float32))  # noqa: E731
        state = dataclasses.replace(state, omega=jax.tree.map(spread, state.omega))
    before = jax.device_get(state)
    after, metrics = step_lib.erase_step(state, frozen, config)
    return before, jax.device_get(after), jax.device_get(metrics)


def check_soft(before, after, loss, enabled, loss_of, size):
    """One sign step of v or p and its loss; without the part, neither a step nor a loss."""
    before, after = before[0], after[0]
    assert enabled == (loss is not None)
    if not enabled:
        assert before.tobytes() == after.tobytes()
        return None
    wanted, gradient, _ = torch_aegis.sign_step(loss_of, before, size)
    np.testing.assert_allclose(loss, wanted, 1e-4)
    clear = (gradient.abs() > 1e-3 * gradient.abs().max()).numpy()
    expected = before - np.float32(size) * np.sign(gradient.numpy()).astype(np.float32)
    np.testing.assert_allclose(after[clear], expected[clear], rtol=0, atol=1e-7)
    assert clear.mean() > 0.9
    return after


def retained(g_e, g_r, omega, grp):
    """What the retention mode makes of one tensor's direction."""
    if grp.retention == "constant":
        return g_e + grp.weight * g_r
    return torch_aegis.rectify(g_e, g_r, omega)[0] if grp.retention == "grp" else g_e


def omega_of_each(omega, like):
    """{path: omega}, from one value or stacks of them."""
    return groups.unstack(omega, like) if isinstance(omega, dict) else dict.fromkeys(like, omega)


def rectify_tree(gradients, drift, omega):
    """(lambda, cosine) of all tensors taken as one vector."""
    g_e = torch.cat([gradients[torch_key(path)].flatten() for path in drift])
    g_r = torch.cat([torch.as_tensor(d.T).double().flatten() for d in drift.values()])
    return torch_aegis.rectify(g_e, g_r, omega)[1:]


def adam_direction(moments, count):
    """Adam's update after `count` gradients from its own moments, in float64: unbiased mean over root of variance."""
    mean, variance = (float64(x) for x in moments)
    return (mean / (1 - 0.9**count)) / (np.sqrt(variance / (1 - 0.999**count)) + 1e-8)


@pytest.mark.parametrize("name", VARIANTS)
def test_step_matches_transcription(monkeypatch, pipeline, given, reference, name):
    config = VARIANTS[name]
    before, after, metrics = one_step(monkeypatch, pipeline, config, given)
    v = check_soft(
        before.v, after.v, metrics.get("L_aet"), config.aet.enabled,
        lambda v: torch_aegis.aet_loss(reference, v, 1.0), config.aet.beta,
    )  # fmt: skip
    p = check_soft(
        before.p, after.p, metrics.get("L_adv"), config.prompt.enabled,
        lambda p: torch_aegis.adversarial_loss(reference, p), config.prompt.gamma,
    )  # fmt: skip
    wanted = torch_aegis.erasure_gradients(reference, v, p, config.eta, 0.0)
    np.testing.assert_allclose(metrics["L_e"], wanted["L_e"], 1e-4)

    like, omega = given["drift"], omega_of_each(before.omega, given["drift"])
    np.testing.assert_allclose(metrics["omega"], np.mean(list(omega.values())), 1e-6)
    whole = rectify_tree(wanted["grads"], like, OMEGA) if config.grp.scope == "tree" else None
    old_mean, mean, variance, new_drift = (
        groups.unstack(tree, like)
        for tree in (before.opt_state.mu, after.opt_state.mu, after.opt_state.nu, after.drift)
    )
    cosines, dot = [], 0.0
    for path, d in like.items():
        key, g_r = torch_key(path), torch.as_tensor(d.T).double()
        g_e = wanted["grads"][key]
        if whole:
            entered = g_e + whole[0] * g_r
        else:
            entered = g_e if config.grp.after_adam else retained(g_e, g_r, float(omega[path]), config.grp)
        new = (float64(mean[path]) - 0.9 * float64(old_mean[path])) / 0.1
        error = np.linalg.norm(new.T - entered.numpy())
        assert error <= 1e-3 * entered.norm().item(), path
        direction = adam_direction((mean[path], variance[path]), int(after.opt_state.count))
        if config.grp.after_adam:
            direction = retained(torch.as_tensor(direction.T), g_r, float(omega[path]), config.grp).numpy().T
            cosines.append(torch_aegis.rectify(torch.as_tensor(direction.T), g_r, 0.0)[2])
        else:
            cosines.append(whole[1] if whole else wanted["cosines"][key])
        moved = float64(new_drift[path]) - d
        np.testing.assert_allclose(moved, -RATE * direction, 1e-3, 1e-4 * RATE, err_msg=path)
        dot += np.sum(moved * d)
    np.testing.assert_allclose(metrics["update_dot_gr"], dot, 1e-3, 1e-7)
    squared = sum(np.sum(float64(d) ** 2) for d in like.values())
    np.testing.assert_allclose(metrics["L_r"], squared / 2, 1e-5)
    if not config.grp.after_adam:
        np.testing.assert_allclose(metrics["mean_cosine"], np.mean(cosines), 1e-3, 1e-4)
        np.testing.assert_allclose(metrics["conflict_share"], np.mean(np.array(cosines) < 0), 1e-6)
        assert whole or 0 < metrics["conflict_share"] < 1  # both branches of GRP were taken
    check_omega(before, after.omega, wanted, given, config.grp)


def check_omega(before, omega, wanted, given, grp):
    """omega is held, or moved for the next step, by mu against the hypergradient of the previous projection."""
    if grp.retention != "grp" or grp.omega_rule == "fixed":
        assert omega == before.omega
        return
    strength = groups.unstack(before.previous["strength"], given["drift"])
    mean, variance = (groups.unstack(tree, given["drift"]) for tree in (before.opt_state.mu, before.opt_state.nu))
    count = int(before.opt_state.count)
    # The drift that the last step started from: this one less the update that Adam's moments tell.
    direction = {
        path: d + RATE * adam_direction((mean[path], variance[path]), count) for path, d in given["drift"].items()
    }
    slope = {
        path: np.sum((wanted["grads"][torch_key(path)].numpy().T + d) * -float64(strength[path]) * direction[path])
        for path, d in given["drift"].items()
    }
    if not grp.omega_per_tensor:
        slope = dict.fromkeys(slope, sum(slope.values()))
    old, new = (omega_of_each(x, given["drift"]) for x in (before.omega, omega))
    for path in slope:
        np.testing.assert_allclose(new[path], old[path] - grp.mu * np.sign(slope[path]), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", list(baselines.VARIANTS))
def test_every_ablation_is_one_of_a_config_with_all_parts_too(name):
    base = EraseConfig(
        prompt=PromptConfig(prefixes=4, context=True, context_rate=0.1),
        grp=GRPConfig(retention="constant", weight=0.1),
        preserve=PreserveConfig(weight=1.0),
    )
    made = baselines.variant(base, name)
    check(made)
    assert made != base
    # What says how the rest is kept is the paper's: it holds nothing of ours.
    assert (made.preserve.weight == 0) == (name not in ("w/o AET", "w/o adversarial prompt"))
    assert made.prompt.context == made.moves_kappa == (name == "w/o AET")


def test_every_ablation_of_the_paper_is_a_setting():
    """Section 7, by config alone."""
    parts = {
        name: baselines.variant(AEGIS, name)
        for name in ("w/o AET", "w/o PR", "w/o DGR", "fixed omega", "w/o adversarial prompt", "ESD")
    }
    assert not parts["w/o AET"].aet.enabled and parts["w/o AET"].prompt.enabled
    assert not parts["w/o adversarial prompt"].prompt.enabled
    assert parts["w/o adversarial prompt"].aet.enabled
    assert parts["w/o PR"].grp.retention == "none"
    assert parts["w/o DGR"].grp.retention == "constant"
    assert parts["fixed omega"].grp.omega_rule == "fixed" and parts["fixed omega"].grp.omega == 1
    esd = parts["ESD"]
    assert not esd.aet.enabled and not esd.prompt.enabled and esd.grp.retention == "none"
    untouched = dataclasses.replace(esd, aet=AEGIS.aet, prompt=AEGIS.prompt, grp=AEGIS.grp)
    assert untouched == AEGIS


def test_rectified_plain_descent_does_not_undo_retention(pipeline, given):
    """Along -g at omega = 1, L_r does not grow to first order in any tensor; erasure still descends."""
    rng = np.random.default_rng(1)
    for g_r in given["drift"].values():
        g_e = rng.normal(size=g_r.shape).astype(np.float32)
        for gradient in (g_e, -g_e):
            g = float64(rectify.rectify(gradient, g_r, np.float32(1.0))[0])
            size = np.linalg.norm(gradient) * np.linalg.norm(g_r)
            assert np.sum(g * g_r) >= -1e-6 * size
            assert np.sum(g * gradient) >= 0
