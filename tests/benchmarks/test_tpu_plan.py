"""benchmarks/tpu_plan.py on a tiny network, and what only a TPU's compiler shows of the library: remat saves memory."""

import json

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu")

from aegis_jax.models import model, unet  # noqa: E402
from benchmarks import tpu_plan  # noqa: E402


def test_a_program_is_compiled_once_and_stays_in_the_file(tmp_path, capsys):
    out = tmp_path / "results" / "plan.json"
    command = ["--width", "tiny", "--low-memory", "--only", "encoded", "--out", str(out)]
    result = tpu_plan.main(command)
    assert json.loads(out.read_text()) == result
    (program,) = result["programs"].values()
    assert program["calls"] == 2  # c' and c*
    assert program["argument"] > 0 and program["compile_s"] > 0
    size = result["resident"]["low memory"]
    assert size["moments"] < 1.1 * size["drift"]  # two of half the bytes
    assert "| encoded | 2 |" in out.with_suffix(".md").read_text()
    assert "compiling" in capsys.readouterr().out
    again = tpu_plan.main(command)
    assert again["programs"] == result["programs"]
    assert "compiling" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give another file"):
        tpu_plan.main(["--width", "small", "--out", str(out)])


def test_every_large_program_of_the_step_is_found():
    config = tpu_plan.EraseConfig(compute_dtype="bfloat16", low_memory=True)
    found = tpu_plan.programs(*tpu_plan.abstract_run("tiny", config), config)
    assert {key: calls for key, (_, calls) in found.items()} == {
        "_update, low memory": 1,
        "sign_step, low memory": 2,
        "fresh": 2,
        "predicted, batch 1": 2,
        "predicted, batch 2": 1,
        "_moved": 1,
        "encoded": 2,
    }


def test_peak_counts_the_working_weights_once():
    size = {"theta0": 100, "working theta": 100, "drift": 200}
    program = {"temp": 7, "output": 100, "alias": 0}
    assert tpu_plan.peak("_moved", program, size, 1) == 100 + 200 + 100 + 7 + 1
    assert tpu_plan.peak("fresh", program | {"output": 3}, size, 1) == 400 + 3 + 7 + 1
    assert tpu_plan.peak("_update, low memory", program | {"alias": 99}, size, 1) == 400 + 1 + 7 + 1


@pytest.mark.slow
def test_remat_saves_memory():
    """The gradient to soft tokens, with attention over so many tokens that it does not fit on the chip's own memory."""
    device = tpu_plan.topologies.get_topology_desc("v5e:1x1", platform="tpu", chips_per_host_bounds=(1, 1, 1)).devices[
        0
    ]
    config = tpu_plan.WIDTHS["tiny"][0]
    network = model.abstract(unet.UNet2DConditionModel, config)
    arguments = (network.params, jnp.zeros((1, 7, 32)), jnp.zeros((1, 48, 48, 4)))
    placed = jax.tree.unflatten(jax.tree.structure(arguments), tpu_plan.on(device, jax.tree.leaves(arguments)))

    def temporaries(remat):
        loss = lambda params, text, z: unet.apply(network.graph, params, z, 1, text, remat=remat).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(*placed).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 0 < temporaries(True) < 0.7 * temporaries(False)
