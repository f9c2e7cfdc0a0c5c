"""`erase_step` on a mesh of 8 virtual CPU devices equals one device. Run by test_erase_step.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import aegis_jax
from aegis_jax.erasure.config import AETConfig, EraseConfig, GRPConfig, LatentsConfig, PromptConfig
from aegis_jax.erasure.setup import setup
from aegis_jax.erasure.step import erase_step
from aegis_jax.errors import AegisError
from aegis_jax.parallel import mesh

CONFIG = EraseConfig(
    batch=8,
    trainable="xattn",
    learning_rate=1e-3,
    aet=AETConfig(beta=2e-3),
    prompt=PromptConfig(gamma=5e-3),
    grp=GRPConfig(omega=0.5),
    latents=LatentsConfig(steps=4),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Two steps: state and metrics on the host after each, and the placed arrays at the start and the end."""

    states: list
    metrics: list
    start: tuple
    end: tuple


def two_steps(pipeline, placement) -> Outcome:
    state, frozen = setup(pipeline, "red star", CONFIG, placement)
    rng = np.random.default_rng(5)  # a drift, so that GRP has something to retain
    drift = {name: jnp.asarray(0.05 * rng.normal(size=d.shape).astype(np.float32)) for name, d in state.drift.items()}
    drift = drift if placement is None else placement.place(drift)
    state = dataclasses.replace(state, drift=drift)
    start = jax.tree.map(lambda x: (x.shape, x.sharding), (state, frozen))
    states, metrics = [], []
    for _ in range(2):
        state, measured = erase_step(state, frozen, CONFIG)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(measured))
    return Outcome(states, metrics, start, state)


@pytest.fixture(scope="module")
def pipeline(tiny):
    folder = tiny(
        unet={
            "block_out_channels": (16,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "norm_num_groups": 8,
            "attention_head_dim": 2,
        },
        text={"num_hidden_layers": 1},
    )
    return aegis_jax.load_pipeline(folder)


@pytest.fixture(scope="module")
def placement():
    assert len(jax.devices()) == 8
    return mesh.make_placement(data=2, fsdp=4)


@pytest.fixture(scope="module")
def outcomes(pipeline, placement):
    patch = pytest.MonkeyPatch()
    patch.setattr(mesh, "_SMALL", 256)  # elements: so that tensors of this small UNet are split
    yield two_steps(pipeline, None), two_steps(pipeline, placement)
    patch.undo()


def test_first_step_equals_one_device(outcomes):
    one, many = (outcome.states[0] for outcome in outcomes)
    for name, metric in outcomes[0].metrics[0].items():
        np.testing.assert_allclose(outcomes[1].metrics[0][name], metric, 1e-4, 1e-6, err_msg=name)
    # Adam's mean is 0.1 g: the direction itself, before Adam divides small numbers by small numbers.
    for name, wanted in one.opt_state.mu.items():
        error = np.linalg.norm(many.opt_state.mu[name] - wanted)
        assert error <= 1e-4 * np.linalg.norm(wanted) + 1e-9, name
    for name, wanted in one.drift.items():
        moved = np.abs(many.drift[name] - wanted) > 1e-2 * CONFIG.learning_rate
        assert moved.mean() < 0.01, name
    for name in ("v", "p"):
        same = np.isclose(getattr(many, name), getattr(one, name), rtol=0, atol=1e-7)
        assert same.mean() > 0.9, name  # a sign step may turn where the gradient is nearly 0


def test_second_step_goes_on_from_there(outcomes):
    one, many = (outcome.metrics[1] for outcome in outcomes)
    np.testing.assert_allclose(many["L_e"], one["L_e"], 0.05)
    np.testing.assert_allclose(many["drift_norm"], one["drift_norm"], 1e-3)
    assert many["omega"] == one["omega"]
    assert outcomes[0].states[1].step == outcomes[1].states[1].step == 2


def test_arrays_lie_where_declared(outcomes, placement):
    """State and frozen weights by the rule by size, before and after the steps; some of each are truly split."""
    end = outcomes[1].end
    for tree in (end.drift, end.opt_state.mu, end.opt_state.nu):
        split = 0
        for name, leaf in tree.items():
            declared = placement.sharding(leaf.shape)
            assert leaf.sharding.is_equivalent_to(declared, leaf.ndim), (name, leaf.sharding)
            held = leaf.addressable_shards[0].data.size
            assert held == leaf.size // (4 if "fsdp" in declared.spec else 1)
            split += "fsdp" in declared.spec
        assert split >= 2
    _, frozen = outcomes[1].start
    placed = jax.tree.leaves(frozen.unet, is_leaf=lambda x: isinstance(x, tuple))
    assert all(isinstance(s, NamedSharding) for _, s in placed)
    assert all(s.is_equivalent_to(placement.sharding(shape), len(shape)) for shape, s in placed)
    assert sum("fsdp" in s.spec for _, s in placed) >= 10


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((8,), ()), ((512, 1024), (None, "fsdp")), ((3, 3, 320, 322), (None, None, "fsdp")), ((1023, 1023), ())],
)
def test_rule_by_size(placement, shape, spec):
    """The largest dimension that divides by 4 is split, if the tensor is large."""
    assert tuple(placement.sharding(shape).spec) == spec


def test_refuses_more_devices_than_there_are():
    with pytest.raises(AegisError, match="16 devices"):
        mesh.make_placement(data=4, fsdp=4)
    assert mesh.make_placement() is None
