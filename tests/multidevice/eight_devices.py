"""`erase_step` on a mesh of 8 virtual CPU devices equals one device. Run by test_erase_step.py."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import aegis_jax
from aegis_jax.erasure import latents, trainable
from aegis_jax.erasure.aegis import rectify
from aegis_jax.erasure.aegis.config import EraseConfig, GRPConfig, LatentsConfig, SoftConfig, WordsConfig
from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.aegis.state import Goal
from aegis_jax.erasure.aegis.step import erase_step, gradients_of, predicted
from aegis_jax.erasure.latents import Noised
from aegis_jax.errors import AegisError
from aegis_jax.models import model
from aegis_jax.models.unet import UNet2DConditionModel
from aegis_jax.parallel import mesh
from aegis_jax.plan import stable_diffusion
from tests.tiny import FEWEST

CONFIG = EraseConfig(
    steps=1,  # so that kappa moves in the first step already, and pushes in the second
    batch=8,
    trainable="xattn",
    learning_rate=1e-3,
    soft=SoftConfig(beta=2e-3, gamma=5e-3, life="run"),
    grp=GRPConfig(omega=0.5),
    words=WordsConfig(preserve=2.0, context="push"),
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
    states, metrics, thetas, add_drift = [], [], [], trainable.add_drift

    def watched(*args):
        thetas.append(add_drift(*args))
        return thetas[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainable, "add_drift", watched)
        for _ in range(2):
            with jax.transfer_guard_host_to_device("disallow"):
                state, measured = erase_step(state, frozen, CONFIG)
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(measured))
    return Outcome(states, metrics, jax.tree.map(lambda x: x.sharding, thetas[-1]), start, state)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return aegis_jax.load_pipeline(tiny(**FEWEST))


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
    told = outcomes[1].metrics[0]
    for name, metric in outcomes[0].metrics[0].items():
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, 1e-4, 1e-6, err_msg=name), told[name], metric
        )
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
    np.testing.assert_array_equal(many["per_tensor"]["omega"], one["per_tensor"]["omega"])
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


@pytest.mark.parametrize("rule", ["released", "total"])
def test_grp_equals_one_device(outcomes, pipeline, placement, rule):
    """What is projected and how omega moves, from split stacks; the state starts where the rule by size says."""
    grp = GRPConfig(rule=rule, omega=0.5)
    state, _ = setup(pipeline, "red star", dataclasses.replace(CONFIG, grp=grp), placement)
    for leaf in jax.tree.leaves((state.omega, state.conflict)):
        assert leaf.sharding.is_equivalent_to(placement.sharding(leaf.shape), leaf.ndim)
    state = drifted(state, placement)
    rng = np.random.default_rng(6)
    draw = lambda: {name: rng.normal(size=d.shape).astype(np.float32) for name, d in state.drift.items()}  # noqa: E731
    gradients, before = draw(), draw()
    retain = jax.jit(lambda *args: rectify.retain(*args, grp))
    many = retain(placement.place(gradients), state.drift, state.omega, placement.place(before))
    one = retain(gradients, *jax.device_get((state.drift, state.omega)), before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), *jax.device_get((many, one)))
    moved = jax.device_get(many[1].omega)
    assert {round(float(x), 3) for leaf in moved.values() for x in leaf} == {0.4, 0.6}


SMALL = {
    "steps": 2, "batch": 8, "trainable": "kv", "latents.steps": 4, "latents.refresh_every": 1, "picture.images": 0,
    "compute_dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize("method", [pytest.param("random-prefixes", marks=pytest.mark.slow), "paper"])
def test_an_erasure_over_eight_devices_is_that_of_one(pipeline, monkeypatch, method):
    """`aegis_jax.erase` with a mesh in its settings: the same metrics, the same weights."""
    monkeypatch.setattr(mesh, "_SMALL", 256)
    keys = {**SMALL, "method": method}
    one = aegis_jax.erase(pipeline, ["red star", "heart"], config=keys)
    many = aegis_jax.erase(pipeline, ["red star", "heart"], config={**keys, "mesh.data": 4, "mesh.fsdp": 2})
    assert len(one.metrics) == len(many.metrics) == 2
    for ours, theirs in zip(many.metrics, one.metrics, strict=True):
        assert ours.keys() == theirs.keys() and ours.pop("method") == theirs.pop("method") == method
        for name, value in theirs.items():
            least = 1e-5 if name == "mean_cosine" else 1e-8  # of a mean of cosines, the signs among them
            np.testing.assert_allclose(ours[name], value, 1e-5, least, err_msg=name)
    for kind, rows in one.per_tensor.items():
        np.testing.assert_allclose(many.per_tensor[kind], rows, 1e-4, 1e-5, err_msg=kind)
    # Adam's first step is a sign, which may turn where the gradient is nearly 0.
    pairs = zip(*(jax.tree.leaves(result.pipeline.unet.params) for result in (one, many)))
    apart = np.concatenate([np.abs(np.asarray(a) - np.asarray(b)).ravel() for a, b in pairs])
    assert (apart > 1e-7).mean() < 0.001 and one.metrics[-1]["drift_norm"] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_five_steps_on_any_mesh_are_those_of_one_device(pipeline, monkeypatch, data, fsdp):
    """Losses to 1e-5 and parameters to 1e-5."""
    monkeypatch.setattr(mesh, "_SMALL", 256)
    keys = {**SMALL, "method": "esd", "steps": 5}
    one = aegis_jax.erase(pipeline, "heart", config=keys)
    many = aegis_jax.erase(pipeline, "heart", config={**keys, "mesh.data": data, "mesh.fsdp": fsdp})
    for ours, theirs in zip(many.metrics, one.metrics, strict=True):
        np.testing.assert_allclose(ours["L_e"], theirs["L_e"], 1e-5)
    pairs = zip(*(jax.tree.leaves(result.pipeline.unet.params) for result in (one, many)), strict=True)
    assert max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs) < 1e-5
    assert one.metrics[-1]["drift_norm"] > 1e-4


def test_a_pool_is_the_same_whatever_the_devices_are(pipeline, placement):
    """Five trajectories on eight devices, which draw three twice: the latents, their t, and what a checkpoint holds."""
    drawn, key = [], jax.random.key(3)
    for where in (None, placement):
        _, frozen = setup(pipeline, "red star", CONFIG, where)
        pool = latents.empty_pool(frozen, 1, 5, 4)
        how = {"batch": 8, "refresh_every": 2}
        turn = jnp.zeros(1, jnp.int32)
        drawn.append(latents.pooled(frozen, frozen.unet, pool, frozen.concept_emb, turn, turn, key, **how))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), *jax.device_get(drawn))
    assert drawn[0][2].z.shape[2] == 5 and np.std(drawn[0][0].z) > 0.5


@pytest.mark.slow
def test_in_turn_two_rounds_of_eight_devices_are_a_batch_of_one(pipeline, monkeypatch):
    """Gradient accumulation: in low memory a latent of every device at a time."""
    monkeypatch.setattr(mesh, "_SMALL", 256)
    keys = {**SMALL, "method": "paper", "batch": 16}
    one = aegis_jax.erase(pipeline, "heart", config=keys)
    many = aegis_jax.erase(pipeline, "heart", config={**keys, "low_memory": True, "mesh.data": 4, "mesh.fsdp": 2})
    for ours, theirs in zip(many.metrics, one.metrics, strict=True):
        for name in ("L_e", "L_adv", "L_aet"):
            np.testing.assert_allclose(ours[name], theirs[name], 2e-4, err_msg=name)

    def flops(placement, batch):
        _, frozen = setup(pipeline, "red star", CONFIG, placement)
        z = jnp.zeros((batch, *frozen.latent_shape))
        at, goal = Noised(z, jnp.zeros(batch, jnp.int32)), Goal(frozen.concept_emb, z)
        if placement is not None:
            where = NamedSharding(placement.mesh, PartitionSpec(("data", "fsdp")))
            at, goal = jax.device_put(at, where), Goal(goal.cond, jax.device_put(goal.eps, where))
        program = jax.jit(lambda at, goal: gradients_of(frozen, frozen.unet, at, goal, None, 0.0, "xattn", True))
        return program.lower(at, goal).compile().cost_analysis()["flops"]  # a loop's body counts once

    assert flops(mesh.make_placement(4, 2), 16) == pytest.approx(flops(None, 2), rel=0.1)


def test_each_of_eight_devices_holds_an_eighth_of_sd14():
    """UNet and its drift by the rule by size: at most a tenth more, the small tensors that all hold."""
    placement = mesh.make_placement(fsdp=8)
    unet = model.abstract(UNet2DConditionModel, stable_diffusion.unet()).params
    leaves = jax.tree.leaves((unet, jax.eval_shape(lambda u: trainable.zero_drift(u, "full"), unet)))
    held = sum(math.prod(placement.sharding(leaf.shape).shard_shape(leaf.shape)) for leaf in leaves)
    whole = sum(math.prod(leaf.shape) for leaf in leaves)
    assert whole > 2 * 859e6 and whole / 8 <= held <= 1.1 * whole / 8


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_each_of_eight_devices_computes_an_eighth(pipeline, data, fsdp):
    """Of what a step asks the network: the batch is split over all of them."""

    def flops(placement):
        _, frozen = setup(pipeline, "red star", CONFIG, placement)
        z = jnp.zeros((CONFIG.batch, *frozen.latent_shape))
        at, cond = Noised(z, jnp.zeros(CONFIG.batch, jnp.int32)), frozen.concept_emb
        if placement is not None:
            at = jax.device_put(at, NamedSharding(placement.mesh, PartitionSpec(("data", "fsdp"))))
        return jax.jit(predicted).lower(frozen, frozen.unet, at, cond).compile().cost_analysis()["flops"]

    assert flops(mesh.make_placement(data, fsdp)) == pytest.approx(flops(None) / 8, rel=0.05)


def test_a_batch_that_the_devices_do_not_divide_is_refused(pipeline, placement):
    """By the placement and by whatever starts a run on it, else each device would compute all of it."""
    placement.check_batch(16)
    for batch in (1, 6, 12):
        with pytest.raises(AegisError, match=f"batch={batch} is not divisible by the 8 devices"):
            placement.check_batch(batch)
        with pytest.raises(AegisError, match=f"batch={batch} is not divisible"):
            setup(pipeline, "red star", dataclasses.replace(CONFIG, batch=batch), placement)
    with pytest.raises(AegisError, match="batch=6 is not divisible by the 8 devices of mesh.data=4 x mesh.fsdp=2"):
        aegis_jax.erase(pipeline, "heart", config={**SMALL, "batch": 6, "mesh.data": 4, "mesh.fsdp": 2})


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
