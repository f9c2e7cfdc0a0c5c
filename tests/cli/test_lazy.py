"""`import aegis_jax` and `aegis --help` start no JAX; torch is never imported by the core."""

import subprocess
import sys

import pytest

import aegis_jax

HEAVY = ("jax", "flax", "optax", "orbax", "torch", "transformers", "numpy", "ml_collections", "PIL")


def loaded_after(code):
    """Which of HEAVY are in sys.modules after running `code` in a new process."""
    script = f"import sys\n{code}\nprint('loaded', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "code",
    [
        "import aegis_jax",
        "import aegis_jax.cli",
        "from aegis_jax import AegisError; import aegis_jax; dir(aegis_jax)",
        "from aegis_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from aegis_jax.cli import main\ntry: main(['erase', '--help'])\nexcept SystemExit: pass",
        "from aegis_jax.cli import main\ntry: main(['batch', '--help'])\nexcept SystemExit: pass",
        "from aegis_jax.cli import main\ntry: main(['erase', '--models', 'x'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy(code):
    assert loaded_after(code) == []


def test_erasing_and_sampling_need_no_torch():
    assert "torch" not in loaded_after("from aegis_jax import erase, sample, save_pipeline")


def test_every_public_name_is_there():
    for name in aegis_jax.__all__:
        assert getattr(aegis_jax, name) is not None
        assert name in dir(aegis_jax)
    for name in ("load_pipeline", "save_pipeline", "encode_text", "predict_noise", "decode"):
        assert callable(getattr(aegis_jax, name))
    assert callable(aegis_jax.sample) and callable(aegis_jax.erase)


def test_unknown_name():
    with pytest.raises(AttributeError, match="'aegis_jax' has no attribute 'eraze'"):
        aegis_jax.eraze  # noqa: B018
