"""Changes that might make guided sampling, most of a faithful step, faster on a GPU; each timed before it is made.

  python -m benchmarks gpu_variants             SD 1.4's shapes, bfloat16
  python -m benchmarks gpu_variants --tiny      the same code on a CPU, as a test of it

Ten guided denoising steps of one latent in one loop. The variants:

  one pass        the norms' mean and variance by one reduction each, not two
  OHWI            convolution kernels stored as cuDNN wants them, which saves laying them out anew in every call
  no dot merger   without XLA's joining of products that share an input, which copies their weights in every call
  while graph     the loop's body as a CUDA graph
  no Triton       matrix products by cuBLAS alone; compiles faster

All are compiled side by side. Each is timed with those above it in effect, as far as they concern the model.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aegis_jax.diffusion.schedule import guide
from aegis_jax.diffusion.threads import side_by_side
from aegis_jax.models import convolution, unet
from aegis_jax.models.model import Graph, bind, flatten, unflatten
from benchmarks import cases, gpu_first, trials

STEPS = 10
OHWI = ("NHWC", "OHWI", "NHWC")
GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
# name: (norms in one pass, kernels as OHWI, the compiler's options)
VARIANTS = {
    "as it is": (False, False, {}),
    "one pass": (True, False, {}),
    "OHWI": (True, True, {}),
    "no dot merger": (True, True, {"xla_disable_hlo_passes": "dot-merger"}),
    "while graph": (True, True, {"xla_gpu_enable_command_buffer": GRAPHS}),
    "no Triton": (True, True, {"xla_gpu_enable_triton_gemm": False}),
}


def one_pass(graph, params) -> Graph:
    module = bind(graph, params)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.GroupNorm | nnx.LayerNorm):
            part.use_fast_variance = True
    return Graph(nnx.split(module)[0])


def as_ohwi(params) -> dict:
    """Kernels (h, w, in, out) larger than 1x1 -> (out, h, w, in)."""
    is_kernel = lambda x: x.ndim == 4 and x.shape[0] > 1  # noqa: E731
    return unflatten({k: jnp.transpose(x, (3, 0, 1, 2)) if is_kernel(x) else x for k, x in flatten(params).items()})


def sampling(graph, params, z, text_emb, steps):
    """z (1, h, w, C) float32 after guided steps; the schedule's arithmetic is left out."""

    def step(i, z):
        pair = jnp.concatenate([z, z]).astype(text_emb.dtype)
        output = unet.apply(graph, params, pair, jnp.full((2,), 981 - 20 * i, jnp.int32), text_emb)
        return z - 0.01 * guide(*jnp.split(output.astype(jnp.float32), 2), 3.0)

    return jax.lax.fori_loop(0, steps, step, z)


def lower(networks: gpu_first.Networks, variant: tuple):
    """(lowered program, arguments)"""
    is_one_pass, is_ohwi, _ = variant
    graph, params = networks.apply.args[0], networks.params
    graph = one_pass(graph, params) if is_one_pass else graph
    params = as_ohwi(params) if is_ohwi else params
    z, _, text_emb = networks.inputs(2)
    arguments = params, z[:1].astype(jnp.float32), text_emb, jnp.int32(STEPS)
    usual = convolution._LAYOUT
    convolution._LAYOUT = OHWI if is_ohwi else usual
    try:
        return jax.jit(lambda *rest: sampling(graph, *rest)).lower(*arguments), arguments
    finally:
        convolution._LAYOUT = usual


def main(argv) -> None:
    parser = trials.parser(__doc__, f"gpu_variants_{gpu_first.device()}.json")
    parser.add_argument("--tiny", action="store_true", help="a tiny network: a test of this script")
    parser.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    networks = gpu_first.Networks(cases.load("tiny" if args.tiny else "sd14"), jnp.dtype(args.dtype))
    gpu = jax.default_backend() == "gpu"
    chosen = {name: v for name, v in VARIANTS.items() if gpu or not v[2]}  # the options are a GPU's
    lowered = {name: lower(networks, variant) for name, variant in chosen.items()}

    def compiled(name):
        start = time.perf_counter()
        try:
            return lowered[name][0].compile(compiler_options=VARIANTS[name][2]), time.perf_counter() - start
        except Exception as error:
            return error, None

    found, first, about = {}, None, trials.about()
    for name, (program, compile_s) in zip(lowered, side_by_side(compiled, list(lowered), os.cpu_count())):
        if compile_s is None:
            print(f"{name:14} failed: {str(program).strip().splitlines()[:1]}", flush=True)
            continue
        results = []

        def call(program=program, arguments=lowered[name][1], results=results):
            results.append(np.asarray(program(*arguments)))

        seconds = trials.seconds(call, 1 + args.repeats)
        z = results[-1]
        first = z if first is None else first
        apart = float(np.linalg.norm(z - first) / np.linalg.norm(first))
        found[name] = {"ms_per_step": 1e3 * float(np.median(seconds[1:])) / STEPS, "compile_s": compile_s}
        found[name]["relative difference"] = apart
        values = found[name]
        print(f"{name:14} {values['ms_per_step']:8.3f} ms a step, compiled in {compile_s:.0f} s, {apart:.1e} apart")
        trials.write(args.out, {"device": jax.devices()[0].device_kind, "about": about, **found}, say=False)
