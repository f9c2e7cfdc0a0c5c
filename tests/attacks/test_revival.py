"""Revival on a tiny random pipeline: its steps against PyTorch in float64, what is asked when, what comes back."""

import jax
import numpy as np
import pytest

from aegis_jax.attacks import METHODS, attack
from aegis_jax.attacks.given import Given, Pictures
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.result import ATTACK, FAILED, NOT_NEEDED, SUCCEEDED
from aegis_jax.attacks.revival import RevivalConfig, Tuning, draw
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.model import flatten
from tests.tiny import FEWEST

torch = pytest.importorskip("torch")
PROMPTS = ["a red star", "star", "a star"]
CONFIG = {"looks": "1,2", "batch": 2, "learning_rate": 1e-3, "weight_decay": 0.1, "seed": 3}


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny(**FEWEST))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def without():
    return np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8), ["a dog", "a cat", "", "sky"]


def test_steps_match_pytorch_in_float64(tiny, pipeline, images, without):
    from tests.parity import torch_aegis as reference

    given = Given(images, PROMPTS, [0, 1, 2], without=Pictures(*without))
    tuning = Tuning(pipeline, given, RevivalConfig(**CONFIG))
    tuning.to(2)
    side = reference.load(tiny(**FEWEST))
    z_0 = torch.tensor(np.asarray(encode_images(pipeline, without[0])), dtype=torch.float64)
    texts = [reference.prompt_embedding(side, None, reference.word_ids(side.tokenizer, text)) for text in without[1]]
    optimiser = torch.optim.AdamW(side.unet.parameters(), lr=CONFIG["learning_rate"], weight_decay=0.1)
    first = {name: weight.detach().clone() for name, weight in side.unet.named_parameters()}
    for i in range(2):
        which, t, noise = draw(jax.random.fold_in(tuning.key, i), 4, 2, 1000, z_0.shape[1:])
        loss = 0
        for row in range(2):
            a, eps = (
                side.alphas_cumprod[int(t[row])],
                torch.tensor(np.asarray(noise[row : row + 1]), dtype=torch.float64),
            )
            z_t = a.sqrt() * z_0[int(which[row])][None] + (1 - a).sqrt() * eps
            said = reference.predict_noise(side, z_t, torch.tensor([int(t[row])]), texts[int(which[row])])
            loss = loss + (said - eps).square().mean() / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        np.testing.assert_allclose(tuning.losses[i], loss.item(), rtol=1e-4)
    ours = flatten(tuning.params)
    for name, ours_name in {"conv_in.weight": "conv_in.kernel", "conv_out.bias": "conv_out.bias"}.items():
        wanted = dict(side.unet.named_parameters())[name].detach()
        wanted = wanted.permute(2, 3, 1, 0) if wanted.ndim == 4 else wanted
        moved = (wanted - (first[name].permute(2, 3, 1, 0) if wanted.ndim == 4 else first[name])).abs()
        assert moved.max() > 1e-3
        # Adam's first step is a sign: where a gradient is all but 0, rounding decides it.
        assert np.mean(np.abs(np.asarray(ours[ours_name]) - wanted.numpy()) < 1e-5) > 0.98


def test_the_concept_is_asked_for_on_the_way(pipeline, images, without):
    answers, seen = iter([[True, False, False], [False, True, False], [True, False, True]]), []
    before = jax.tree.map(np.asarray, pipeline.unet.params)

    def judge(shown):
        seen.append(shown)
        return np.array(next(answers))

    how = {"images": images, "prompts": PROMPTS, "image_steps": 2, **CONFIG}
    found = attack(pipeline, "star", method="revival", without=without, judge=judge, **how)
    assert found.outcomes == [
        NOT_NEEDED,
        FAILED,
        SUCCEEDED,
    ]  # at the last look; what a look between shows is no success
    assert list(found.levels) == [ATTACK] and list(found.levels[ATTACK]) == ["0 steps", "1 steps", "2 steps"]
    assert found.levels[ATTACK]["1 steps"].tolist() == [False, True, False]
    assert not np.array_equal(seen[0], seen[2]) and np.array_equal(found.images, seen[2])
    assert found.unet_evaluations == 2 * 2 * 3 + 3 * 3 * 2 * 2
    jax.tree.map(np.testing.assert_array_equal, before, pipeline.unet.params)  # the model under attack stays
    again = attack(found.pipeline, "star", method="revival", without=without, judge=lambda x: x[:, 0, 0, 0] < 0, **how)
    assert not any(shown.any() for shown in again.levels[ATTACK].values())
    assert again.losses.shape == (2, 1) and np.isfinite(again.losses).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"without": None}, "needs pictures without the concept"),
        ({"looks": "50,20"}, "looks='50,20', wanted ascending numbers"),
        ({"looks": "0,20"}, "looks='0,20'"),
        ({"looks": "1.5"}, "looks='1.5'"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_bad_input_is_named(pipeline, images, without, change, message):
    with pytest.raises(AegisError, match=message):
        attack(pipeline, "star", method="revival", images=images, **({"without": without} | change))


def test_it_never_trains_on_a_diverged_model(pipeline, images, without):
    with pytest.raises(AegisError, match="not finite.*lower learning_rate"):
        attack(pipeline, "star", method="revival", images=images, without=without, **CONFIG | {"learning_rate": 1e30})


def test_defaults():
    config = METHODS["revival"].config()
    assert (config.looks, config.batch, config.learning_rate) == ("50,100,200,500", 4, 1e-5)
    assert config.weight_decay == 1e-2
