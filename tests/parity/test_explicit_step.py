"""`explicit_step` against the float64 PyTorch transcription of the method (torch_aegis.py).

A sign step may differ between float32 and float64 where the gradient is nearly 0. So v and p are compared in direction
where the gradient is not small, and the reference computes what follows from our v and p. In the same way DGR is
compared from our gradients, once these have been compared.
"""

import dataclasses
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from aegis_jax.erasure.step import explicit_step  # noqa: E402
from aegis_jax.errors import AegisError  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402
from tests.parity.step_cases import (  # noqa: E402
    FAST,
    SLOW,
    before_of,
    case_of,
    loader,
    omega_of,
    soft_and_latents,
)

LOSS_TOLERANCE = 1e-4  # relative
GRADIENT_TOLERANCE = 1e-3  # relative, in each tensor's norm
FLOOR = 1e-6  # of the norm of the whole gradient: what float32 leaves of a tensor whose gradient is 0
RULE_TOLERANCE = 1e-5  # of DGR from given gradients: float32's inner products, relative to the norms

CASES = [
    *FAST,
    pytest.param(SLOW, marks=pytest.mark.slow),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def named(*names):
    return pytest.mark.parametrize("case", [case_of(name) for name in names], ids=names)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return loader(tmp_path_factory.mktemp("explicit"))


@dataclasses.dataclass(frozen=True)
class Outcome:
    given: dict  # the keyword arguments of both
    inputs: torch_aegis.Inputs
    ours: dict


@pytest.fixture(scope="module")
def outcome(pipelines):
    """outcome(case) -> Outcome, run once."""

    @functools.cache
    def run(case):
        (original, ours_original), (current, ours_current) = pipelines(case.model), pipelines(case.model, case.current)
        given = {
            **soft_and_latents(case),
            **{name: getattr(case, name) for name in ("eta", "beta", "gamma", "mu", "cap")},
        }
        given["omega"] = omega_of(case, [key for key, _ in original.unet.named_parameters()])
        given["before"] = None
        if case.before != "none":
            about = torch_aegis.explicit_step(original, current, case.concept, **given)["projection"]
            given["before"] = before_of(case.before, about, len(case.name))
        ours = explicit_step(ours_original, ours_current, case.concept, **given)
        inputs = torch_aegis.prepare(original, current, case.concept, given["attack"], given["loss"])
        return Outcome(given, inputs, ours)

    return run


# --- against the reference ------------------------------------------------------------------------


def float64(x):
    return np.asarray(x, np.float64)


def starts(given, keys):
    """{key: omega before its move}"""
    return {key: given["omega"][key] if isinstance(given["omega"], dict) else given["omega"] for key in keys}


def check_sign_step(before, after, gradient, size):
    """Every coordinate moved by exactly 0 or +-size, against the gradient wherever that is not nearly 0."""
    after = np.asarray(after)
    assert after.shape == before.shape
    if size == 0:
        np.testing.assert_array_equal(after, before)
        return
    moves = {sign: after == before + np.float32(sign) * np.float32(size) for sign in (-1, 0, 1)}
    assert np.all(moves[-1] | moves[0] | moves[1])
    gradient = gradient.numpy()
    clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
    assert clear.mean() > 0.9  # otherwise this would assert nothing
    assert np.all(np.where(gradient > 0, moves[-1], moves[1])[clear])


@each_case
def test_sign_steps(outcome, case):
    """L_adv and L_aet before their sign steps, and the steps themselves."""
    run = outcome(case)
    for name, label, loss_of, size in (
        ("p", "L_adv", torch_aegis.adversarial_loss, case.gamma),
        ("v", "L_aet", torch_aegis.aet_loss, case.beta),
    ):
        loss, gradient, _ = torch_aegis.sign_step(functools.partial(loss_of, run.inputs), run.given[name], size)
        np.testing.assert_allclose(float(run.ours[label]), loss, LOSS_TOLERANCE)
        check_sign_step(run.given[name], run.ours[name], gradient, size)


@each_case
def test_erasure_loss_and_gradients(outcome, case):
    """L_e and g_e, in PyTorch's layout, at our new v and p: each tensor within GRADIENT_TOLERANCE of its norm."""
    run = outcome(case)
    loss, grads = torch_aegis.erasure_gradients(run.inputs, run.ours["v"], run.ours["p"], case.eta)
    np.testing.assert_allclose(float(run.ours["L_e"]), loss, LOSS_TOLERANCE)
    scale = np.sqrt(sum(g.square().sum().item() for g in grads.values()))
    assert set(run.ours["grads"]) == set(grads)
    for key, wanted in grads.items():
        wanted = wanted.numpy()
        assert run.ours["grads"][key].shape == wanted.shape, key
        error = np.linalg.norm(float64(run.ours["grads"][key]) - wanted)
        assert error <= GRADIENT_TOLERANCE * np.linalg.norm(wanted) + FLOOR * scale, (key, error)


def reference_dgr(run):
    """(drift, DGR) of the reference from our gradients."""
    grads = {key: torch.as_tensor(float64(g)) for key, g in run.ours["grads"].items()}
    drift = torch_aegis.drift(run.inputs)
    rule = {name: run.given[name] for name in ("omega", "before", "mu", "cap")}
    return drift, torch_aegis.dgr(grads, drift, **rule)


@each_case
def test_projection_and_rectification(outcome, case):
    """P, its cosine and, with our omega, g; g is g_e bit for bit where there is no conflict."""
    run = outcome(case)
    drift, wanted = reference_dgr(run)
    conflicts = []
    for name in ("projection", "cosines", "rectified"):
        assert set(run.ours[name]) == set(drift)
    for key, g_r in drift.items():
        g_e, projection, g = (np.asarray(run.ours[name][key]) for name in ("grads", "projection", "rectified"))
        cosine, omega = wanted["cosines"][key], float(run.ours["omega"][key])
        assert projection.shape == g.shape == g_e.shape == tuple(g_r.shape), key
        assert abs(float(run.ours["cosines"][key]) - cosine) <= RULE_TOLERANCE, key
        error = np.linalg.norm(projection - wanted["projection"][key].numpy())
        assert error <= RULE_TOLERANCE * np.linalg.norm(float64(g_e)), key
        if not g_r.any():
            assert not projection.any() and float(run.ours["cosines"][key]) == 0, key
        if abs(cosine) > RULE_TOLERANCE or cosine == 0:
            conflicts.append(cosine < 0)
            rectified = float64(g_e) - omega * float64(projection) * (cosine < 0)
            error = np.abs(g - rectified).max()
            assert error <= 1e-6 * (np.abs(g_e).max() + omega * np.abs(projection).max()), key
            assert cosine < 0 or g.tobytes() == g_e.tobytes(), key
    assert len(conflicts) > 0.9 * len(drift)
    if case.current == "moved":  # both branches are exercised
        assert 0.2 < np.mean(conflicts) < 0.8


@each_case
def test_omega(outcome, case):
    """omega exactly, where the sign of <g_e, P_before> is clear."""
    run = outcome(case)
    assert set(run.ours["omega"]) == set(run.ours["grads"])
    clear, moves = 0, set()
    for key, start in starts(run.given, run.ours["grads"]).items():
        g_e = float64(run.ours["grads"][key])
        before = np.zeros_like(g_e) if run.given["before"] is None else float64(run.given["before"][key])
        inner, rounding = np.sum(g_e * before), RULE_TOLERANCE * np.linalg.norm(g_e) * np.linalg.norm(before)
        signs = [np.sign(inner)] if abs(inner) > rounding or not before.any() else [-1, 0, 1]
        allowed = [
            np.clip(np.float32(start) - np.float32(case.mu) * np.float32(s), 0, np.float32(case.cap)) for s in signs
        ]
        assert np.float32(run.ours["omega"][key]) in allowed, (key, start, inner, run.ours["omega"][key])
        if len(signs) == 1:
            clear += 1
            moves.add((float(signs[0]), {0.0: "floor", np.float32(case.cap): "cap"}.get(allowed[0], "between")))
    assert clear > 0.8 * len(run.ours["grads"])
    if case.before == "none":
        assert {sign for sign, _ in moves} == {0}
    if case.current != "partly" and case.omega in ("spread", "spread far") and case.before == "mixed":
        assert {(1, "floor"), (1, "between"), (-1, "between"), (0, "between")} <= moves
        assert ((-1, "cap") in moves) == (case.cap == 1)


@named("conflict persists", "floor", "conflict flips", "cap", "v, conflict flips")
def test_omega_falls_while_conflict_persists_and_rises_when_it_flips(outcome, case):
    """sign <g_e, P_before> = sign(a_now a_before), for nearly all tensors: P_before is only about this step's P."""
    run = outcome(case)
    fell, rose, stopped = [], [], []
    for key, start in starts(run.given, run.ours["grads"]).items():
        after = float(run.ours["omega"][key])
        fell.append(after < start or after == 0)
        rose.append(after > start)
        stopped.append(after in (0, case.cap))
    assert np.mean(fell if case.before == "same" else rose) > 0.9
    if case.name in ("floor", "cap"):
        assert np.mean(stopped) > 0.9


@named("first step", "v, first step", "original, P before")
def test_current_is_the_original(outcome, case):
    """P is 0 everywhere, nothing is NaN, g is g_e bit for bit; omega moves by P_before alone."""
    run = outcome(case)
    for key, g_e in run.ours["grads"].items():
        assert np.isfinite(np.asarray(g_e)).all(), key
        assert not np.asarray(run.ours["projection"][key]).any(), key
        assert float(run.ours["cosines"][key]) == 0, key
        assert np.asarray(run.ours["rectified"][key]).tobytes() == np.asarray(g_e).tobytes(), key
        if run.given["before"] is None:
            assert float(run.ours["omega"][key]) == case.omega, key
    if run.given["before"] is not None:
        assert len({float(omega) for omega in run.ours["omega"].values()}) == 3


# --- what the comparison would notice -------------------------------------------------------------


@named("conflict persists", "v-prediction")
def test_attack_and_loss_latents_are_told_apart(outcome, case):
    """With the latents or the timesteps of the other draw the reference's losses are not ours."""
    run = outcome(case)
    soft = {name: torch.as_tensor(float64(run.given[name])) for name in "vp"}
    new = {name: torch.as_tensor(float64(run.ours[name])) for name in "vp"}
    (z_a, t_a), (z_b, t_b) = run.inputs.attack, run.inputs.loss

    def losses(attack, loss):
        inputs = dataclasses.replace(run.inputs, attack=attack, loss=loss)
        return {
            "L_adv": torch_aegis.adversarial_loss(inputs, soft["p"]).item(),
            "L_aet": torch_aegis.aet_loss(inputs, soft["v"]).item(),
            "L_e": torch_aegis.erasure_loss(inputs, new["v"], new["p"], case.eta).item(),
        }

    for name, wanted in losses((z_a, t_a), (z_b, t_b)).items():
        np.testing.assert_allclose(float(run.ours[name]), wanted, LOSS_TOLERANCE)
    for other in (losses((z_b, t_b), (z_a, t_a)), losses((z_b, t_a), (z_a, t_b)), losses((z_a, t_b), (z_b, t_a))):
        for name, loss in other.items():
            assert abs(float(run.ours[name]) / loss - 1) > 20 * LOSS_TOLERANCE, name


@named("conflict persists", "v-prediction")
def test_misreadings_would_be_noticed(outcome, case):
    """The reference, read wrongly in one point, gives another L_e, L_adv or L_aet than ours."""
    run = outcome(case)
    old = {name: torch.as_tensor(float64(run.given[name])) for name in "vp"}
    new = {name: torch.as_tensor(float64(run.ours[name])) for name in "vp"}
    swapped = dataclasses.replace(run.inputs, original=run.inputs.current, current=run.inputs.original)
    alone = dataclasses.replace(run.inputs, words=[])

    def loss_e(inputs=run.inputs, v=new["v"], p=new["p"], eta=case.eta):
        return torch_aegis.erasure_loss(inputs, v, p, eta).item()

    wrong = {
        "v before its step": ("L_e", loss_e(v=old["v"])),
        "p before its step": ("L_e", loss_e(p=old["p"])),
        "c' without v": ("L_e", loss_e(v=None)),
        "c* without p": ("L_e", loss_e(p=None)),
        "v and p exchanged": ("L_e", loss_e(v=new["p"], p=new["v"])),
        "soft tokens without the concept": ("L_e", loss_e(inputs=alone)),
        "another eta": ("L_e", loss_e(eta=case.eta + 0.5)),
        "theta and theta0 exchanged in L_e": ("L_e", loss_e(inputs=swapped)),
        "theta and theta0 exchanged in A": ("L_adv", torch_aegis.adversarial_loss(swapped, old["p"]).item()),
        "theta and theta0 exchanged in J": ("L_aet", torch_aegis.aet_loss(swapped, old["v"]).item()),
        "c' a free token in J": ("L_aet", torch_aegis.aet_loss(alone, old["v"]).item()),
    }
    for misreading, (name, loss) in wrong.items():
        assert abs(float(run.ours[name]) / loss - 1) > 5 * LOSS_TOLERANCE, misreading


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"concept": "star " * 75},
        {"omega": {"down_blocks.7.weight": 0.5}},
        {"before": {"down_blocks.7.weight": np.zeros((2, 2), np.float32)}},
    ],
    ids=["concept too long", "omega of no tensor", "P before of no tensor"],
)
def test_refuses(pipelines, changed):
    case = case_of("one of each")
    given = {
        "concept": case.concept,
        **soft_and_latents(case),
        **{name: getattr(case, name) for name in ("omega", "eta", "beta", "gamma", "mu", "cap")},
        **changed,
    }
    with pytest.raises(AegisError):
        explicit_step(pipelines(case.model)[1], pipelines(case.model, case.current)[1], **given)
