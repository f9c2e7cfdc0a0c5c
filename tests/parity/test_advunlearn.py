"""AdvUnlearn's losses and gradients against their float64 PyTorch transcription (torch_advunlearn.py)."""

import copy
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from aegis_jax.erasure import groups, networks, trainable  # noqa: E402
from aegis_jax.erasure.advunlearn import step  # noqa: E402
from aegis_jax.erasure.advunlearn.config import AdvUnlearnConfig, AttackConfig, RetainConfig  # noqa: E402
from aegis_jax.erasure.advunlearn.setup import setup  # noqa: E402
from aegis_jax.erasure.latents import Noised  # noqa: E402
from aegis_jax.erasure.networks import noise  # noqa: E402
from aegis_jax.models.layout import to_torch, torch_key  # noqa: E402
from tests.parity import torch_advunlearn  # noqa: E402
from tests.parity.step_cases import loader  # noqa: E402
from tests.parity.torch_aegis import word_ids  # noqa: E402

CONCEPT, PROMPTS, ETA, WEIGHT = "red star", ("a blue heart", "dog", "church"), 1.5, 0.7
CASES = [("v", "text_encoder"), ("epsilon", "xattn")]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return loader(tmp_path_factory.mktemp("advunlearn"))


def close(found, wanted, tolerance):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


@dataclasses.dataclass(frozen=True)
class Case:
    original: object  # theta0 in PyTorch
    current: object  # theta
    module: object  # of it, what is trained
    frozen: object  # theta0 here
    net: networks.Networks  # theta here
    trained: list  # paths
    at: tuple
    kept: tuple
    p: np.ndarray


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request, pipelines):
    model, trainable_set = request.param
    original, ours = pipelines(model)
    config = AdvUnlearnConfig(
        trainable=trainable_set, compute_dtype="float32", attack=AttackConfig(tokens=2),
        retain=RetainConfig(prompts=PROMPTS, batch=3),
    )  # fmt: skip
    _, frozen = setup(ours, [CONCEPT], config)
    rng = np.random.default_rng(7)
    chosen = trainable.select(networks.trained(frozen.net, trainable_set), trainable_set)
    drift = {path: (0.1 * rng.normal(size=x.shape)).astype(np.float32) for path, x in chosen.items()}
    current = copy.deepcopy(original)
    module = current.text_encoder if trainable_set == "text_encoder" else current.unet
    module.requires_grad_(True)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for path, d in drift.items():
            parameters[_name(parameters, path)] += torch.tensor(to_torch(path, d)).double()
    latent = lambda n: rng.normal(size=(n, 8, 6, 4)).astype(np.float32)  # noqa: E731
    at, kept = (latent(2), np.array([617, 41], np.int32)), (latent(3), np.array([3, 500, 981], np.int32))
    p = (0.05 * rng.normal(size=(2, 32))).astype(np.float32)
    net = networks.moved(frozen.net, groups.stack(drift), trainable_set)
    return Case(original, current, module, frozen, net, list(drift), at, kept, p), config


def _name(parameters, path):
    """transformers has left "text_model." out of its names in some versions."""
    key = torch_key(path)
    return key if key in parameters else key.removeprefix("text_model.")


def in_torch(at):
    return torch.tensor(at[0]).double(), torch.tensor(at[1], dtype=torch.long)


def ours(at):
    return Noised(*map(jnp.asarray, at))


@jax.jit
def _attacked(frozen, net, p, at):
    return step.attacked(net, frozen.template, p, at, noise(frozen.net, at, frozen.concept_emb))


@partial(jax.jit, static_argnums=5)
def _stepped(frozen, net, tokens, at, kept, trainable_set):
    wanted = step.goals(frozen.net, at, kept, frozen.concept_emb, frozen.retained_emb, ETA)
    return step.gradients_of(net, tokens, frozen.retained, at, kept, wanted, WEIGHT, trainable_set, False)


@pytest.mark.parametrize("case", CASES[:1], ids="-".join, indirect=True)
def test_the_attack(case):
    case, _ = case
    words = word_ids(case.original.tokenizer, CONCEPT)
    p = torch.tensor(case.p).double().requires_grad_(True)
    wanted = torch_advunlearn.attack_loss(case.original, case.current, words, p, in_torch(case.at))
    (gradient,) = torch.autograd.grad(wanted, p)

    loss, slope = _attacked(case.frozen, case.net, case.p[None], ours(case.at))
    assert close(loss, wanted.item(), 1e-4) and close(slope[0], gradient, 1e-3)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("attacked", [True, False])
def test_the_step(case, attacked):
    """Both losses, and the gradient of their sum by every trained tensor; without an attack c* is the plain prompt."""
    case, config = case
    words = word_ids(case.original.tokenizer, CONCEPT)
    prompts = [word_ids(case.original.tokenizer, prompt) for prompt in PROMPTS]
    both, p = (case.original, case.current), torch.tensor(case.p).double() if attacked else None
    L_e = torch_advunlearn.erasure_loss(*both, words, p, in_torch(case.at), ETA)
    L_p = torch_advunlearn.retention_loss(*both, prompts, in_torch(case.kept))
    parameters = dict(case.module.named_parameters())
    names = {path: _name(parameters, path) for path in case.trained}
    wanted = torch_advunlearn.gradients(L_e + WEIGHT * L_p, case.module, list(names.values()))

    tokens = step.filled(case.frozen.template, case.p[None]) if attacked else case.frozen.plain
    losses, gradients = _stepped(case.frozen, case.net, tokens, ours(case.at), ours(case.kept), config.trainable)
    assert close(losses["L_e"], L_e.item(), 1e-4) and close(losses["L_p"], L_p.item(), 1e-4)
    like = trainable.select(networks.trained(case.net, config.trainable), config.trainable)
    gradients = groups.unstack(gradients, like)
    whole = np.sqrt(sum(float(g.norm()) ** 2 for g in wanted.values()))
    for path, name in names.items():
        theirs = wanted[name].numpy()
        apart = np.linalg.norm(to_torch(path, np.asarray(gradients[path])) - theirs)
        assert apart <= 1e-3 * np.linalg.norm(theirs) + 1e-6 * whole, path
    assert whole > 0
