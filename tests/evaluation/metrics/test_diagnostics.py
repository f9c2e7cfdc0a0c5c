"""d0, d1, d2 against PyTorch diffusers, and what must be nothing."""

import numpy as np
import pytest

import aegis_jax
from aegis_jax.diffusion.conditioning import encode
from aegis_jax.diffusion.sample import latent_shape, noise_of
from aegis_jax.errors import AegisError
from aegis_jax.evaluation.metrics.diagnostics import distances
from tests.tiny import FEWEST, responsive

STEPS, GUIDANCE, N = 4, 3.0, 2


@pytest.fixture(scope="module")
def models(tiny):
    return [responsive(aegis_jax.load_pipeline(tiny(seed=seed, **FEWEST))) for seed in (0, 1)]


def by_torch(folder, erased_folder, concept, word, adversarial, start, at):
    """The three distances from a diffusers pipeline's own latents and two UNets."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    def opened(folder):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            for name, parameter in pipe.unet.named_parameters():
                if ".attn2.to_v." in name:  # as `responsive`
                    parameter *= 30
        return pipe

    original, erased = opened(folder), opened(erased_folder)
    kept = [torch.from_numpy(np.array(start.transpose(0, 3, 1, 2)))]

    def keep(pipe, step, t, values):
        kept.append(values["latents"])
        return values

    original(
        [word] * N, latents=kept[0], num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
        callback_on_step_end=keep,
    )  # fmt: skip
    z, t = kept[at % STEPS], original.scheduler.timesteps[at]

    def predicted(pipe, text):
        with torch.no_grad():
            embedding = pipe.encode_prompt([text] * N, "cpu", 1, False)[0]
            return pipe.unet(z, t, embedding).sample

    def apart(a, b):
        return (a - b).double().square().mean((1, 2, 3)).sqrt().mean().item()

    before, after = predicted(original, word), predicted(erased, word)
    return int(t), {
        "d0": apart(before, predicted(original, concept)),
        "d1": apart(before, after),
        "d2": apart(after, predicted(erased, adversarial)),
    }


@pytest.mark.parametrize("at", [-1, 0])
def test_as_in_pytorch(tiny, models, at):
    folders = [tiny(seed=seed, **FEWEST) for seed in (0, 1)]
    start = np.asarray(noise_of([5] * N, latent_shape(models[0]), np.arange(N, dtype=np.int32)))
    t, wanted = by_torch(*folders, "star", "a red circle", "the dog star", start, at)
    found = distances(
        *models, "star", ["a red circle", "sky"], adversarial={"a red circle": "the dog star"}, n=N, seed=5,
        steps=STEPS, guidance=GUIDANCE, at=at,
    )  # fmt: skip
    assert (found["t"], found["n"]) == (t, N)
    for name, value in wanted.items():
        assert value > 0.01
        np.testing.assert_allclose(found["words"]["a red circle"][name], value, rtol=1e-3)
    assert found["words"]["sky"]["d2"] is None


def test_what_must_be_nothing(models):
    original = models[0]
    found = distances(
        original, original, "star", ["star", "sky"], adversarial={"sky": encode(original, "sky")}, n=N,
        steps=STEPS, guidance=GUIDANCE,
    )["words"]  # fmt: skip
    assert found["star"]["d0"] == found["star"]["d1"] == found["sky"]["d1"] == found["sky"]["d2"] == 0
    assert found["sky"]["d0"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adversarial": {"dog": "cat"}}, r"adversarial has \['dog'\] besides"),
        ({"words": []}, "0 words"),
        ({"at": 4}, "at=4 is none of 4"),
        ({"n": 0}, "0 latents"),
        ({"words": "sky", "n": 0}, "diagnostics of 1 words"),
    ],
)
def test_bad_input(models, change, said):
    words = change.pop("words", ["sky"])
    with pytest.raises(AegisError, match=said):
        distances(*models, "star", words, **({"n": N, "steps": STEPS} | change))
