"""STEREO's losses and gradients against their float64 PyTorch transcription (torch_stereo.py)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from aegis_jax.erasure import groups, networks, trainable  # noqa: E402
from aegis_jax.erasure.latents import Noised  # noqa: E402
from aegis_jax.erasure.stereo import step  # noqa: E402
from aegis_jax.erasure.stereo.config import TEXTS, InversionConfig, LatentsConfig, OnceConfig, StereoConfig  # noqa: E402
from aegis_jax.erasure.stereo.setup import setup  # noqa: E402
from aegis_jax.models.layout import to_torch, torch_key  # noqa: E402
from tests.parity import torch_stereo  # noqa: E402
from tests.parity.step_cases import loader  # noqa: E402
from tests.parity.torch_aegis import word_ids  # noqa: E402

SET, ETA, WEIGHTS = "xattn", 0.5, (1.0, 3.0)
ANCHOR = "a red {} in the sky"


@dataclasses.dataclass(frozen=True)
class Case:
    original: object  # theta0 in PyTorch
    current: object  # theta
    frozen: object  # theta0 here
    net: networks.Networks  # theta here
    at: tuple
    soft: np.ndarray  # two tokens of two vectors
    rng: np.random.Generator


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    load = loader(tmp_path_factory.mktemp("stereo"))
    (original, ours), (current, moved) = load("epsilon"), load("epsilon", "partly")
    config = StereoConfig(
        trainable=SET, compute_dtype="float32", inversion=InversionConfig(initial="dog", tokens=2, pictures=3),
        once=OnceConfig(anchors=(ANCHOR,)), latents=LatentsConfig(steps=3),
    )  # fmt: skip
    _, frozen = setup(ours, "star", config)
    rng = np.random.default_rng(5)
    net = networks.with_trained(frozen.net, SET, jax.tree.map(jnp.asarray, moved.unet.params))
    at = rng.normal(size=(2, 8, 6, 4)).astype(np.float32), np.array([617, 41], np.int32)
    return Case(original, current, frozen, net, at, (0.05 * rng.normal(size=(2, 2, 32))).astype(np.float32), rng)


def ids(case, text):
    return word_ids(case.original.tokenizer, text)


def tensor(x):
    return torch.tensor(np.asarray(x)).double()


def theirs(at):
    return tensor(at[0]), torch.tensor(at[1], dtype=torch.long)


def close(found, wanted, tolerance):
    return abs(float(found) - wanted.item()) <= tolerance * abs(wanted.item())


def same_gradients(case, loss, found):
    """Of every trained tensor."""
    parameters = dict(case.current.unet.named_parameters())
    like = trainable.select(case.net.unet, SET)
    wanted = torch.autograd.grad(loss, [parameters[torch_key(path)] for path in like])
    found = groups.unstack(found, like)
    whole = np.sqrt(sum(float(g.norm()) ** 2 for g in wanted))
    assert whole > 0
    for path, gradient in zip(like, wanted, strict=True):
        apart = np.linalg.norm(to_torch(path, np.asarray(found[path])) - gradient.numpy())
        assert apart <= 1e-3 * float(gradient.norm()) + 1e-6 * whole, path


_gradients = jax.jit(partial(step.gradients_of, trainable_set=SET, remat=False))


@pytest.mark.parametrize("number", [0, 1])
def test_the_search(case, number):
    """Of the concept in the first round, of the first token in the second."""
    prompt = [ids(case, "star"), tensor(case.soft[0])][number]
    wanted = torch_stereo.search_loss(case.current, case.original, prompt, theirs(case.at), ETA)
    at, frozen = Noised(*map(jnp.asarray, case.at)), case.frozen
    cond = step._rows(step.prompts(frozen.net, frozen.plain, frozen.template, case.soft), np.array([number]))
    losses, gradients = _gradients(case.net, at, cond, step.search_goal(frozen.net, at, cond, ETA))
    assert close(losses["L_e"], wanted, 1e-4)
    same_gradients(case, wanted, gradients)


def test_the_one_erasure(case):
    prompts = [ids(case, "star"), *map(tensor, case.soft)]
    anchor = ids(case, ANCHOR.replace("{}", "star"))
    wanted = torch_stereo.once_loss(case.current, case.original, prompts, 2, anchor, theirs(case.at), WEIGHTS)
    at, frozen = Noised(*map(jnp.asarray, case.at)), case.frozen
    conds = step.prompts(frozen.net, frozen.plain, frozen.template, case.soft)
    goal = step.once_goal(frozen.net, at, conds, frozen.anchors, np.array(WEIGHTS, np.float32))
    losses, gradients = _gradients(case.net, at, step._rows(conds, np.array([2])), goal)
    assert close(losses["L_e"], wanted, 1e-4)
    same_gradients(case, wanted, gradients)


def test_the_inversion(case):
    """A picture each of three, under texts with words around the token, and under none."""
    texts, chosen = ["{}", "a photo of a {}", "a photo of the {}"], [2, 0, 1]
    assert len(case.frozen.texts) == len(texts) and set(texts) < set(TEXTS["object"])  # what this tokenizer knows
    parts = [[ids(case, part) for part in texts[i].split("{}")] for i in chosen]
    t, noise = np.array([3, 990, 500], np.int32), case.rng.normal(size=case.frozen.z_0.shape).astype(np.float32)
    token = tensor(case.soft[1]).requires_grad_(True)
    given = tensor(case.frozen.z_0), torch.tensor(t, dtype=torch.long), tensor(noise)
    wanted = torch_stereo.inversion_loss(case.current, parts, token, *given)
    (gradient,) = torch.autograd.grad(wanted, token)
    drawn = np.arange(3), np.array(chosen), t, noise
    found = jax.jit(jax.value_and_grad(step.inversion_loss, argnums=2))(case.net, case.frozen, case.soft[1], drawn)
    assert close(found[0], wanted, 1e-4)
    gradient = gradient.numpy()
    assert np.linalg.norm(found[1] - gradient) <= 1e-3 * np.linalg.norm(gradient)
