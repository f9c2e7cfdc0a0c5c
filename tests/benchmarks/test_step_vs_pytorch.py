"""The side-by-side benchmark: its networks, its gate and its table. No time is ever asserted."""

import numpy as np
import pytest
import torch

from benchmarks import cases, step_vs_pytorch
from benchmarks.step import agreement, torch_nets, torch_step
from tests.parity.compare import QUICK_COMPILE

QUICK_XLA = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK_COMPILE.items())
TINY = ["--model", "tiny", "--device", "cpu", "--against", "p1,p2", "--threads", "1"]


def named(module):
    return {key: tuple(x.shape) for key, x in module.state_dict().items()}


def test_unet_is_diffusers_own():
    diffusers = pytest.importorskip("diffusers")
    case = cases.load("tiny")
    theirs = diffusers.UNet2DConditionModel.from_config(case.unet)
    ours = torch_step.build(case, "unet", torch_nets.UNet, case.unet)
    assert named(ours) == named(theirs)
    theirs.load_state_dict(ours.state_dict())
    rng = np.random.default_rng(0)
    z, c = (torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((2, 4, 8, 8), (2, 12, 32)))
    t = torch.tensor([3, 981])
    with torch.no_grad():
        wanted = theirs(z, t, c).sample
        torch.testing.assert_close(ours(z, t, c), wanted, rtol=1e-4, atol=1e-5)
        torch_nets.Attention.explicit = True
        try:
            torch.testing.assert_close(ours(z, t, c), wanted, rtol=1e-4, atol=1e-5)
        finally:
            torch_nets.Attention.explicit = False


@pytest.mark.parametrize("name", ["world", "quarter", "sd14"])
def test_names_and_shapes_are_diffusers_own(name):
    diffusers = pytest.importorskip("diffusers")
    case = cases.load(name)
    with torch.device("meta"):
        wanted = named(diffusers.UNet2DConditionModel.from_config(case.unet))
        assert named(torch_nets.UNet(case.unet)) == wanted


def test_text_encoder_is_transformers_own():
    transformers = pytest.importorskip("transformers")
    case = cases.load("tiny")
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**case.text)).eval()
    ours = torch_step.build(case, "text", torch_nets.TextEncoder, case.text)
    state = {key.removeprefix("text_model."): key for key in theirs.state_dict()}
    theirs.load_state_dict({state[key]: x for key, x in ours.state_dict().items()}, strict=False)
    ids = torch.tensor(case.words.ids(["concept", ""])).long()
    with torch.no_grad():
        torch.testing.assert_close(ours(ours.embed(ids)), theirs(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_random_weights_are_no_zeros_and_the_same_in_any_order():
    case = cases.load("tiny")
    shapes = {"conv_in.weight": (16, 4, 3, 3), "conv_in.bias": (16,)}
    one, other = case.tensors("unet", shapes), case.tensors("unet", dict(reversed(shapes.items())))
    assert all(np.all(x != 0) for x in one.values())
    assert all(np.array_equal(one[key], other[key]) for key in shapes)


def test_stops():
    assert cases.stops(50) == list(range(50))
    assert cases.stops(3) == [0, 24, 49]
    draw = cases.draw(cases.load("tiny"), 49, 3, 0)
    assert draw.z_T.shape == (2, 3, 8, 8, 4) and draw.t.shape == (2, 3) and np.all((draw.t >= 0) & (draw.t < 20))


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """(folder, aegis_jax's values and drift), by the benchmark's own worker."""
    folder = tmp_path_factory.mktemp("gate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", QUICK_XLA)
        result = step_vs_pytorch.work(step_vs_pytorch.options(TINY), "jax", "gate", folder)
    assert "failed" not in result, result
    assert result["evaluations"] == {"s": 10, "count": 40 + 7}
    with np.load(folder / "gate.npz") as file:
        return {name: file[name] for name in file}, cases.load_drift(folder / "drift.npz")


def compared(gate, side, perturb=lambda step: None):
    ours, drift = gate
    case = cases.load("tiny")
    step = torch_step.make(side, case, 1, "cpu", "float32")
    step.reset(drift)
    perturb(step)
    step.kept = {}
    step.step(cases.draw(case, 10, 1, 0), given={name: ours[name] for name in cases.GIVEN})
    assert step.evaluations == 40 + 7  # guided steps of two latents; frozen, current, p, v, target pair, erasure
    assert step.calls == {"p1": 47, "p2": 26}[side]
    return agreement.compare(ours, step.kept, drift, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["p1", "p2"])
def test_gate_passes(gate, side):
    found, problems = compared(gate, side)
    assert problems == []
    assert 0.2 < found["share of tensors in conflict"] < 0.8


@pytest.mark.slow
def test_gate_fails_on_other_weights(gate):
    def perturb(step):
        with torch.no_grad():
            step.net.mid_block.resnets[0].conv1.weight.mul_(1.01)

    _, problems = compared(gate, "p1", perturb)
    assert any(problem.startswith("g_e") for problem in problems)
    assert any(problem.startswith("cosine") for problem in problems)


def test_table():
    run = {
        "about": {"device": "cpu"},
        "first step": 2.0,
        "steps": [{"s": s, "seconds": 0.1 + 0.01 * s} for s in (0, 49)],
        "phases": [{"s": 0, "sampling": 0.0, "AET": 0.05}],
        "memory": {"peak_rss": 2**30, "rss": 2**30, "peak_device": None},
    }
    args = step_vs_pytorch.options(TINY)
    gate = {"first step, cold": 3.0, "evaluations": {"s": 10, "count": 47}}
    gates = {side: gate for side in ("jax", "p1")}
    flops = {"F": 1e9, "F+B_text": 2e9, "F+B": 3e9}
    found = {side: step_vs_pytorch.summary(args, [run, run], gates[side], flops) for side in gates}
    assert found["jax"]["evaluations_per_step"] == 7 + 4 * 24.5
    assert np.isclose(found["jax"]["tflops"] * found["jax"]["mean_s"], (4 * 24.5 + 4 + 4 + 3) * 1e-3)
    assert "| p1 | 345.0 |" in step_vs_pytorch.table(args, found)
    assert "1.00x" in step_vs_pytorch.table(args, found)
    assert "stops" in step_vs_pytorch.heading(args, found, gates)
