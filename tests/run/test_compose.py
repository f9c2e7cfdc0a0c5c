"""`aegis compose`: what merging does to the concepts' texts, by PyTorch's text encoder, and what is said of it."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from aegis_jax import AegisError, load_pipeline
from aegis_jax.cli import main
from aegis_jax.erasure.trainable import select
from aegis_jax.io.delta import base_hashes
from aegis_jax.io.delta_write import write_drift
from aegis_jax.models.model import flatten
from aegis_jax.run.compose import Composed, compose
from aegis_jax.run.compose import text as table

KEY = ".attn2.to_k.weight"


def rows(base, text):
    """Of the text alone: its tokens and the end of the text."""
    ids = CLIPTokenizer.from_pretrained(base / "tokenizer")(text, return_tensors="pt", padding="max_length").input_ids
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    with torch.no_grad():
        states = encoder(ids).last_hidden_state[0].double().numpy()
    end = int((ids[0] == encoder.config.eos_token_id).nonzero()[0, 0])
    return states[1 : end + 1]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(base, folder of delta files): two that change keys and values, another that changes a convolution too."""
    base, folder = tiny(), tmp_path_factory.mktemp("compose")
    loaded = load_pipeline(base)
    hashes, every = base_hashes(loaded.source.folder), flatten(loaded.unet.params)
    for number, (name, concepts) in enumerate({"a": ["star"], "b": ["red heart"], "wide": ["moon"]}.items()):
        rng = np.random.default_rng(number)
        leaves = select(loaded.unet.params, "kv")
        leaves |= {"conv_in.kernel": every["conv_in.kernel"]} if name == "wide" else {}
        drift = {leaf: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for leaf, x in leaves.items()}
        about = {"concepts": json.dumps(concepts), "method": "esd"}
        path = folder / ("wide" if name == "wide" else "results") / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_drift(loaded, {"unet": drift}, path, card="# card", base="tiny", hashes=hashes, about=about)
    return base, folder


def run(made, *more):
    base, folder = made
    return main(["compose", *map(str, more), "--base", str(base)])


def changes(base, path):
    old = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    return {key: (x.astype(np.float64) - old[key]).T for key, x in load_file(path).items() if x.ndim == 2}


def test_each_concept_keeps_what_its_own_erasure_did(made, tmp_path, capsys):
    base, folder = made
    lost = {}
    for by in ("closed", "sum"):
        out = tmp_path / f"{by}.safetensors"
        assert run(made, folder, "--by", by, "--lamb", "1e-6", "--out", out) == 0
        told = capsys.readouterr().out
        merged = changes(base, out)
        for name, text in {"a": "star", "b": "red heart"}.items():
            own, x = changes(base, folder / f"results/{name}.safetensors"), rows(base, text)
            apart = sum(((x @ (merged[key] - own[key])) ** 2).sum() for key in own)
            lost[by, text] = np.sqrt(apart / sum(((x @ own[key]) ** 2).sum() for key in own))
            assert f"{text:9}  {lost[by, text]:.0%} off its own erasure at its own tokens" in told
        with safe_open(out, "np") as file:
            said = file.metadata()
        assert json.loads(said["concepts"]) == ["star", "red heart"] and said["method"] == f"compose {by}: esd"
        assert main(["apply", str(out), "--model", str(base), "--out", str(tmp_path / by)]) == 0
        assert '"star" and "red heart" erased' in (tmp_path / by / "README.md").read_text()
        capsys.readouterr()
    assert all(lost["closed", text] < lost["sum", text] for text in ("star", "red heart")), lost


def test_the_interference_says_what_each_does_to_the_other(made):
    base, folder = made
    loaded = load_pipeline(base)
    drifts = [
        {key.replace(".weight", ".kernel"): x.astype(np.float32) for key, x in changes(base, folder / name).items()}
        for name in ("results/a.safetensors", "results/b.safetensors")
    ]
    found = compose(loaded, drifts, [["star"], ["red heart"]], by="sum")
    x = [rows(base, text) for text in ("star", "red heart")]
    does = np.array([[np.sqrt(sum(((r @ d) ** 2).sum() for d in drift.values())) for r in x] for drift in drifts])
    np.testing.assert_allclose(found.interference, does / np.diagonal(does), 1e-4)
    for leaf in drifts[0]:
        np.testing.assert_allclose(found.drift[leaf], drifts[0][leaf] + drifts[1][leaf], atol=1e-6)
    # One alone, and nothing to preserve: what it did to its own tokens.
    assert compose(loaded, [drifts[0]], [["star"]], lamb=0.0).lost[0] < 1e-4
    with pytest.raises(AegisError, match="conv_in"):
        compose(loaded, [{"conv_in.kernel": np.zeros(1)}], [["moon"]])


@pytest.mark.parametrize("order", [("results/a", "wide/wide"), ("wide/wide", "results/a")])
def test_the_sum_keeps_what_only_one_of_them_changes(made, order, tmp_path):
    base, folder = made
    out = tmp_path / "out.safetensors"
    paths = [folder / f"{name}.safetensors" for name in order]
    assert run(made, *paths, "--by", "sum", "--out", out) == 0
    assert load_file(out).keys() == load_file(paths[0]).keys() | load_file(paths[1]).keys()
    wide = load_file(folder / "wide/wide.safetensors")["conv_in.weight"]
    np.testing.assert_allclose(load_file(out)["conv_in.weight"], wide, atol=1e-6)


def test_the_table_has_one_line_for_each_and_says_where_nothing_is_known():
    none = np.full((2, 2), np.nan)
    told = table(Composed({}, ["a\nstar", "moon"], none, np.array([np.nan, 0.5])))
    assert (
        told == "a star  changes no keys or values of its own tokens\nmoon    50% off its own erasure at its own tokens"
    )


def test_what_was_merged_before_is_not_merged_again(made, tmp_path, capsys):
    """By a folder, whatever it is called by; by its name it is."""
    base, folder = made
    mine = shutil.copytree(folder / "results", tmp_path / "my own")
    (tmp_path / "link").symlink_to(mine)
    out = mine / "all.safetensors"
    assert run(made, mine, "--by", "sum", "--out", out) == 0
    first = out.read_bytes()
    typed = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("apply "))
    assert main([*typed[1:-1], str(tmp_path / "applied")]) == 0
    assert run(made, tmp_path / "link", "--by", "sum", "--out", out, "--overwrite") == 0 and out.read_bytes() == first
    assert run(made, mine, out, "--by", "sum", "--out", out, "--overwrite") == 0 and out.read_bytes() != first


def test_bad_input_is_one_line(made, tmp_path, capsys):
    base, folder = made
    a, out, nameless = folder / "results/a.safetensors", tmp_path / "out.safetensors", tmp_path / "x.safetensors"
    deep = tmp_path / "deep.safetensors"
    with safe_open(a, "np") as file:
        said = {key: value for key, value in file.metadata().items() if key != "concepts"}
    save_file(load_file(a), nameless, metadata=said)
    save_file(load_file(a), deep, metadata=said | {"concepts": "[" * 100_000})
    for arguments, told in (
        ([a], "name two or more"),
        ([a, a], "name two or more"),
        ([tmp_path / "none", a], "does not exist"),
        ([folder / "results", folder / "wide"], "conv_in"),
        ([folder, "--by", "average"], "closed, null-space, sum"),
        ([folder, "--lamb", "-1"], "--lamb"),
        ([folder, "--seed", str(2**80)], "wanted 0 to 2**32 - 1"),
        ([folder, "--seed", "-1"], "wanted 0 to 2**32 - 1"),
        ([a, nameless], "does not say what it erases"),
        ([a, deep], "does not say what it erases"),
        ([a, base / "unet/diffusion_pytorch_model.safetensors"], "no delta file"),
    ):
        assert run(made, *arguments, "--out", out) == 2, told
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and told in err, err
    assert not out.exists()
    out.write_text("mine")
    assert run(made, folder, "--out", out, "--overwrite") == 2 and out.read_text() == "mine"
