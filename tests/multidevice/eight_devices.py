"""`erase_step` on a mesh of 8 virtual CPU devices equals one device. Run by test_erase_step.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import aegis_jax
from aegis_jax.erasure import rectify, step, trainable
from aegis_jax.erasure.config import AETConfig, EraseConfig, GRPConfig, LatentsConfig, PreserveConfig, PromptConfig
from aegis_jax.erasure.setup import setup
from aegis_jax.erasure.step import erase_step
from aegis_jax.errors import AegisError
from aegis_jax.parallel import mesh

CONFIG = EraseConfig(
    steps=1,  # so that kappa moves in the first step already, and pushes in the second
    batch=8,
    trainable="xattn",
    learning_rate=1e-3,
    aet=AETConfig(beta=2e-3),
    prompt=PromptConfig(gamma=5e-3, context=True, context_rate=0.1),
    grp=GRPConfig(omega=0.5),
    preserve=PreserveConfig(weight=2.0),
    latents=LatentsConfig(steps=4),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Two steps: state and metrics on the host after each, theta in the last, the placed arrays at start and end."""

    states: list
    metrics: list
    theta: dict
    start: tuple
    end: tuple


def drifted(state, placement):
    """The state with a random drift, so that GRP has something to retain."""
    rng = np.random.default_rng(5)
    drift = {name: jnp.asarray(0.05 * rng.normal(size=d.shape).astype(np.float32)) for name, d in state.drift.items()}
    return dataclasses.replace(state, drift=drift if placement is None else placement.place(drift))


def two_steps(pipeline, placement) -> Outcome:
    state, frozen = setup(pipeline, "red star", CONFIG, placement)
    state = drifted(state, placement)
    start = jax.tree.map(lambda x: (x.shape, x.sharding), (state, frozen))
    states, metrics, thetas, core = [], [], [], step._core

    def watched(frozen, theta, *rest):
        thetas.append(theta)
        return core(frozen, theta, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_core", watched)
        for _ in range(2):
            with jax.transfer_guard_host_to_device("disallow"):
                state, measured = erase_step(state, frozen, CONFIG)
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(measured))
    return Outcome(states, metrics, jax.tree.map(lambda x: x.sharding, thetas[-1]), start, state)


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


def test_theta_lies_where_theta0_does(outcomes, pipeline, placement):
    """Tensor by tensor, in the step and with every tensor trained."""
    _, frozen = outcomes[1].start
    compare(outcomes[1].theta, jax.tree.map(lambda x: x[1], frozen.unet, is_leaf=lambda x: isinstance(x, tuple)))
    config = dataclasses.replace(CONFIG, trainable="full")
    state, frozen = setup(pipeline, "red star", config, placement)
    state = drifted(state, placement)
    theta = trainable.add_drift(frozen.unet, state.drift, "full", placement=placement)
    compare(*(jax.tree.map(lambda x: x.sharding, tree) for tree in (theta, frozen.unet)))
    alone = trainable.add_drift(jax.device_get(frozen.unet), jax.device_get(state.drift), "full")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(theta), jax.device_get(alone))


def test_theta_does_not_inherit_the_split_of_a_stack(placement, monkeypatch):
    """Five tensors too small to split make a stack that is split along their own last dimension."""
    monkeypatch.setattr(mesh, "_SMALL", 256)
    unet = placement.place({"blocks": {i: {"kernel": np.ones((5, 12), np.float32)} for i in range(5)}})
    drift = placement.place(trainable.zero_drift(jax.device_get(unet), "full"))
    assert [list(d.sharding.spec) for d in drift.values()] == [[None, None, "fsdp"]]
    theta = trainable.add_drift(unet, drift, "full", placement=placement)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((unet, theta)))


def compare(ours, wanted):
    """Two trees of shardings are the same."""
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert a.is_equivalent_to(b, 4), (a, b)


@pytest.mark.parametrize(
    "grp", [GRPConfig(scope="tree", omega=0.5), GRPConfig(omega_per_tensor=True, omega=0.5)], ids=["tree", "per tensor"]
)
def test_scopes_of_grp_equal_one_device(outcomes, pipeline, placement, grp):
    """What is projected and how omega moves, from split stacks; the state starts where the rule says."""
    state, _ = setup(pipeline, "red star", dataclasses.replace(CONFIG, grp=grp), placement)
    for leaf in jax.tree.leaves(state.omega):
        assert leaf.sharding.is_equivalent_to(placement.sharding(leaf.shape), leaf.ndim)
    state = drifted(state, placement)
    rng = np.random.default_rng(6)
    draw = lambda: {name: rng.normal(size=d.shape).astype(np.float32) for name, d in state.drift.items()}  # noqa: E731
    old, new = draw(), draw()

    @jax.jit
    def both(old, new, drift, omega):
        previous = rectify.projection(old, drift, grp) | {"drift": drift}
        return rectify.retain(new, drift, omega, grp), rectify.next_omega(omega, new, drift, previous, grp)

    many = jax.device_get(both(placement.place(old), placement.place(new), state.drift, state.omega))
    one = jax.device_get(both(old, new, *jax.device_get((state.drift, state.omega))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), many, one)


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


def test_weights_lie_where_the_caller_wants_them():
    with jax.default_device(jax.devices()[5]):
        loaded = aegis_jax.load_pipeline("world")
    # Looked at without the setting: they were read by a thread to which it was passed on.
    assert {device for leaf in jax.tree.leaves(loaded.vae.params) for device in leaf.devices()} == {jax.devices()[5]}
