"""The closed forms on a pipeline's own weights against their float64 NumPy transcription (numpy_closed.py).

The reference reads the weights and encodes the texts with PyTorch, in float64, from the same folder.
"""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import aegis_jax  # noqa: E402
from aegis_jax.erasure.closed import speed  # noqa: E402
from aegis_jax.erasure.presets import preset  # noqa: E402
from aegis_jax.models.model import flatten  # noqa: E402
from tests.parity import numpy_closed  # noqa: E402
from tests.tiny import FEWEST  # noqa: E402

CONCEPTS, GUIDES, PRESERVED = ["red star", "heart"], ("a photo", ""), ("blue circle", "a green square in the sky")
BOUND = 1e-4  # largest error over the largest change: the text encoder runs in float32 on our side


class Reference:
    """The folder as PyTorch has it, in float64."""

    def __init__(self, folder):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
        self.tokenizer, self.encoder = pipe.tokenizer, pipe.text_encoder.double()
        state = {key: x.double().numpy() for key, x in pipe.unet.state_dict().items()}
        self.weights = {key: x for key, x in state.items() if "attn2.to_k" in key or "attn2.to_v" in key}

    def columns(self, text, tokens):
        """The text's embedding (d, n): its last token, from that on, or all."""
        given = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = self.encoder(given.input_ids)[0][0].numpy().T
        last = len(self.tokenizer(text).input_ids) - 2  # BOS stands before it, EOS behind
        return {"last": found[:, last : last + 1], "from_last": found[:, last:], "all": found}[tokens]

    def pairs(self, tokens):
        both = [(self.columns(c, tokens), self.columns(g, tokens)) for c, g in zip(CONCEPTS, GUIDES)]
        return [(c[:, : g.shape[1]], g[:, : c.shape[1]]) for c, g in both]


@pytest.fixture(scope="module", params=[False, True], ids=["as SD 1.4", "as SD 2.1"])
def sides(request, tiny):
    """(our pipeline, the reference)."""
    folder = tiny(v_prediction=request.param, **FEWEST)
    return aegis_jax.load_pipeline(folder), Reference(folder)


def erased(pipeline, config):
    """({PyTorch key: W*}, metrics) of ours: the original's matrices, the drift added."""
    method = preset(config.method).method
    state, frozen = method.start(pipeline, CONCEPTS, config, None)
    state, metrics = method.step(state, frozen, config)
    before = flatten(pipeline.unet.params)
    moved = method.drift(pipeline, state, config)["unet"]
    keys = dict(zip(moved, method.tensors(pipeline, config), strict=True))
    return {keys[path]: np.asarray(before[path], np.float64).T + np.asarray(d).T for path, d in moved.items()}, metrics


def agree(found, wanted, before):
    assert found.keys() == wanted.keys()
    for key, w in wanted.items():
        change = np.abs(w - before[key]).max()
        assert change > 1e-3, f"{key} was to change"
        assert np.abs(found[key] - w).max() < BOUND * change, key


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preserve": PRESERVED, "preserve_scale": 0.7, "erase_scale": 2.0, "lamb": 0.1},
        {"tokens": "from_last", "preserve": ("", *PRESERVED), "preserve_tokens": "all", "preserve_scale": 0.1},
        {"tokens": "all", "projections": "k"},
    ],
    ids=["as published", "preserving", "as first published", "all tokens, keys"],
)
def test_uce(sides, changes):
    ours, theirs = sides
    config = dataclasses.replace(preset("uce").settings, guide=GUIDES, **changes)
    found, metrics = erased(ours, config)
    chosen = {key: w for key, w in theirs.weights.items() if key.removesuffix(".weight")[-1] in config.projections}
    pairs, held = theirs.pairs(config.tokens), [theirs.columns(t, config.preserve_tokens) for t in config.preserve]
    scales = {key: getattr(config, key) for key in ("erase_scale", "preserve_scale", "lamb")}
    wanted = {key: numpy_closed.uce(w, [(c, w @ g) for c, g in pairs], held, **scales) for key, w in chosen.items()}
    agree(found, wanted, theirs.weights)
    square = lambda after: np.mean([  # noqa: E731
        np.mean(np.concatenate([after(key) @ c - w @ g for c, g in pairs], axis=1) ** 2) for key, w in chosen.items()
    ])  # fmt: skip
    assert float(metrics["L_e"]) == pytest.approx(square(wanted.get), rel=1e-3)
    assert float(metrics["L_e_before"]) == pytest.approx(square(chosen.get), rel=1e-3)
    assert ("L_p" in metrics) == bool(held)


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_rece(sides, epochs):
    ours, theirs = sides
    config = dataclasses.replace(preset("rece").settings, guide=GUIDES, preserve=PRESERVED, epochs=epochs)
    held = [theirs.columns(text, "all") for text in PRESERVED]
    scales = {key: getattr(config, key) for key in ("erase_scale", "preserve_scale", "lamb", "regular_scale")}
    before = list(theirs.weights.values())
    after = numpy_closed.rece(before, theirs.pairs("from_last"), theirs.pairs("all"), held, epochs=epochs, **scales)
    agree(erased(ours, config)[0], dict(zip(theirs.weights, after)), theirs.weights)


@pytest.mark.parametrize("aug_num", [0, 4])
def test_speed(sides, aug_num):
    ours, theirs = sides
    texts = (*PRESERVED, "dog", "cat on sky", "plain church")
    kept = np.concatenate([theirs.columns(text, "last") for text in texts], axis=1)
    config = preset("speed").settings
    config = dataclasses.replace(config, guide=GUIDES, preserve=texts, aug_num=aug_num, lamb=0.01, threshold=1e-3)
    invariant = speed.invariants(theirs.columns("", "all").T).T
    scalars = np.random.default_rng(config.seed).standard_normal((aug_num, len(texts)))
    wanted = {}
    for key, w in theirs.weights.items():
        if "to_v" in key:
            weakest = np.linalg.svd(w.T, full_matrices=False)[0][:, -1]  # its sign is the decomposition's own
            noise = scalars[:, None, :] * weakest[:, None] if aug_num else None
            how = {"threshold": config.threshold, "retain_scale": config.retain_scale, "lamb": config.lamb}
            wanted[key] = numpy_closed.speed(w, theirs.pairs("last"), kept, invariant, noise=noise, **how)
    agree(erased(ours, config)[0], wanted, theirs.weights)


@pytest.mark.parametrize("erase_scale", [0.0, 0.3, 20.0])
def test_oce(sides, erase_scale):
    """erase_scale 0: nothing is turned; 20: erased directions are turned around."""
    ours, theirs = sides
    guide, preserve = GUIDES, PRESERVED
    config = dataclasses.replace(
        preset("oce").settings, guide=guide, preserve=preserve, erase_scale=erase_scale, generic_words=7
    )
    words = np.random.default_rng(config.seed).permutation(ours.tokenizer.word_ids)[:7]
    ends = theirs.tokenizer.bos_token_id, theirs.tokenizer.eos_token_id
    with torch.no_grad():  # causal: padding behind them does not reach them
        embedded = theirs.encoder(torch.tensor([[ends[0], int(word), ends[1]] for word in words]))[0].numpy()
    moment = np.mean([x.T @ x / 3 for x in embedded], axis=0)
    held = [theirs.columns(text, "last") for text in preserve]
    scales = {key: getattr(config, key) for key in ("erase_scale", "preserve_scale", "generic_scale", "lamb")}
    found, _ = erased(ours, config)
    for key, w in found.items():
        before = theirs.weights[key]
        np.testing.assert_allclose(w.T @ w, before.T @ before, atol=1e-5)  # norms and angles are kept
        if not erase_scale:
            np.testing.assert_allclose(w, before, atol=1e-5)
    if erase_scale:
        wanted = {
            key: numpy_closed.oce(theirs.weights[key], theirs.pairs("last"), held, moment, **scales) for key in found
        }
        agree(found, wanted, theirs.weights)
