"""What the TPU's compiler says for chips that are not there; needs the extra `plan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.models import model, unet
from aegis_jax.plan import chips, compiled, memory, plan, shapes, stable_diffusion
from aegis_jax.plan.liveness import at
from aegis_jax.run import config as run_config
from tests.tiny import FEWEST

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not compiled.available(), reason="libtpu is not installed: pip install 'aegis_jax[plan]'"),
]


def there(chip="v5e"):
    return jax.sharding.SingleDeviceSharding(compiled.absent_chip(chip))


def test_a_step(tiny):
    settings = {"concepts": ["star"], "trainable": "xattn", "compute_dtype": "bfloat16"}
    run = run_config.merge(run_config.RunConfig(), settings)
    pipeline = shapes.pipeline(str(tiny(**FEWEST)))
    own = plan.compiled_step(pipeline, run, "v5e", 2)
    assert own["phase"].how == "compiled" and own["collectives"] == 0
    plain, padded = memory.resident(shapes.step(pipeline, run, 2)), own["phase"].parts
    assert all(at(padded[name], 1) >= at(plain[name], 2) for name in ("drift", "theta0"))


@pytest.mark.parametrize("name", ["v5e", "v6e", "v5p"])
def test_what_a_program_may_use(name):
    large = jax.ShapeDtypeStruct((200, 1024, 1024, 1024), np.int8, sharding=there(name))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"available HBM .{chips.CHIPS[name].memory / chips.GIB:.2f}G"):
        jax.jit(lambda x: x + 1).lower(large).compile()


def test_remat_saves_memory():
    """The gradient to soft tokens, with attention over so many tokens that it does not fit on the chip's own memory."""
    config = stable_diffusion.unet((32, 32), 32, size=8, heads=2, attended=1)
    network = model.abstract(unet.UNet2DConditionModel, config)
    arguments = (network.params, jnp.zeros((1, 7, 32)), jnp.zeros((1, 48, 48, 4)))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there()), arguments)

    def temporaries(remat):
        loss = lambda params, text, z: unet.apply(network.graph, params, z, 1, text, remat=remat).sum()  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=1)).lower(*placed).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert 0 < temporaries(True) < 0.7 * temporaries(False)
