"""aegis_jax.plan: what is counted from shapes is what a run on a tiny model has; what is said of cost adds up."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from aegis_jax.cli import main
from aegis_jax.erasure import lanes as lanes_lib
from aegis_jax.erasure.batched import Program
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.plan import chips, compiled, cost, count, liveness, memory, plan, shapes
from aegis_jax.run import config as run_config
from tests.tiny import FEWEST

SETTINGS = {"concepts": ["red star"], "compute_dtype": "bfloat16", "low_memory": True, "steps": 6}
WHOLE = ("unet", "vae", "text_encoder")
PARTS = {"theta0", "theta0's low bits", "text encoder", "drift", "optimiser", "rest", "pool"}


def settings(**more):
    return run_config.merge(run_config.RunConfig(), SETTINGS | more)


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny(**FEWEST)


@pytest.fixture(scope="module")
def full(folder):
    run = settings(trainable="full")
    return run, shapes.step(shapes.pipeline(str(folder)), run)


@pytest.fixture(scope="module")
def found(folder):
    return plan.facts(shapes.pipeline(str(folder)), settings(trainable="xattn", **{"latents.refresh_every": 2}))


def live(state, frozen):
    """Bytes of real arrays by the part that they belong to."""
    total = dict.fromkeys(PARTS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, frozen)):
        total[memory._CALLED.get(path[1].name, memory.REST)] += leaf.nbytes
    return {name: size for name, size in total.items() if size}


def planned(parts, lanes=1):
    return {name: int(liveness.at(each, lanes)) for name, each in parts.items() if liveness.at(each, lanes)}


def test_resident_bytes_are_those_of_a_run(folder, full):
    run, step = full
    state, frozen = run.method.start(load_pipeline(folder), list(run.concepts), run.erase, None)
    assert planned(memory.resident(step)) == live(state, frozen)


def test_lanes_bytes_are_those_of_stacked_runs(folder, found):
    run, lanes = found.run, 3
    runs = run.method.lanes.start(load_pipeline(folder), [["red star"], ["dog"], ["cat"]], run.erase)
    state, frozen, _ = lanes_lib.stack(runs)
    start = next(phase for phase in found.phases(lanes) if phase.name == "start")
    parts = {name: each for name, each in start.parts.items() if name in PARTS}
    assert planned(parts, lanes) == live(state, frozen)


def test_pictures_are_sampled_of_a_pipeline_at_a_time(folder, full):
    run, step = full
    pipeline = load_pipeline(folder)
    nbytes = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(getattr(pipeline, name).params)) for name in WHOLE}
    phases = {phase.name: phase for phase in memory.around(pipeline, run, step, lanes=False)}
    drawn, result = phases["pictures"].bytes(), phases["result"].total()
    assert drawn.pop(memory.PROGRAM) > 0 and result == 2 * sum(nbytes.values())
    assert sum(drawn.values()) == sum(nbytes.values()) + nbytes["text_encoder"]  # that one stays
    without = memory.around(pipeline, run_config.merge(run, {"picture.images": 0}), step, lanes=False)
    assert [phase.name for phase in without] == [name for name in phases if name != "pictures"]


def test_moments_follow_donation_and_the_working_weights(full):
    _, step = full
    calls = {moment.name: moment for moment in memory.moments(step)}
    trained = calls["_update"].parts["drift"]
    assert (calls["_update"].parts[memory.THETA] * 2 == trained).all()  # bfloat16 beside float32
    assert memory.THETA not in calls["_moved"].parts
    # Drift and moments are donated: what is new are metrics and predictions.
    assert liveness.at(calls["_update"].fresh, 1) < liveness.at(trained, 1) / 2


def test_flops_are_xlas_without_elementwise_arithmetic(full):
    _, step = full
    seen = set()
    for call in step.traced.calls:
        if call.name in seen or call.name not in ("predicted", "sign_step", "encoded"):
            continue
        seen.add(call.name)
        compiled_program = call.program.jitted.lower(*call.program.args).compile()
        own, turn = count.flops(call.program)
        assert turn == 0
        assert 0.75 < own / compiled_program.cost_analysis()["flops"] <= 1, call.name
    assert len(seen) == 3


def test_flops_of_products_convolutions_and_loops():
    def function(x, kernel, m):
        for strides, padding in ((1, "SAME"), (2, ((0, 1), (1, 2)))):
            args = {"window_strides": (strides,) * 2, "padding": padding, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
            x = jax.lax.conv_general_dilated(x, kernel, **args)
        back = jax.grad(
            lambda k: jax.lax.conv_general_dilated(
                x, k, (1, 1), "VALID", dimension_numbers=args["dimension_numbers"]
            ).sum()
        )
        return x, jnp.einsum("nij,njk->nik", m, m), back(kernel)

    shapes_ = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 9, 9, 4), (3, 3, 4, 4), (5, 7, 7))]
    own, _ = count.flops(Program(jax.jit(function), shapes_, []))
    theirs = jax.jit(function).lower(*shapes_).cost_analysis()["flops"]
    assert own == pytest.approx(theirs, rel=0.02) and own <= theirs
    one = count.flops(Program(jax.jit(lambda m: m @ m), shapes_[2:], []))
    scanned = lambda m: jax.lax.scan(lambda c, _: (c @ m, None), m, None, 6)[0]  # noqa: E731
    looped = lambda m, n: jax.lax.fori_loop(0, n, lambda _, c: c @ m, m)  # noqa: E731
    assert count.flops(Program(jax.jit(scanned), shapes_[2:], [])) == (6 * one[0], 0)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    assert count.flops(Program(jax.jit(looped), [*shapes_[2:], number], [])) == (0, one[0])


def test_sampling_is_counted_by_evaluations(full):
    run, step = full
    flops = cost.flops(step, run, lanes=False)
    assert flops.sampling == run.method.cost(run.erase, 1).latents * flops.forward > 0
    assert flops.total == flops.sampling + sum(flops.programs.values())
    assert set(flops.programs) == {"predicted", "sign_step", "encoded", "_update"}


def test_liveness_of_a_chain():
    """Two products: elementwise steps take nothing, but for what a product reads, beside what that is computed from."""
    function = lambda x, m: jnp.tanh(jnp.tanh(x @ m) @ m).sum()  # noqa: E731
    x, m = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16), (16, 16)))
    temporaries, results = liveness.timeline(Program(jax.jit(function), [x, m], []))
    # The first product, its tanh, and the second.
    assert liveness.at(liveness.peak(temporaries, 1), 1) == 3 * 8 * 16 * 4
    assert [x.shape for x in results] == [()]
    nothing, _ = liveness.timeline(Program(jax.jit(lambda x: 2 * x + 1), [x], []))
    assert liveness.at(nothing, 1).max(initial=0) == 0


def test_a_sum_that_a_loop_carries_lies_in_memory_once():
    function = lambda x: jax.lax.scan(lambda total, row: (total + row, row[0]), jnp.zeros(512), x)  # noqa: E731
    x = jax.ShapeDtypeStruct((4, 512), jnp.float32)
    # It is also the result, which the caller counts; read on, it is a temporary.
    temporaries, _ = liveness.timeline(Program(jax.jit(lambda x: jnp.tanh(function(x)[0]).sum()), [x], []))
    assert 512 * 4 <= liveness.at(liveness.peak(temporaries, 1), 1) < 2 * 512 * 4


def test_more_lanes_need_more_and_cost_less_each(found):
    counts = (1, 2, 5, 16)
    peaks = [found.peak(k) for k in counts[1:]]
    assert peaks == sorted(set(peaks))
    there = chips.topology("v5e:1")
    bills = [cost.bill(found.flops.total, found.run, there, k, 16, 1.0) for k in counts]
    speeds = [bill.concepts_per_hour for bill in bills]
    assert speeds == sorted(set(speeds))
    most = found.most_lanes(found.peak(9))
    assert most == 9 and found.most_lanes(found.peak(9) - 1) == 8 and found.most_lanes(1) == 0


def test_cost_arithmetic(found):
    run = dataclasses.replace(found.run, erase=dataclasses.replace(found.run.erase, steps=3600))
    chip = dataclasses.replace(chips.CHIPS["v5e"], flops=1e12)
    bill = cost.bill(1e12, run, chips.Topology(chip, 4), lanes=2, concepts=17, price=2.5, share=0.5)
    # 2 lanes of 1 TFLOP at half of 1 TFLOP/s: 4 s a step, 4 h a run of 3600; 17 concepts are 3 waves of 4 x 2.
    assert (bill.seconds, bill.hours, bill.chip_hours, bill.dollars) == (4, 12, 48, 120)
    assert (bill.steps_per_hour, bill.concepts_per_hour) == (900, 0.5)
    assert cost.bill(1e12, run, chips.topology("gpu:24GiB"), 1, 1, None) is None
    eight = dataclasses.replace(run, erase=dataclasses.replace(run.erase, batch=8, low_memory=False))
    turns = dataclasses.replace(run, erase=dataclasses.replace(run.erase, batch=8, low_memory=True))
    shares = [cost.bill(1e12, each, chips.topology("v5e:1"), 1, 1, None).share for each in (eight, turns)]
    assert shares == [cost.MEASURED[8], cost.MEASURED[1]]


def test_utilisation_is_the_measured_one():
    assert [cost.utilisation(n) for n in cost.MEASURED] == pytest.approx(list(cost.MEASURED.values()))
    shares = [cost.utilisation(n) for n in range(1, 64)]
    assert shares == sorted(shares) and shares[-1] == 0.39


@pytest.mark.parametrize(
    "text, name",
    [("v5e:1", "v5e:1"), ("v5e:2x4", "v5e:8"), ("v5e:16x16", "v5e:256"), ("v5p", "v5p:4"), ("v5p:2x2x2", "v5p:8")]
    + [("tpu-v6e-slice:4x4", "v6e:16"), ("h100:8", "h100:8"), ("a100", "a100-80:1"), ("h100:2x4", "h100:8")]
    + [("v5p:4x4x12", "v5p:192"), ("v5p:2x2x1", "v5p:4"), ("v5p:320", "v5p:320"), ("v5p:16x16x24", "v5p:6144")],
)
def test_topologies(text, name):
    assert chips.topology(text).name == name


@pytest.mark.parametrize(
    "text, said",
    [
        ("v9", "is not known"),
        ("", "is not known"),
        ("v5e:3", "v5e does not come in 3 chips; nearest is 1 or 4"),
        ("v5e:0", "'0' is no number of chips; write v5e:256 or v5e:16x16"),
        ("v5e:-1", "no number"),
        ("v5e:2x", "no number"),
        ("v5e:1x8", "8 chips of v5e come as 2x4"),
        ("v5e:2x2x2", "8 chips of v5e come as 2x4"),
        ("v5e:512", "nearest is 256"),
        ("v5p:1", "v5p does not come in 1 chips; nearest is 4"),
        ("v5p:100", "nearest is 64 or 128"),
        ("v5p:2x4x8", "64 chips of v5p come as 4x4x4"),
        ("v5p:8x8x4", "256 chips of v5p come as 4x4x16 or 4x8x8"),
        ("v5p:16x16x28", "nearest is 6144"),
        ("gpu:0GiB", "wanted the memory"),
        ("gpu:24", "is not known"),
        ("h100:3", "nearest is 2 or 4"),
    ],
)
def test_unknown_topologies(text, said):
    with pytest.raises(AegisError, match=re.escape(said)):
        chips.topology(text)


def test_memory_of_a_gpu_by_size():
    assert chips.topology("gpu:24GiB").chip.memory == pytest.approx(24 * chips.GIB * chips.GPU_SHARE, rel=1e-9)


def test_one_run_over_several_chips_is_refused(folder):
    run = settings(trainable="full", batch=2, **{"mesh.data": 2})
    with pytest.raises(AegisError, match="not planned"):
        plan.facts(shapes.pipeline(str(folder)), run)


@pytest.fixture
def planned_before(monkeypatch, found):
    """The command without its slow part, that of `found`."""
    monkeypatch.setattr(plan, "facts", lambda pipeline, run: dataclasses.replace(found, run=run))
    return ["plan", "--config.trainable=xattn", "--config.steps=6", "--topology", "v5e:4"]


def test_the_command(folder, planned_before, found, capsys):
    more = ["--model", str(folder), "--lanes", "2", "--concepts", "9", "--price", "1.5", "--json"]
    assert main(planned_before + more) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["peak_bytes"] == found.peak(2) == max(sum(row["bytes"].values()) for row in said["phases"])
    assert said["fits"] and said["most_lanes"] > 2 and said["fits_on"][0] == "v5e:1"
    assert said["bill"]["dollars"] == pytest.approx(1.5 * said["bill"]["chip_hours"])
    assert main(planned_before + more[:-1]) == 0
    text = capsys.readouterr().out
    rows = [
        line
        for line in text.splitlines()
        if line.split()[:1] and line.split()[0] in {r["phase"] for r in said["phases"]}
    ]
    assert len(rows) == len(said["phases"]) and all(" estimate " in row for row in rows)
    assert "assumed" in text and "counted" in text and "published" in text and "(given)" in text


def test_the_peak_of_bfloat16_prices_no_float32(folder, planned_before, capsys):
    """Unless its share is given: then it is said of what."""
    ask = [*planned_before, "--model", str(folder), "--price", "1.5", "--config.compute_dtype=float32"]
    assert main(ask) == 0
    text = capsys.readouterr().out
    assert "time         not known: the peak is of bfloat16, not of float32" in text and "$" not in text
    assert main([*ask, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bill"] is None and "not of float32" in said["bill_refused"]
    assert main([*ask, "--utilisation", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "10% of the chip's bfloat16 peak (given)" in text and "cost         $" in text


def test_without_libtpu_the_estimate_says_so(folder, planned_before, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert main([*planned_before, "--model", str(folder), "--compile"]) == 0
    text = capsys.readouterr().out
    assert "note: libtpu is not installed" in text and "compiled" not in text


@pytest.mark.parametrize(
    "more, said",
    [
        (["--topology", "v9"], "known are v5e, v6e, v5p"),
        (["--topology", "v5e:4", "--lanes", "0"], "--lanes 0: wanted 1 to 512"),
        (["--topology", "v5e:4", "--lanes", "9" * 30], "wanted 1 to 512"),
        (["--topology", "v5e:4", "--concepts", "1" + "0" * 400], "wanted 1 to 1000000000"),
        (["--topology", f"gpu:{'9' * 400}GiB"], "wanted the memory of a GPU, more than 0 and at most 1000 TB"),
        (["--topology", "v5e:4", "--price", "-1"], "--price -1.0: wanted"),
        (["--topology", "v5e:4", "--utilisation", "1.5"], "--utilisation 1.5: wanted"),
        (["--topology", "v5e:4", "--lanes", "2", "--model", "sd14"], "only xattn and kv share"),
        (["--topology", "v5e:4"], "no model given"),
        (["--topology", "v5e:4", "--model", "world", "--config.method=uce"], "nothing to plan"),
        (["--topology", "v5e:4", "--model", "world", "--config.method=stereo"], "nothing to plan"),
    ],
)
def test_bad_input_is_one_line(more, said, capsys):
    assert main(["plan", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
