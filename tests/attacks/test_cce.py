"""Concept inversion on a tiny random pipeline: its steps against PyTorch in float64, and what it gives back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.attacks import attack
from aegis_jax.attacks.cce import _CCE, TEXTS, CCEConfig, Data, draw
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.result import PLACEHOLDER
from aegis_jax.diffusion.template import around
from aegis_jax.diffusion.vocabulary import embeddings
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from tests.tiny import FEWEST, responsive

torch = pytest.importorskip("torch")
STEPS = 4
HOW = {"method": "cce", "initial": "dog", "texts": "style", "steps": STEPS, "batch": 3, "restarts": 2}


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny(**FEWEST))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def found(pipeline, images):
    return attack(responsive(pipeline), "star", images=images, learning_rate=0.05, **HOW)


def drawn(pipeline, images):
    """What every step of both restarts took, drawn again from their keys: a list of (picture, text, t, noise)."""
    mirrored = np.concatenate([images, images[:, :, ::-1]])
    data = Data(encode_images(pipeline, mirrored), jnp.zeros((3, 77, 1)), None)
    base = jax.random.fold_in(jax.random.key(0), _CCE)
    keys = jax.vmap(lambda r: jax.random.fold_in(base, r))(jnp.arange(2))
    steps = (jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in range(STEPS))
    return data.z_0, [draw(now, data, 3, 1000) for now in steps]


def test_steps_match_pytorch_in_float64(tiny, pipeline, images, found):
    from tests.parity import torch_aegis as reference

    z_0, draws = drawn(pipeline, images)
    z_0 = torch.tensor(np.asarray(z_0), dtype=torch.float64)
    side = reference.load(tiny(**FEWEST))
    with torch.no_grad():
        for name, weight in side.unet.named_parameters():
            if ".attn2.to_v." in name:
                weight.mul_(30)
    words = [reference.word_ids(side.tokenizer, text.replace("{}", "")) for text in TEXTS["style"]]
    for restart in range(2):
        token = reference.embed(side.text_encoder, reference.word_ids(side.tokenizer, "dog")).clone()
        token.requires_grad_(True)
        optimiser = torch.optim.AdamW([token], lr=0.05, weight_decay=1e-2)
        for i, step in enumerate(draws):
            picture, text, t, noise = (np.asarray(x[restart]) for x in step)
            losses = []
            for p, x, one, n in zip(picture, text, t, noise):
                # The learnt token is the last of these texts.
                ids = [side.tokenizer.bos_token_id, *words[x]]
                tail = [side.tokenizer.eos_token_id]
                tail += [side.tokenizer.pad_token_id] * (77 - len(ids) - 2)
                row = [reference.embed(side.text_encoder, ids), token, reference.embed(side.text_encoder, tail)]
                n, a = torch.tensor(n, dtype=torch.float64), side.alphas_cumprod[int(one)]
                z_t = (a.sqrt() * z_0[int(p)] + (1 - a).sqrt() * n)[None]
                eps = reference.predict_noise(
                    side, z_t, torch.tensor([int(one)]), reference.encode(side.text_encoder, torch.cat(row)[None])
                )
                losses.append((eps - n).square().mean())
            loss = torch.stack(losses).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            np.testing.assert_allclose(found.losses[i, restart], loss.item(), rtol=2e-4)
        np.testing.assert_allclose(found.soft_tokens[restart], token.detach(), atol=2e-3)
        start = embeddings(pipeline, pipeline.tokenizer.tokens("dog"))
        assert np.abs(found.soft_tokens[restart] - start).max() > 0.05  # it did move


def test_pictures_and_their_mirror_images_have_their_turn(pipeline, images):
    z_0, draws = drawn(pipeline, images)
    assert len(z_0) == 6
    seen = np.concatenate([np.ravel(step[0]) for step in draws])
    assert seen.max() > 2 and seen.min() < 3 and len(set(np.ravel(draws[0][2]))) > 3


def test_what_is_found_is_one_token_in_a_text(pipeline, found):
    assert found.soft_tokens.shape[:2] == (2, 1) and found.losses.shape == (STEPS, 2)
    assert not np.allclose(found.soft_tokens[0], found.soft_tokens[1])
    assert found.prompts == [f"a painting in the style of {PLACEHOLDER}"] * 2
    assert found.conditioning.embedding.shape[:2] == (2, 77)
    assert found.unet_evaluations == pytest.approx(2 * STEPS * 3 * 2.08)
    template = around(pipeline.tokenizer, "a photo of {} in red", 2)
    assert template.slots.tolist()[:6] == [-1] * 4 + [0, 1] and template.slots.max() == 1


def test_the_published_settings():
    config = CCEConfig()
    assert (config.tokens, config.steps, config.batch, config.weight_decay) == (1, 5000, 16, 1e-2)
    assert config.learning_rate == pytest.approx(5e-3 * 16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "cce: steps=0"),
        ({"initial": "a dog"}, "initial='a dog' is not one token"),
        ({"texts": "scene"}, "texts='scene', wanted one of: object, style"),
        ({"tokens": 74}, "exceeds the 77 positions"),
    ],
)
def test_bad_input_is_named(pipeline, images, change, message):
    with pytest.raises(AegisError, match=message):
        attack(pipeline, "star", images=images, **(HOW | change))
