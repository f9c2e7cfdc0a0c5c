"""LoRAs of delta files: against the singular value decomposition, and as diffusers adds them to the base."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from aegis_jax import AegisError, load_pipeline, write_delta
from aegis_jax.cli import main
from aegis_jax.io.delta import base_hashes
from aegis_jax.io.delta_write import write_drift
from aegis_jax.io.lora import low_rank, write_lora
from aegis_jax.models.model import flatten
from tests.io.written import unet_tensors


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.booleans())
def test_no_matrix_of_that_rank_is_nearer(seed, m, n, rank, singular):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((m, n))
    if singular:
        matrix[:, -1] = matrix[:, 0]
    down, up = low_rank(matrix, rank)
    assert down.shape == (rank, n) and up.shape == (m, rank)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(up @ down, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(up), np.linalg.norm(down), 1e-4)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(base, delta file): keys and values, the input projection (a convolution) and a bias are changed."""
    base, path = tiny(), tmp_path_factory.mktemp("lora") / "delta.safetensors"
    loaded, rng = load_pipeline(base), np.random.default_rng(0)
    wanted = (".attn2.to_k.kernel", ".attn2.to_v.kernel", "conv_in.kernel", "conv_out.kernel", "conv_out.bias")
    leaves = {leaf: x for leaf, x in flatten(loaded.unet.params).items() if leaf.endswith(wanted)}
    drift = {leaf: 0.01 * rng.standard_normal(x.shape).astype(np.float32) for leaf, x in leaves.items()}
    about = {"concepts": '["star"]', "method": "esd"}
    hashes = base_hashes(loaded.source.folder)
    write_drift(loaded, {"unet": drift}, path, card="# card", base="tiny", hashes=hashes, about=about)
    return base, path


def added_by_diffusers(base, lora) -> dict[str, np.ndarray]:
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return {key: x.numpy() for key, x in pipe.unet.state_dict().items()}


@pytest.mark.parametrize("names", ["peft", "kohya"])
@pytest.mark.parametrize("rank", [3, 32])
def test_diffusers_adds_what_is_nearest(made, tmp_path, names, rank, capsys):
    base, path = made
    out = tmp_path / "lora.safetensors"
    args = ["export", str(path), "--base", str(base), "--lora", str(rank), "--names", names, "--out", str(out)]
    assert main(args) == 0
    told = capsys.readouterr().out
    before, found = {k: x.numpy() for k, x in unet_tensors(base).items()}, added_by_diffusers(base, out)
    with safe_open(path, "np") as file:
        new, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    whole = lost = 0.0
    matrices = sum(x.ndim > 1 for x in new.values())
    assert f"({matrices} matrices of rank {rank};" in told and matrices < len(new)
    for key, old in before.items():
        change = (new[key].astype(np.float64) - old if key in new else np.zeros(old.shape)).reshape(len(old), -1)
        nearest = np.zeros_like(change)
        if old.ndim > 1:
            u, s, v = np.linalg.svd(change, full_matrices=False)
            nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose((found[key] - old).reshape(change.shape), nearest, atol=1e-6, err_msg=key)
        whole, lost = whole + (change**2).sum(), lost + ((change - nearest) ** 2).sum()
    assert f"{np.sqrt(lost / whole):.1%} of the change is lost" in told
    with safe_open(out, "np") as file:
        assert file.metadata()["concepts"] == said["concepts"]
        assert {x.dtype for x in (file.get_tensor(key) for key in file.keys())} == {np.dtype("float32")}


def test_a_zeros_sign_is_no_lora(tiny, tmp_path, capsys):
    paths = [shutil.copytree(tiny(), tmp_path / name) for name in ("base", "erased")]
    for folder, zero in zip(paths, (0.0, -0.0)):
        file = folder / "unet/diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["conv_in.weight"].flat[0] = zero
        save_file(tensors, file, metadata={"format": "pt"})
    base, delta, out = paths[0], tmp_path / "delta.safetensors", tmp_path / "out.safetensors"
    assert write_delta(paths[1], base, delta) == 1
    assert main(["export", str(delta), "--base", str(base), "--lora", "2", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing but the signs of zeros" in err and not out.exists()


def test_bad_input_is_one_line_and_nothing_is_replaced(made, tiny, tmp_path, capsys):
    base, path = made
    out, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    save_file({"x": np.zeros(2, np.float32)}, other)
    kept = other.read_bytes()
    for arguments, told in (
        ([path, "--lora", "0", "--out", out], "rank 0"),
        ([path, "--lora", str(10**12), "--out", out], "rank 1000000000000: wanted at most 32"),
        ([path, "--lora", "2", "--names", "lycoris", "--out", out], "peft, kohya"),
        ([path, "--lora", "2", "--out", other], "choose another file"),
        ([path, "--lora", "2", "--out", other, "--overwrite"], "no LoRA of aegis_jax"),
        ([path, "--lora", "2", "--out", tmp_path], "is a folder"),
        ([other, "--lora", "2", "--out", out], "no delta file"),
        ([tmp_path / "x.ckpt", "--lora", "2", "--out", out], "pickle"),
    ):
        assert main(["export", *map(str, arguments), "--base", str(base)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and told in err, err
    assert not out.exists() and other.read_bytes() == kept
    with pytest.raises(AegisError, match="same precision"):
        write_lora(path, tiny(dtype="float16"), out, rank=2)
