"""The first six measurements on a new accelerator (performance.md section 6), as one command.

  python -m benchmarks.gpu_first --out gpu_first.json     the full-size SD 1.4 shapes, bfloat16
  python -m benchmarks.gpu_first --tiny                   the same code on a CPU, as a test of it; times mean nothing

  1 cuDNN attention, forward and backward, at head widths 40, 80 and 160     4 convolutions' kernel gradients by time
  2 a UNet forward F at batch 1, 2, 8, 16, 32                                5 the GRP + Adam pass alone
  3 F with its gradient to the text, and to all weights                      6 compile times, of all of these

Each measurement that fails is reported and the next one runs. What has been found is written after each.
"""

import argparse
import itertools
import json
import os
import pathlib
import time
import traceback
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402  after the environment that it reads
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import cases  # noqa: E402


class Bench:
    """Results so far, and where they go."""

    def __init__(self, args):
        self.args, self.dtype = args, jnp.dtype(args.dtype)
        self.case = cases.load("tiny" if args.tiny else "sd14")
        self.found: dict = {}
        self.started = time.perf_counter()

    def note(self, name: str, **values):
        self.found[name] = values
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{time.perf_counter() - self.started:6.0f} s  {name:44} {text}", flush=True)
        self.args.out.write_text(json.dumps(self.found, indent=1))

    def time(self, name: str, function, *arguments, flop: float | None = None, donate=()) -> None:
        """Compile seconds and the median of some runs, noted under the name. Donated arguments go round."""
        try:
            start = time.perf_counter()
            compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
            compile_s = time.perf_counter() - start
            seconds, arguments = [], list(arguments)
            for _ in range(2 + self.args.repeats):
                start = time.perf_counter()
                result = jax.block_until_ready(compiled(*arguments))
                seconds.append(time.perf_counter() - start)
                for i, position in enumerate(donate):
                    arguments[position] = result[i]
            median = float(np.median(seconds[2:]))
            values = {"ms": 1e3 * median, "compile_s": compile_s}
            values |= {"TFLOP/s": flop / median / 1e12} if flop else {}
            memory = compiled.memory_analysis()
            values |= {"temporaries_MiB": memory.temp_size_in_bytes / 2**20} if memory else {}
            self.note(name, **values)
        except Exception as error:
            self.failed(name, error)

    def failed(self, name, error):
        traceback.print_exc(limit=1)
        self.note(name, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")


def random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def attention(bench: Bench) -> None:
    """1: every implementation at SD 1.4's shapes, forward and backward, self- and cross-attention."""
    shapes = [(4096, 40), (1024, 80), (256, 160), (64, 160)]
    if bench.args.tiny:
        shapes = [(64, 8)]
    for (tokens, width), implementation in itertools.product(shapes, ("cudnn", "xla")):
        for keys in (tokens, 77):
            q, k, v = (random((2, n, 8, width), bench.dtype, i) for i, n in enumerate((tokens, keys, keys)))
            run = partial(jax.nn.dot_product_attention, implementation=implementation)
            name = f"1 attention {implementation} {tokens}x{keys} width {width}"
            flop = 2 * 2 * 2 * 8 * tokens * keys * width
            bench.time(f"{name} forward", run, q, k, v, flop=flop)
            loss = lambda q, k, v, run=run: jnp.sum(run(q, k, v).astype(jnp.float32))  # noqa: E731
            # Seven products for forward and backward against the forward's two.
            bench.time(f"{name} and backward", jax.grad(loss, (0, 1, 2)), q, k, v, flop=3.5 * flop)


class Networks:
    """The UNet with the case's weights in the compute type."""

    def __init__(self, bench: Bench):
        from aegis_jax.models import unet
        from benchmarks.jax_step import build
        from benchmarks.torch_step import flops

        self.bench, self.case = bench, bench.case
        model = build(bench.case, "unet", unet.UNet2DConditionModel, bench.case.unet)
        self.params = jax.tree.map(lambda x: x.astype(bench.dtype), model.params)
        self.apply = partial(unet.apply, model.graph)
        self.flop = flops(bench.case, 1)

    def inputs(self, batch: int):
        length, width = self.case.text["max_position_embeddings"], self.case.unet["cross_attention_dim"]
        z = random((batch, *self.case.latent_shape), self.bench.dtype)
        return z, jnp.full((batch,), 500, jnp.int32), random((batch, length, width), self.bench.dtype, 1)


def forward(bench: Bench, networks: Networks) -> None:
    """2"""
    for batch in (1, 2) if bench.args.tiny else (1, 2, 8, 16, 32):
        bench.time(
            f"2 F, batch {batch}", networks.apply, networks.params, *networks.inputs(batch),
            flop=batch * networks.flop["F"],
        )  # fmt: skip


def backward(bench: Bench, networks: Networks) -> None:
    """3"""
    z, t, c = networks.inputs(1)

    def to_text(params, z, t, c):
        return jax.grad(lambda c: jnp.sum(jnp.square(networks.apply(params, z, t, c).astype(jnp.float32))))(c)

    def to_weights(params, z, t, c):
        loss = lambda params: jnp.sum(jnp.square(networks.apply(params, z, t, c).astype(jnp.float32)))  # noqa: E731
        return jax.grad(loss)(params)

    bench.time("3 F + B to the text", to_text, networks.params, z, t, c, flop=networks.flop["F+B_text"])
    bench.time("3 F + B to all weights", to_weights, networks.params, z, t, c, flop=networks.flop["F+B"])


def _convolutions(networks: Networks) -> dict[tuple, int]:
    """{(H, W, C_in, kernel, C_out, stride): count} of the UNet's convolutions larger than 1x1 at batch 1."""
    from aegis_jax.models import convolution

    seen: dict[tuple, int] = {}
    original = convolution._convolve

    def recording(x, kernel, strides, padding):
        key = (*x.shape[1:], kernel.shape[0], kernel.shape[3], strides[0])
        seen[key] = seen.get(key, 0) + 1
        return original(x, kernel, strides, padding)

    convolution._convolve = recording
    try:
        # A function of its own, since a trace that was made before would be found again.
        jax.eval_shape(lambda *inputs: networks.apply(*inputs), networks.params, *networks.inputs(1))
    finally:
        convolution._convolve = original
    return seen


def convolutions(bench: Bench, networks: Networks) -> None:
    """4: XLA's gradient with respect to the kernel, and the one by matrix products that CPUs use, at batch 1."""
    from aegis_jax.models import convolution

    shapes = list(_convolutions(networks).items())
    for (H, W, n_in, size, n_out, stride), count in shapes[: 2 if bench.args.tiny else None]:
        x, kernel = random((1, H, W, n_in), bench.dtype), random((size, size, n_in, n_out), bench.dtype, 1)
        dy = random((1, H // stride, W // stride, n_out), bench.dtype, 2)
        pad = (size - 1) // 2
        shape = {"strides": (stride, stride), "padding": ((pad, pad), (pad, pad))}
        native = partial(convolution._native, **shape)
        flop = 2 * dy.size * n_in * size**2
        name = f"4 conv {H}x{W} {n_in}->{n_out} stride {stride} x{count}"
        gradient = lambda x, dy, f=native, k=kernel: jax.vjp(lambda k: f(x, k), k)[1](dy)[0]  # noqa: E731
        bench.time(f"{name} kernel gradient", gradient, x, dy, flop=flop)
        products = partial(convolution._kernel_gradient, size=(size, size), **shape)
        bench.time(f"{name} same by products", lambda x, dy, f=products: f(x, dy), x, dy, flop=flop)
        bench.time(f"{name} forward", native, x, kernel, flop=flop)
    by_time = sorted(
        (k for k in bench.found if k.endswith("kernel gradient")), key=lambda k: -bench.found[k].get("ms", 0)
    )
    bench.note("4 slowest kernel gradients", names=by_time[:5])


def update(bench: Bench, networks: Networks) -> None:
    """5: GRP with Adam, on gradients that are given, state donated."""
    import optax

    from aegis_jax.erasure import groups, rectify, trainable
    from aegis_jax.erasure.config import GRPConfig

    adam, grp = optax.scale_by_adam(), GRPConfig(omega_rule="fixed", omega=1.0)
    drift = trainable.zero_drift(networks.params, "full")
    drift = {name: 1e-4 * random(x.shape, jnp.float32, i) for i, (name, x) in enumerate(drift.items())}
    gradients = {name: random(x.shape, bench.dtype, i + 1000) for i, (name, x) in enumerate(drift.items())}
    count = sum(x.size for x in drift.values())

    def step(drift, opt_state, gradients):
        g, _, _ = rectify.retain(gradients, drift, jnp.float32(1), grp)
        direction, opt_state = adam.update(g, opt_state)
        return jax.tree.map(lambda d, u: d - 1e-5 * u, drift, direction), opt_state

    def refresh(params, drift):
        return trainable.add_drift(params, drift, "full")

    bench.note("5 parameters", millions=count / 1e6, tensors=len(groups.unstack(drift, networks_flat(networks))))
    bench.time("5 theta = theta0 + drift", refresh, networks.params, drift)
    bench.time("5 GRP + Adam", step, drift, adam.init(drift), gradients, donate=(0, 1))
    if ms := bench.found["5 GRP + Adam"].get("ms"):
        # Moments and drift read and written, gradients read.
        nbytes = count * (24 + bench.dtype.itemsize)
        bench.note("5 GRP + Adam, least traffic", GB=nbytes / 1e9, GB_per_s=nbytes / 1e6 / ms)


def networks_flat(networks: Networks) -> dict:
    from aegis_jax.models.model import flatten

    return flatten(networks.params)


def compile_times(bench: Bench) -> None:
    """6"""
    seconds = {name: x["compile_s"] for name, x in bench.found.items() if "compile_s" in x}
    slowest = sorted(seconds, key=seconds.get)[-5:]
    bench.note("6 compile, s", total=sum(seconds.values()), **{name: seconds[name] for name in slowest})
    stats = jax.devices()[0].memory_stats() or {}
    bench.note("6 device memory", peak_GiB=stats.get("peak_bytes_in_use", 0) / 2**30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny network: a test of this script")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="123456", help="digits of the measurements to make")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_first.json"))
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    bench = Bench(args)
    bench.note("0 device", device=str(jax.devices()[0]), jax=jax.__version__, dtype=args.dtype)
    networks = None
    if set(args.only) & set("2345"):
        try:
            networks = Networks(bench)
        except Exception as error:
            bench.failed("building the networks", error)
    measurements = {"1": attention, "2": forward, "3": backward, "4": convolutions, "5": update, "6": compile_times}
    for digit, measure in measurements.items():
        if digit not in args.only or (digit in "2345" and networks is None):
            continue
        try:
            measure(bench, *([networks] if digit in "2345" else []))
        except Exception as error:
            bench.failed(f"{digit} as a whole", error)


if __name__ == "__main__":
    main()
