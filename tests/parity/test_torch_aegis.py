"""The reference itself: its text encoder against transformers, its gradients against finite differences, in float64."""

import dataclasses
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.parity import torch_aegis  # noqa: E402
from tests.parity.step_cases import case_of, loader, soft_and_latents  # noqa: E402


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return loader(tmp_path_factory.mktemp("explicit"))


@pytest.mark.parametrize("model", ["epsilon", "v"])
def test_text_encoder(pipelines, model):
    """The spelled-out encoder is transformers' own; soft tokens that are words make the prompt of those words."""
    original, _ = pipelines(model)
    text = original.tokenizer(["a red star", "", "church"], padding="max_length", return_tensors="pt")
    wanted = original.text_encoder(text.input_ids).last_hidden_state
    ours = torch_aegis.encode(original.text_encoder, torch_aegis.embed(original.text_encoder, text.input_ids))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    soft = torch_aegis.embed(original.text_encoder, torch_aegis.word_ids(original.tokenizer, "a red"))
    star = torch_aegis.word_ids(original.tokenizer, "star")
    ours = torch_aegis.prompt_embedding(original, soft, star)
    torch.testing.assert_close(ours, wanted[:1], rtol=0, atol=1e-12)


def test_gradients_by_finite_differences(pipelines):
    """Directional derivatives of J, A and L_e against central differences, in float64."""
    case = case_of("v-prediction")
    given = soft_and_latents(case)
    (original, _), (current, _) = pipelines(case.model), pipelines(case.model, case.current)
    inputs = torch_aegis.prepare(original, current, "red star", given["attack"], given["loss"])
    rng, small = np.random.default_rng(0), 1e-6
    for name, loss_of in (("v", torch_aegis.aet_loss), ("p", torch_aegis.adversarial_loss)):
        loss_of = functools.partial(loss_of, inputs)
        soft, way = torch.as_tensor(given[name]).double(), torch.as_tensor(rng.normal(size=given[name].shape))
        _, grad, _ = torch_aegis.sign_step(loss_of, soft, case.beta)
        slope = (loss_of(soft + small * way) - loss_of(soft - small * way)).item() / (2 * small)
        np.testing.assert_allclose((grad * way).sum().item(), slope, 1e-5)

    v, p = (torch.as_tensor(given[name]).double() for name in "vp")
    _, gradients = torch_aegis.erasure_gradients(inputs, v, p, 2.0)
    way = {key: torch.as_tensor(rng.normal(size=g.shape)) for key, g in gradients.items()}
    slope = 0.0
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
