"""What the parity tests share: one forward and backward pass of both sides, and the bounds."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import torch

from aegis_jax.models import model as model_lib
from tests.parity import torch_weights

OUTPUT_BOUND = 1e-4  # largest absolute error of an output whose standard deviation is 1
GRADIENT_BOUND = 1e-3  # norm of a gradient's error over the norm of the gradient, per tensor
# Compiling takes most of the time of these tests. XLA's cheapest settings do the same arithmetic.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # later ones refuse what they no longer know
    QUICK_COMPILE["xla_cpu_use_fusion_emitters"] = False


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def ours(module_class, config: dict, module: torch.nn.Module):
    """(graph, params) with the PyTorch module's weights; names and shapes must agree exactly."""
    abstract = model_lib.abstract(module_class, config)
    wanted = {path: leaf.shape for path, leaf in model_lib.flatten(abstract.params).items()}
    flat = torch_weights.convert(module)
    assert {path: array.shape for path, array in flat.items()} == wanted
    return abstract.graph, model_lib.unflatten({path: jnp.asarray(a) for path, a in flat.items()})


def unit_output(last: torch.nn.Module, run) -> torch.Tensor:
    """Scales the last, linear layer so that run() has standard deviation 1, and returns run()."""
    with torch.no_grad():
        output = run()
        std = output.std()
        for parameter in last.parameters():
            parameter /= std
        return output / std


def value_and_gradients(function, *arguments, weights):
    """(output, gradients of sum(weights * output) with respect to all arguments), compiled once."""

    def run(*arguments):
        output, pullback = jax.vjp(function, *arguments)
        return output, pullback(jax.tree.map(jnp.asarray, weights))

    return compiled(run, *arguments)


def compiled(function, *arguments):
    """function(*arguments), compiled the quick way."""
    return jax.jit(function, compiler_options=QUICK_COMPILE)(*arguments)


def assert_output(found, wanted, report: str) -> None:
    error = float(np.abs(np.asarray(found) - wanted).max())
    record(report, "output", error)
    assert error <= OUTPUT_BOUND, f"{report}: largest output error {error:.2e}"


def assert_gradients(found: dict, wanted: dict, report: str) -> None:
    """Per tensor ||found - wanted|| <= bound ||wanted||.

    Some gradients are 0 in exact arithmetic (a bias before a norm that removes it) and rounding
    noise on both sides, so an error below float32's epsilon of the whole gradient's norm passes.
    """
    assert found.keys() == wanted.keys()
    whole = np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in wanted.values()))
    errors = {
        path: float(np.linalg.norm(np.asarray(found[path]) - wanted[path]))
        / max(float(np.linalg.norm(wanted[path])), 1.2e-7 / GRADIENT_BOUND * whole)
        for path in wanted
    }
    worst = max(errors, key=errors.get)
    record(report, f"gradient ({worst})", errors[worst])
    assert errors[worst] <= GRADIENT_BOUND, f"{report}: {worst} is off by {errors[worst]:.2e}"


def record(report: str, what: str, error: float) -> None:
    """One line per comparison where PARITY_LOG names a file: the documentation's figures."""
    if path := os.environ.get("PARITY_LOG"):
        with open(path, "a") as log:
            log.write(f"{report}\t{what}\t{error:.3e}\n")
