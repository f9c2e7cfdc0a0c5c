"""The first measurements on a new accelerator (performance.md section 6), as one command.

  python -m benchmarks gpu_first              the full-size SD 1.4 shapes, bfloat16
  python -m benchmarks gpu_first --tiny       the same code on a CPU, as a test of it; times mean nothing

  1 cuDNN attention, forward and backward, at head widths 40, 80 and 160     4 convolutions' kernel gradients by time
  2 a UNet forward F at batch 1, 2, 8, 16, 32                                5 the GRP + Adam pass alone
  3 F with its gradient to the text, and to all weights                      6 compile times, of all of these
  7 where the time of 2, 3 and 5 goes, kernel by kernel

The programs of a measurement are compiled side by side and run one after the other. Each measurement that fails is
reported and the next one runs. What has been found is written after each.
"""

import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402  after the environment that it reads
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from aegis_jax.diffusion.threads import side_by_side  # noqa: E402
from benchmarks import cases, trials  # noqa: E402

PROFILED = ("2 F, batch 2", "3 F + B to the text", "3 F + B to all weights", "5 GRP + Adam")


class Bench:
    """Results so far, and where they go."""

    def __init__(self, args):
        self.args, self.dtype = args, jnp.dtype(args.dtype)
        self.case = cases.load("tiny" if args.tiny else "sd14")
        self.found: dict = {}
        self.started, self.compiling = time.perf_counter(), 0.0

    def note(self, name: str, **values):
        self.found[name] = values
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{time.perf_counter() - self.started:6.0f} s  {name:44} {text}", flush=True)
        trials.write(self.args.out, self.found, say=False)

    def time(self, *runs: "Run") -> None:
        """Compiles all, then notes each one's compile seconds and median under its name."""
        start = time.perf_counter()
        compiled = side_by_side(self._compile, list(runs), os.cpu_count())
        self.compiling += time.perf_counter() - start
        for run, (program, compile_s) in zip(runs, compiled):
            if program is None:
                continue
            try:
                self._run(run, program, compile_s)
            except Exception as error:
                self.failed(run.name, error)

    def _compile(self, run: "Run"):
        start = time.perf_counter()
        try:
            program = jax.jit(run.function, donate_argnums=run.donate).lower(*run.arguments).compile()
        except Exception as error:
            self.failed(run.name, error)
            return None, None
        return program, time.perf_counter() - start

    def _run(self, run: "Run", program, compile_s: float) -> None:
        median = float(np.median(trials.seconds(lambda: run.call(program), 2 + self.args.repeats)[2:]))
        values = {"ms": 1e3 * median, "compile_s": compile_s}
        values |= {"TFLOP/s": run.flop / median / 1e12} if run.flop else {}
        memory = program.memory_analysis()
        values |= {"temporaries_MiB": memory.temp_size_in_bytes / 2**20} if memory else {}
        self.note(run.name, **values)
        if run.name in self.args.profile:
            try:
                self.profile(run, program)
            except Exception as error:
                self.failed(f"7 {run.name}", error)

    def profile(self, run: "Run", program, calls: int = 5) -> None:
        """7: seconds by kernel of a few calls, and the program's text after XLA's passes, beside the results."""
        stem = self.args.out.parent / "".join(c if c.isalnum() else "_" for c in run.name)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(calls):
                    run.call(program)
            (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
            kernels = kernel_times(jax.profiler.ProfileData.from_file(str(file)), calls)
        pathlib.Path(f"{stem}.kernels.json").write_text(json.dumps(kernels, indent=1))
        pathlib.Path(f"{stem}.hlo.gz").write_bytes(gzip.compress(program.as_text().encode()))
        families: dict[str, float] = {}
        for name, (ms, _) in kernels.items():
            family = "_".join(part for part in name.split("_") if not part.isdigit())[:60]
            families[family] = families.get(family, 0) + ms
        most = sorted(families, key=families.get, reverse=True)[:12]
        self.note(f"7 {run.name}, ms of kernels", whole=sum(families.values()), **{k: families[k] for k in most})

    def failed(self, name, error):
        traceback.print_exc(limit=1)
        self.note(name, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")


@dataclasses.dataclass
class Run:
    """A program to be timed, its arguments, the arithmetic that is asked for, and the arguments that are donated."""

    name: str
    function: Callable
    arguments: list
    flop: float | None = None
    donate: tuple = ()

    def call(self, program) -> None:
        """Once, to the end. Donated arguments go round."""
        result = jax.block_until_ready(program(*self.arguments))
        for i, position in enumerate(self.donate):
            self.arguments[position] = result[i]


def kernel_times(profile, calls: int) -> dict[str, list]:
    """{kernel: [ms per call, times per call]} on the accelerator (the host where there is none), slowest first."""
    planes = list(profile.planes)
    chosen = [p for p in planes if p.name.startswith("/device:")] or planes
    found: dict[str, list] = {}
    for plane in chosen:
        for line in plane.lines:
            # A GPU's kernels lie on its streams; other lines repeat them by module or step.
            if plane.name.startswith("/device:GPU") and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                entry = found.setdefault(event.name, [0.0, 0.0])
                entry[0] += event.duration_ns / 1e6 / calls
                entry[1] += 1 / calls
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def device() -> str:
    """ "cpu" or the accelerator's name, as part of a file's name."""
    local = jax.local_devices()[0]
    return "cpu" if local.platform == "cpu" else local.device_kind.lower().removeprefix("nvidia ").replace(" ", "_")


def random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def attention(bench: Bench) -> None:
    """1: every implementation at SD 1.4's shapes, forward and backward, self- and cross-attention."""
    shapes = [(4096, 40), (1024, 80), (256, 160), (64, 160)]
    if bench.args.tiny:
        shapes = [(64, 8)]
    runs = []
    for (tokens, width), implementation in itertools.product(shapes, ("cudnn", "xla")):
        for keys in (tokens, 77):
            q, k, v = (random((2, n, 8, width), bench.dtype, i) for i, n in enumerate((tokens, keys, keys)))
            run = partial(jax.nn.dot_product_attention, implementation=implementation)
            name = f"1 attention {implementation} {tokens}x{keys} width {width}"
            flop = 2 * 2 * 2 * 8 * tokens * keys * width
            runs.append(Run(f"{name} forward", run, [q, k, v], flop))
            loss = lambda q, k, v, run=run: jnp.sum(run(q, k, v).astype(jnp.float32))  # noqa: E731
            # Seven products for forward and backward against the forward's two.
            runs.append(Run(f"{name} and backward", jax.grad(loss, (0, 1, 2)), [q, k, v], 3.5 * flop))
    bench.time(*runs)


class Networks:
    """The UNet with the case's weights in the compute type."""

    def __init__(self, case, dtype):
        from aegis_jax.models import unet
        from benchmarks.networks import build

        self.case, self.dtype = case, dtype
        model = build(case, "unet", unet.UNet2DConditionModel, case.unet)
        self.params = jax.tree.map(lambda x: x.astype(dtype), model.params)
        self.apply = partial(unet.apply, model.graph)

    def inputs(self, batch: int):
        length, width = self.case.text["max_position_embeddings"], self.case.unet["cross_attention_dim"]
        z = random((batch, *self.case.latent_shape), self.dtype)
        return z, jnp.full((batch,), 500, jnp.int32), random((batch, length, width), self.dtype, 1)


def forward_and_backward(bench: Bench, networks: Networks) -> None:
    """2 and 3, compiled together"""
    from benchmarks.step.torch_nets import flops

    def to_text(params, z, t, c):
        return jax.grad(lambda c: jnp.sum(jnp.square(networks.apply(params, z, t, c).astype(jnp.float32))))(c)

    def to_weights(params, z, t, c):
        loss = lambda params: jnp.sum(jnp.square(networks.apply(params, z, t, c).astype(jnp.float32)))  # noqa: E731
        return jax.grad(loss)(params)

    runs, flop = [], flops(bench.case, 1)
    if "2" in bench.args.only:
        for batch in (1, 2) if bench.args.tiny else (1, 2, 8, 16, 32):
            arguments = [networks.params, *networks.inputs(batch)]
            runs.append(Run(f"2 F, batch {batch}", networks.apply, arguments, batch * flop["F"]))
    if "3" in bench.args.only:
        arguments = [networks.params, *networks.inputs(1)]
        runs.append(Run("3 F + B to the text", to_text, arguments, flop["F+B_text"]))
        runs.append(Run("3 F + B to all weights", to_weights, arguments, flop["F+B"]))
    bench.time(*runs)


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
    """4: XLA's gradient with respect to the kernel, and the one by matrix products that CPUs use, at batch 1, of the
    convolutions with most arithmetic."""
    from aegis_jax.models import convolution

    shapes = _convolutions(networks)
    arithmetic = lambda k: shapes[k] * k[0] * k[1] * k[2] * k[3] ** 2 * k[4] // k[5] ** 2  # noqa: E731
    most = sorted(shapes, key=arithmetic, reverse=True)[: 2 if bench.args.tiny else bench.args.convolutions]
    runs = []
    for H, W, n_in, size, n_out, stride in most:
        x, kernel = random((1, H, W, n_in), bench.dtype), random((size, size, n_in, n_out), bench.dtype, 1)
        dy = random((1, H // stride, W // stride, n_out), bench.dtype, 2)
        pad = (size - 1) // 2
        shape = {"strides": (stride, stride), "padding": ((pad, pad), (pad, pad))}
        native = partial(convolution._native, **shape)
        flop = 2 * dy.size * n_in * size**2
        count = shapes[H, W, n_in, size, n_out, stride]
        name = f"4 conv {H}x{W} {n_in}->{n_out} stride {stride} x{count}"
        gradient = lambda x, dy, f=native, k=kernel: jax.vjp(lambda k: f(x, k), k)[1](dy)[0]  # noqa: E731
        products = partial(convolution._kernel_gradient, size=(size, size), **shape)
        runs.append(Run(f"{name} kernel gradient", gradient, [x, dy], flop))
        runs.append(Run(f"{name} same by products", products, [x, dy], flop))
        runs.append(Run(f"{name} forward", native, [x, kernel], flop))
    bench.time(*runs)
    by_time = sorted(
        (k for k in bench.found if k.endswith("kernel gradient")), key=lambda k: -bench.found[k].get("ms", 0)
    )
    bench.note("4 slowest kernel gradients", names=by_time[:5])


def update(bench: Bench, networks: Networks) -> None:
    """5: GRP with Adam, on gradients that are given, state donated."""
    from aegis_jax.erasure import adam, groups, trainable
    from aegis_jax.erasure.aegis import rectify
    from aegis_jax.erasure.aegis.config import GRPConfig

    grp = GRPConfig()
    drift = trainable.zero_drift(networks.params, "full")

    def noise(dtype, first):
        draw = lambda i: random(list(drift.values())[i].shape, dtype, first + i)  # noqa: E731
        return dict(zip(drift, side_by_side(draw, list(range(len(drift))), os.cpu_count())))

    drift, gradients = jax.tree.map(lambda x: 1e-4 * x, noise(jnp.float32, 0)), noise(bench.dtype, 1000)
    count = sum(x.size for x in drift.values())

    def step(drift, opt_state, omega, conflict, gradients):
        before = rectify.times(conflict, adam.drift_before(drift, opt_state, 1e-5))
        g, found = rectify.retain(gradients, drift, omega, before, grp)
        direction, opt_state = adam.update(g, opt_state)
        return jax.tree.map(lambda d, u: d - 1e-5 * u, drift, direction), opt_state, found.omega, found.conflict

    def refresh(params, drift):
        return trainable.add_drift(params, drift, "full")

    rule = rectify.per_tensor(drift, 0.5), rectify.per_tensor(drift, 1.0)  # omega, and the conflict before
    bench.note("5 parameters", millions=count / 1e6, tensors=len(groups.unstack(drift, networks_flat(networks))))
    bench.time(
        Run("5 theta = theta0 + drift", refresh, [networks.params, drift]),
        Run("5 GRP + Adam", step, [drift, adam.init(drift, jnp.float32), *rule, gradients], donate=(0, 1, 2, 3)),
    )
    if ms := bench.found["5 GRP + Adam"].get("ms"):
        # Moments and drift read and written, gradients read.
        nbytes = count * (24 + bench.dtype.itemsize)
        bench.note("5 GRP + Adam, least traffic", GB=nbytes / 1e9, GB_per_s=nbytes / 1e6 / ms)


def networks_flat(networks: Networks) -> dict:
    from aegis_jax.models.model import flatten

    return flatten(networks.params)


def compile_times(bench: Bench) -> None:
    """6: of all together, and of the slowest, each while the others of its measurement were compiled too."""
    seconds = {name: x["compile_s"] for name, x in bench.found.items() if "compile_s" in x}
    slowest = sorted(seconds, key=seconds.get)[-5:]
    bench.note("6 compile, s", total=bench.compiling, **{name: seconds[name] for name in slowest})
    stats = jax.devices()[0].memory_stats() or {}
    bench.note("6 device memory", peak_GiB=stats.get("peak_bytes_in_use", 0) / 2**30)


def main(argv) -> None:
    parser = trials.parser(__doc__, f"gpu_first_{device()}.json")
    parser.add_argument("--tiny", action="store_true", help="a tiny network: a test of this script")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: bfloat16 on a GPU")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="1234567", help="digits of the measurements to make")
    parser.add_argument("--convolutions", type=int, default=12, help="how many kinds of convolution")
    args = parser.parse_args(argv)
    args.profile = PROFILED if "7" in args.only else ()
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    bench = Bench(args)
    bench.note("0 device", device=str(jax.devices()[0]), dtype=args.dtype, about=trials.about())
    networks = None
    if set(args.only) & set("2345"):
        try:
            networks = Networks(bench.case, bench.dtype)
        except Exception as error:
            bench.failed("building the networks", error)
    measurements = {"23": forward_and_backward, "5": update, "1": attention, "4": convolutions, "6": compile_times}
    for digits, measure in measurements.items():
        of_networks = digits in ("23", "4", "5")
        if not set(digits) & set(args.only) or (of_networks and networks is None):
            continue
        try:
            measure(bench, *([networks] if of_networks else []))
        except Exception as error:
            bench.failed(f"{digits} as a whole", error)
