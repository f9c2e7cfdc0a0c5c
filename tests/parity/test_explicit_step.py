"""`explicit_step` against the float64 PyTorch transcription of the method (torch_aegis.py).

A sign step may differ between float32 and float64 where the gradient is nearly 0. So v and p are compared in direction
where the gradient is not small, and the reference computes what follows from our v and p.
"""

import dataclasses
import functools
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

import aegis_jax  # noqa: E402
from aegis_jax.erasure.step import explicit_step  # noqa: E402
from aegis_jax.errors import AegisError  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402
from tests.tiny import tiny_pipeline  # noqa: E402

BETA, GAMMA = 3e-3, 7e-3
LOSS_TOLERANCE = 1e-4  # relative
GRADIENT_TOLERANCE = 1e-3  # relative, in each tensor's norm
FLOOR = 1e-6  # of the norm of the whole gradient: what float32 leaves of a tensor whose gradient is 0


@dataclasses.dataclass(frozen=True)
class Case:
    """Cases that share model, B, m' and k share their compiled programs: vary the rest first."""

    name: str
    model: str
    concept: str
    batch: int
    aet_tokens: int
    prefix_tokens: int
    omega: float
    eta: float = 1.0
    current_weight: float = 1.0
    same: bool = False  # current == original


# The fewest layers that still have cross-attention, to compile in little time; the models have their own parity tests.
SMALL = {"block_out_channels": (16,), "norm_num_groups": 8, "attention_head_dim": 2}
MODELS = {
    "epsilon": {
        "unet": {
            **SMALL,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
        },
        "text": {"num_hidden_layers": 1},
    },
    "v": {
        "v_prediction": True,
        "unet": {
            **SMALL,
            "down_block_types": ("DownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        },
    },
    "two levels": {},
}
CASES = [
    Case("one of each", "epsilon", "star", 1, 1, 1, omega=0.5),
    Case("no rectification", "epsilon", "star", 1, 1, 1, omega=0.0, eta=2.5),
    Case("word in pieces", "epsilon", "zebra, red!", 1, 1, 1, omega=0.25, current_weight=0.5),
    Case("current is the original", "epsilon", "church", 1, 1, 1, omega=1.0, same=True),
    Case("first AET term repels", "epsilon", "dog", 1, 1, 1, omega=1.0, current_weight=-1.0),
    Case("v-prediction", "v", "a red heart", 3, 2, 3, omega=0.5, eta=3.0),
    Case("v, first AET term repels", "v", "cat", 3, 2, 3, omega=1.0, current_weight=-1.0),
    Case("v, current is the original", "v", "square", 3, 2, 3, omega=0.5, same=True),
    pytest.param(
        Case("two levels", "two levels", "blue square", 3, 1, 3, omega=1.0, eta=2.0),
        marks=pytest.mark.slow,
    ),
]


def perturb(folder, destination, seed=1, size=0.05):
    """Copies a pipeline and adds noise to every tensor of its UNet."""
    shutil.copytree(folder, destination)
    path = destination / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    moved = {
        key: weight + size * (weight.std(correction=0) + 0.1) * torch.randn(weight.shape, generator=generator)
        for key, weight in load_file(path).items()
    }
    save_file(moved, path, {"format": "pt"})
    return destination


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """pipelines(model) -> ((original, current) in PyTorch, (original, current) in JAX)"""
    root = tmp_path_factory.mktemp("explicit")

    @functools.cache
    def load(model):
        original = tiny_pipeline(root / model, seed=3, **MODELS[model])
        folders = (original, perturb(original, root / f"{model}_current"))
        return (
            tuple(torch_aegis.load(folder) for folder in folders),
            tuple(aegis_jax.load_pipeline(folder) for folder in folders),
        )

    return load


def inputs_of(case):
    rng = np.random.default_rng(len(case.name))
    return {
        "z_t": rng.normal(size=(case.batch, 8, 6, 4)).astype(np.float32),
        "t": np.array([617, 0, 999], np.int32)[: case.batch],
        "v": (0.05 * rng.normal(size=(case.aet_tokens, 32))).astype(np.float32),
        "p": (0.05 * rng.normal(size=(case.prefix_tokens, 32))).astype(np.float32),
    }


def check_sign_step(before, after, gradient, size):
    """Every coordinate moved by 0 or +-size, against the gradient wherever that is not nearly 0."""
    moved = np.asarray(after, np.float64) - before
    rounding = 2e-7 * (np.abs(before) + size)
    still, full = np.abs(moved) <= rounding, np.abs(np.abs(moved) - size) <= rounding
    assert after.shape == before.shape
    assert np.all(still | full)
    gradient = gradient.numpy()
    clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
    assert clear.mean() > 0.9  # otherwise this would assert nothing
    np.testing.assert_array_equal(np.sign(np.where(full, moved, 0))[clear], -np.sign(gradient[clear]))


def check_tensors(ours, reference, scale):
    """Every tensor of a gradient tree, in PyTorch layout, within GRADIENT_TOLERANCE of the reference's norm."""
    assert set(ours) == set(reference)
    for key, wanted in reference.items():
        wanted = wanted.numpy()
        assert ours[key].shape == wanted.shape, key
        error = np.linalg.norm(np.asarray(ours[key], np.float64) - wanted)
        assert error <= GRADIENT_TOLERANCE * np.linalg.norm(wanted) + FLOOR * scale, (key, error)


def check_rectification(ours, reference, omega, scale):
    """lambda and cosine per tensor, each as well as its inner product is determined in float32."""
    assert set(ours["lambdas"]) == set(ours["cosines"]) == set(reference["lambdas"])
    for key, g_e in reference["grads"].items():
        size_e, size_r = g_e.norm().item(), reference["drift"][key].norm().item()
        strength, cosine = float(ours["lambdas"][key]), float(ours["cosines"][key])
        g_r = reference["drift"][key].numpy()
        wanted = np.asarray(ours["grads"][key], np.float64) + strength * g_r
        error = np.abs(np.asarray(ours["rectified"][key], np.float64) - wanted).max()
        assert error <= 1e-5 * (np.abs(wanted).max() + strength * np.abs(g_r).max()), key
        if strength == 0:
            np.testing.assert_array_equal(ours["rectified"][key], ours["grads"][key], err_msg=key)
        if size_r == 0:
            assert strength == 0 and cosine == 0, key
            continue
        allowed = 1e-4 + 10 * FLOOR * scale / size_e
        assert abs(cosine - reference["cosines"][key]) <= allowed, key
        bound = max(omega, 1e-12) * allowed * size_e / size_r
        assert abs(strength - reference["lambdas"][key]) <= bound, key


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_transcription(pipelines, case):
    (original, current), (ours_original, ours_current) = pipelines(case.model)
    if case.same:
        current, ours_current = original, ours_original
    given = inputs_of(case)
    ours = explicit_step(
        ours_original,
        ours_current,
        case.concept,
        **given,
        omega=case.omega,
        eta=case.eta,
        beta=BETA,
        gamma=GAMMA,
        current_weight=case.current_weight,
    )
    inputs = torch_aegis.prepare(original, current, case.concept, given["z_t"], given["t"])
    loss_aet, grad_v, _ = torch_aegis.sign_step(
        lambda v: torch_aegis.aet_loss(inputs, v, case.current_weight), given["v"], BETA
    )
    loss_adv, grad_p, _ = torch_aegis.sign_step(lambda p: torch_aegis.adversarial_loss(inputs, p), given["p"], GAMMA)
    # The difference of two close numbers (weight -1) is known as well as the numbers are.
    cancelled = 1e-6 if case.current_weight < 0 else 0.0
    np.testing.assert_allclose(float(ours["L_aet"]), loss_aet, LOSS_TOLERANCE, cancelled)
    np.testing.assert_allclose(float(ours["L_adv"]), loss_adv, LOSS_TOLERANCE)
    check_sign_step(given["v"], ours["v"], grad_v, BETA)
    check_sign_step(given["p"], ours["p"], grad_p, GAMMA)

    reference = torch_aegis.erasure_gradients(inputs, ours["v"], ours["p"], case.eta, case.omega)
    np.testing.assert_allclose(float(ours["L_e"]), reference["L_e"], LOSS_TOLERANCE)
    scale = float(np.sqrt(sum(g.square().sum().item() for g in reference["grads"].values())))
    check_tensors(ours["grads"], reference["grads"], scale)
    check_tensors(ours["rectified"], reference["rectified"], scale)
    check_rectification(ours, reference, case.omega, scale)
    conflicts = np.mean([cosine < 0 for cosine in reference["cosines"].values()])
    assert conflicts == 0 if case.same else 0.2 < conflicts < 0.8  # both branches are exercised


def test_refuses_a_concept_that_does_not_fit(pipelines):
    _, (original, current) = pipelines("epsilon")
    given = inputs_of(CASES[0])
    with pytest.raises(AegisError):
        explicit_step(original, current, "star " * 75, **given, omega=1.0, eta=1.0, beta=BETA, gamma=GAMMA)


# --- the reference itself -------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["epsilon", "v"])
def test_reference_text_encoder(pipelines, model):
    """The spelled-out encoder is transformers' own; soft tokens that are words make the prompt of those words."""
    (original, _), _ = pipelines(model)
    text = original.tokenizer(["a red star", "", "church"], padding="max_length", return_tensors="pt")
    wanted = original.text_encoder(text.input_ids).last_hidden_state
    ours = torch_aegis.encode(original.text_encoder, torch_aegis.embed(original.text_encoder, text.input_ids))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    soft = torch_aegis.embed(original.text_encoder, torch_aegis.word_ids(original.tokenizer, "a red"))
    star = torch_aegis.word_ids(original.tokenizer, "star")
    ours = torch_aegis.prompt_embedding(original, soft, star)
    torch.testing.assert_close(ours, wanted[:1], rtol=0, atol=1e-12)


def test_reference_gradients_by_finite_differences(pipelines):
    """Directional derivatives of J, A and L_e against central differences, in float64."""
    (original, current), _ = pipelines("v")
    given = inputs_of(CASES[5])
    inputs = torch_aegis.prepare(original, current, "red star", given["z_t"], given["t"])
    rng = np.random.default_rng(0)
    for loss_of, name in (
        (lambda v: torch_aegis.aet_loss(inputs, v, 0.5), "v"),
        (lambda p: torch_aegis.adversarial_loss(inputs, p), "p"),
    ):
        soft, way = torch.as_tensor(given[name]).double(), rng.normal(size=given[name].shape)
        way, small = torch.as_tensor(way), 1e-6
        _, grad, _ = torch_aegis.sign_step(loss_of, soft, BETA)
        slope = (loss_of(soft + small * way) - loss_of(soft - small * way)).item() / (2 * small)
        np.testing.assert_allclose((grad * way).sum().item(), slope, 1e-5)

    v, p = (torch.as_tensor(given[name]).double() for name in "vp")
    gradients = torch_aegis.erasure_gradients(inputs, v, p, 2.0, 1.0)["grads"]
    way = {key: torch.as_tensor(rng.normal(size=g.shape)) for key, g in gradients.items()}
    slope, small = 0.0, 1e-6
    for sign in (1, -1):
        shifted = {
            key: weight.detach() + sign * small * way[key] for key, weight in inputs.current.unet.named_parameters()
        }
        unet = lambda *args, shifted=shifted: torch.func.functional_call(  # noqa: E731
            inputs.current.unet, shifted, args
        )
        moved = dataclasses.replace(inputs, current=dataclasses.replace(inputs.current, unet=unet))
        slope += sign * torch_aegis.erasure_loss(moved, v, p, 2.0).item() / (2 * small)
    analytic = sum((gradients[key] * way[key]).sum().item() for key in way)
    np.testing.assert_allclose(analytic, slope, 1e-5)
