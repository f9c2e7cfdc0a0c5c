"""AGE's losses and gradients against their float64 PyTorch transcription (torch_age.py)."""

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
from aegis_jax.erasure.age import step  # noqa: E402
from aegis_jax.erasure.age.config import AgeConfig, TargetConfig  # noqa: E402
from aegis_jax.erasure.age.setup import setup  # noqa: E402
from aegis_jax.erasure.latents import Noised  # noqa: E402
from aegis_jax.models.layout import to_torch, torch_key  # noqa: E402
from tests.parity import torch_age  # noqa: E402
from tests.parity.step_cases import loader  # noqa: E402
from tests.parity.torch_aegis import prompt_embedding, word_ids  # noqa: E402

CONCEPT, WORDS, ETA, WEIGHT = "red star", ("a blue heart", "dog", "church", "photo"), 1.5, 0.7


@dataclasses.dataclass(frozen=True)
class Case:
    original: object  # theta0 in PyTorch
    current: object  # theta
    frozen: object  # theta0 here
    net: networks.Networks  # theta here
    trained: list  # paths
    at: tuple
    kept: tuple
    encodings: object  # of the words, in PyTorch, (C, L, D)
    pi: np.ndarray
    gumbel: np.ndarray


@pytest.fixture(scope="module", params=["v", "epsilon"])
def case(request, tmp_path_factory):
    original, ours = loader(tmp_path_factory.mktemp("age"))(request.param)
    config = AgeConfig(compute_dtype="float32", target=TargetConfig(words=WORDS))
    _, frozen = setup(ours, [CONCEPT], config)
    rng = np.random.default_rng(11)
    chosen = trainable.select(frozen.net.unet, config.trainable)
    drift = {path: (0.1 * rng.normal(size=x.shape)).astype(np.float32) for path, x in chosen.items()}
    current = copy.deepcopy(original)
    current.unet.requires_grad_(True)
    parameters = dict(current.unet.named_parameters())
    with torch.no_grad():
        for path, d in drift.items():
            parameters[torch_key(path)] += torch.tensor(to_torch(path, d)).double()
        encodings = torch.cat([prompt_embedding(original, None, word_ids(original.tokenizer, w)) for w in WORDS])
    latent = lambda: rng.normal(size=(2, 8, 6, 4)).astype(np.float32)  # noqa: E731
    at, kept = (latent(), np.array([617, 41], np.int32)), (latent(), np.array([300, 500], np.int32))
    pi, gumbel = rng.normal(size=4).astype(np.float32), rng.gumbel(size=4).astype(np.float32)
    net = networks.moved(frozen.net, groups.stack(drift), config.trainable)
    return Case(original, current, frozen, net, list(drift), at, kept, encodings, pi, gumbel)


def in_torch(at):
    return torch.tensor(at[0]).double(), torch.tensor(at[1], dtype=torch.long)


def ours(at):
    return Noised(*map(jnp.asarray, at))


def apart(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def by_torch(case, pi, target):
    """The target's encoding (1, L, D) there."""
    weights = torch_age.mixture(pi, torch.tensor(case.gumbel).double(), target.temperature, target.form, target.top)
    return torch.einsum("c,cld->ld", weights, case.encodings)[None]


FORMS = [
    TargetConfig(words=WORDS, form="hard", temperature=0.7),
    TargetConfig(words=WORDS, form="soft", top=2, temperature=2.0),
]


@pytest.mark.parametrize("target", FORMS, ids=lambda target: target.form)
def test_the_adversary(case, target):
    words = word_ids(case.original.tokenizer, CONCEPT)
    pi = torch.tensor(case.pi).double().requires_grad_(True)
    both, at, kept = (case.original, case.current), in_torch(case.at), in_torch(case.kept)
    wanted = torch_age.adversary(*both, words, by_torch(case, pi, target), at, kept, WEIGHT)
    (slope,) = torch.autograd.grad(wanted, pi)

    @jax.jit
    def adversary(frozen, net, at, kept, pi, gumbel):
        args = frozen.net, net, at, kept, frozen.concept_emb, frozen.candidates[:1]
        return step.adversary(*args, pi, gumbel, WEIGHT, target, False)

    found, gradient = adversary(case.frozen, case.net, ours(case.at), ours(case.kept), case.pi[None], case.gumbel[None])
    assert apart(found, wanted.item()) < 1e-4 and apart(gradient[0], slope) < 1e-3
    assert slope.abs().max() > 0


def test_the_step(case):
    """Both losses, and the gradient of their sum by every trained tensor."""
    target = FORMS[1]
    words, at, kept = word_ids(case.original.tokenizer, CONCEPT), in_torch(case.at), in_torch(case.kept)
    c_t = by_torch(case, torch.tensor(case.pi).double(), target)
    L_e, L_p = torch_age.losses(case.original, case.current, words, c_t, at, kept, ETA)
    parameters = dict(case.current.unet.named_parameters())
    slopes = torch.autograd.grad(L_e + WEIGHT * L_p, [parameters[torch_key(path)] for path in case.trained])

    @partial(jax.jit, static_argnums=6)
    def stepped(frozen, net, at, kept, pi, gumbel, trainable_set):
        c_t = step.mixed(frozen.candidates[:1], step.mixture(pi, gumbel, target))
        wanted = step.goals(frozen.net, at, kept, frozen.concept_emb, c_t, ETA)
        return step.gradients_of(net, at, kept, frozen.concept_emb, c_t, wanted, WEIGHT, trainable_set, False)

    losses, gradients = stepped(
        case.frozen, case.net, ours(case.at), ours(case.kept), case.pi[None], case.gumbel[None], "xattn"
    )
    assert apart(losses["L_e"], L_e.item()) < 1e-4 and apart(losses["L_p"], L_p.item()) < 1e-4
    gradients = groups.unstack(gradients, trainable.select(case.net.unet, "xattn"))
    whole = np.sqrt(sum(float(g.norm()) ** 2 for g in slopes))
    assert whole > 0 and L_p.item() > 0
    for path, wanted in zip(case.trained, slopes):
        difference = np.linalg.norm(to_torch(path, np.asarray(gradients[path])) - wanted.numpy())
        assert difference <= 1e-3 * wanted.norm().item() + 1e-6 * whole, path
