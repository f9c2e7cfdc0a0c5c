"""Training's own `erase_step`, AEGIS, its ablations and ESD, against PyTorch in float64 by the method's page.

Starts from a random drift, so that there is something to retain, and from given latents.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from aegis_jax.erasure import aegis, groups, latents, trainable  # noqa: E402
from aegis_jax.erasure.aegis.config import GRPConfig  # noqa: E402
from aegis_jax.erasure.aegis.setup import setup  # noqa: E402
from aegis_jax.erasure.aegis.step import erase_step  # noqa: E402
from aegis_jax.erasure.latents import Noised  # noqa: E402
from aegis_jax.erasure.presets import preset  # noqa: E402
from aegis_jax.models.layout import torch_key  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402

CONCEPT, OMEGA, RATE, SET = "red star", 0.5, 1e-3, "xattn"
FIXED = GRPConfig(rule="fixed", omega=OMEGA)


def settings(name, life="run", **changes):
    """A preset with larger steps, whose v and p are known before the step where they are kept."""
    own = preset(name).settings
    sizes = {key: 5 * getattr(own.soft, key) for key in ("beta", "gamma")}
    soft = dataclasses.replace(own.soft, life=life, tokens=2, **sizes)
    return dataclasses.replace(own, eta=2.0, learning_rate=RATE, trainable=SET, batch=2, soft=soft, **changes)


VARIANTS = {
    "paper": settings("paper", grp=FIXED),
    "paper-no-aet": settings("paper-no-aet", grp=GRPConfig(rule="none")),
    "paper-no-prompt": settings("paper-no-prompt", grp=GRPConfig(rule="constant", omega=0.3)),
    "esd": settings("esd"),
}


@pytest.fixture(scope="module")
def given(pipeline):
    """Two latents of two images each, and a drift in conflict with about half of the tensors, {dotted path: array}."""
    rng = np.random.default_rng(5)
    chosen = trainable.select(pipeline.unet.params, SET)
    z = rng.normal(size=(2, 2, 8, 8, 4)).astype(np.float32)
    t = np.array([[333, 720], [12, 501]], np.int32)
    drift = {path: 0.05 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in chosen.items()}
    return {"latents": list(zip(z, t)), "drift": drift}


class Draws:
    """In place of `latents.fresh`: hands out given latents, and notes what each was asked to be guided by."""

    def __init__(self, given, patch):
        self.given, self.guides = list(given), []
        patch.setattr(latents, "fresh", self)

    def __call__(self, frozen, theta, cond, key, **how):
        z, t = self.given[len(self.guides)]
        self.guides.append(np.asarray(cond.embedding))
        return Noised(jnp.asarray(z), jnp.asarray(t)), jnp.int32(0)


def one_step(patch, pipeline, config, given):
    """(state before, state after, metrics, what the latents were guided by), on the host."""
    draws = Draws(given["latents"], patch)
    state, frozen = setup(pipeline, CONCEPT, config)
    state = dataclasses.replace(state, drift=groups.stack(given["drift"]))
    before = jax.device_get(state)
    after, metrics = erase_step(state, frozen, config)
    return before, jax.device_get(after), jax.device_get(metrics), draws.guides


class Reference:
    """The networks in float64; the drift lies in PyTorch's layout on the weights of `current`."""

    def __init__(self, folder, drift):
        self.original = torch_aegis.load(folder)
        unet = copy.deepcopy(self.original.unet)
        self.weights = dict(unet.named_parameters())
        with torch.no_grad():
            for path, d in drift.items():
                self.weights[torch_key(path)].add_(torch.as_tensor(d.T))
        self.current = dataclasses.replace(self.original, unet=unet)
        self.words = torch_aegis.word_ids(self.original.tokenizer, CONCEPT)

    def text(self, soft=None, words=None):
        """E([BOS, soft, words, EOS...]), the concept's words by default."""
        soft = soft if soft is None or torch.is_tensor(soft) else torch.tensor(np.asarray(soft), dtype=torch.float64)
        return torch_aegis.prompt_embedding(self.original, soft, self.words if words is None else words)

    def noise(self, pipeline, at, text):
        z, t = at
        return torch_aegis.predict_noise(pipeline, torch.tensor(z).double(), torch.tensor(t).long(), text)

    def attack_losses(self, at):
        """{"p": A(p), "v": J(v)} as functions of soft tokens."""
        with torch.no_grad():
            old, new = (self.noise(pipeline, at, self.text()) for pipeline in (self.original, self.current))
        square = torch_aegis.mse

        def J(v):
            eps = self.noise(self.original, at, self.text(v))
            return square(eps - old) + square(eps - new)

        return {"p": lambda p: square(self.noise(self.current, at, self.text(p)) - old), "v": J}

    def erasure(self, at, v, p, eta):
        """(L_e, {key: g_e}); None as soft tokens: the concept alone."""
        with torch.no_grad():
            empty = self.noise(self.original, at, self.text(words=[]))
            target = empty - eta * (self.noise(self.original, at, self.text(v)) - empty)
        loss = torch_aegis.mse(self.noise(self.current, at, self.text(p)) - target)
        return loss.item(), dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values()))))


@pytest.fixture(scope="module")
def reference(folder, given):
    return Reference(folder, given["drift"])


def check_soft(before, after, loss, loss_of, size):
    """One sign step of v or p and its loss; without the part, neither a step nor a loss."""
    if loss_of is None:
        assert loss is None and before.tobytes() == after.tobytes()
        return None
    wanted, gradient, _ = torch_aegis.sign_step(loss_of, before[0], size)
    np.testing.assert_allclose(loss, wanted, 1e-4)
    clear = (gradient.abs() > 1e-3 * gradient.abs().max()).numpy()
    expected = before[0] - np.float32(size) * np.sign(gradient.numpy()).astype(np.float32)
    np.testing.assert_allclose(after[0][clear], expected[clear], rtol=0, atol=1e-7)
    assert clear.mean() > 0.9
    return after[0]


def retained(g_e, g_r, grp):
    """(what enters Adam, the cosine) of one tensor by the rule, in float64."""
    a = (g_e * g_r).sum()
    cosine = float(a / (g_e.norm() * g_r.norm()))
    if grp.rule == "constant":
        return g_e + grp.omega * g_r, cosine
    if grp.rule == "none" or a >= 0:
        return g_e, cosine
    return g_e - grp.omega * a / (g_r**2).sum() * g_r, cosine


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_is_what_the_page_says(monkeypatch, pipeline, given, reference, name):
    """The sign steps at the first latent, the loss and its gradient at the second; ESD has one for all."""
    config = VARIANTS[name]
    before, after, metrics, guides = one_step(monkeypatch, pipeline, config, given)
    is_esd = name == "esd"
    of_attack, of_loss = given["latents"][0], given["latents"][0 if is_esd else 1]
    losses = reference.attack_losses(of_attack)
    v = check_soft(before.v, after.v, metrics.get("L_aet"), losses["v"] if config.has_target else None, 5e-3)
    p = check_soft(before.p, after.p, metrics.get("L_adv"), losses["p"] if config.has_prompt else None, 5e-3)
    # Guided by c_e for the sign steps, for the loss by the new c'.
    wanted = [None] if is_esd else [None, v]
    assert len(guides) == len(wanted)
    for guide, soft in zip(guides, wanted):
        np.testing.assert_allclose(guide, reference.text(soft).numpy(), atol=1e-5)

    L_e, g_e = reference.erasure(of_loss, v, p, config.eta)
    np.testing.assert_allclose(metrics["L_e"], L_e, 1e-4)
    mean = groups.unstack(after.opt_state.mu, given["drift"])
    cosines = {}
    for path, d in given["drift"].items():
        key = torch_key(path)
        g, cosines[key] = retained(g_e[key], torch.as_tensor(d.T).double(), config.grp)
        error = np.linalg.norm(np.asarray(mean[path], np.float64).T / 0.1 - g.numpy())
        assert error <= 1e-3 * g.norm().item(), path
    # Adam's first direction is the sign of what enters it, so that the update's size is the rate.
    for path, new in groups.unstack(after.drift, given["drift"]).items():
        direction = np.asarray(mean[path], np.float64) / 0.1
        clear = np.abs(direction) > 1e-5
        moved = np.asarray(new, np.float64) - given["drift"][path]
        np.testing.assert_allclose(moved[clear], -RATE * np.sign(direction[clear]), 5e-3, err_msg=path)
    # What is told of each tensor, under the names that the run's file has.
    names = aegis.tensors(pipeline, config)
    assert sorted(names) == sorted(cosines)
    for kind, values in metrics["per_tensor"].items():
        assert values.shape == (len(names),), kind
    np.testing.assert_allclose(metrics["per_tensor"]["cosine"], [cosines[key] for key in names], 1e-3, 1e-4)
    assert np.ptp(metrics["per_tensor"]["cosine"]) > 0.01  # so that an order of their own would show
    np.testing.assert_allclose(metrics["conflict_share"], np.mean([c < 0 for c in cosines.values()]), 1e-6)
    assert 0 < metrics["conflict_share"] < 1  # both branches of DGR were taken


def test_esd_is_esd(monkeypatch, pipeline, given, reference):
    """L_e = mean square of eps(theta, c_e) - [e0 - (eps0(c_e) - e0)], e0 = eps0(c_0): the preset's own eta and rate."""
    config = dataclasses.replace(preset("esd").settings, trainable=SET, batch=2)
    _, _, metrics, _ = one_step(monkeypatch, pipeline, config, given)
    at = given["latents"][0]
    with torch.no_grad():
        c_e, c_0 = reference.text(), reference.text(words=[])
        e0, e_c = (reference.noise(reference.original, at, c).numpy() for c in (c_0, c_e))
        eps = reference.noise(reference.current, at, c_e).numpy()
    np.testing.assert_allclose(metrics["L_e"], np.mean((eps - (2 * e0 - e_c)) ** 2), 1e-4)
    assert not {"L_aet", "L_adv", "L_p"} & metrics.keys()


BOTH = ["c_e", "c'"]
DRAWS = {"paper": BOTH, "released": BOTH, "random-prefixes": ["c'"], "esd": ["c_e"], "aegis+": ["c_e"]}


@pytest.mark.parametrize("name", DRAWS)
def test_which_latents_a_method_draws(monkeypatch, pipeline, given, name):
    """One for the sign steps, under c_e, and one for the loss, under c'; neither where nothing needs it."""
    life = preset(name).settings.soft.life
    config = settings(name, life=life)
    _, after, _, guides = one_step(monkeypatch, pipeline, config, given)
    _, frozen = setup(pipeline, CONCEPT, config)
    (c_e,) = np.asarray(frozen.concept_emb.embedding)
    found = ["c_e" if all(np.array_equal(row, c_e) for row in guide) else "c'" for guide in guides]
    assert found == DRAWS[name]


def test_latents_of_their_own_are_drawn_by_keys_of_their_own(monkeypatch, pipeline):
    """Attack's and loss's draws are independent: each has its own key, other than every later step's."""
    seen = []

    def fresh(frozen, theta, cond, key, **how):
        seen.append(np.asarray(jax.random.key_data(key)).tolist())
        return Noised(jnp.ones((2, *frozen.latent_shape)), jnp.array([5, 500])), jnp.int32(0)

    monkeypatch.setattr(latents, "fresh", fresh)
    config = VARIANTS["paper"]
    state, frozen = setup(pipeline, CONCEPT, config)
    for _ in range(2):
        state, _ = erase_step(state, frozen, config)
    assert len(seen) == 4 and len({tuple(key) for key in seen}) == 4
