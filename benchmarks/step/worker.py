"""One side of step_vs_pytorch.py in a process of its own: `python -m benchmarks.step.worker SPEC.json`.

The spec names the side, the task ("gate" or "time") and where the result goes. Nothing heavy is imported before the
number of threads and the caches are set.
"""

import json
import os
import pathlib
import sys
import time
import traceback

import numpy as np

from benchmarks import cases, trials
from benchmarks.step import agreement

GATE_STOP = 10


class Side:
    """One implementation behind the same few questions. `step` may return before the device is done."""

    def __init__(self, spec: dict):
        self.spec, self.is_jax = spec, spec["side"] == "jax"
        self.case = cases.load(spec["model"], spec["size"])
        start = time.perf_counter()
        self.runner = self._jax() if self.is_jax else self._torch()
        self.sync()
        self.setup_s = time.perf_counter() - start

    def _jax(self):
        import jax

        jax.config.update("jax_compilation_cache_dir", self.spec["jax_cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        precision = "default" if self.spec["tf32"] else "highest"  # by default XLA lets a GPU use TF32
        jax.config.update("jax_default_matmul_precision", precision)
        from benchmarks.step.jax_step import JaxStep

        self.about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "matmul precision": precision}
        return JaxStep(self.case, self.spec["batch"], self.spec["dtype"])

    def _torch(self):
        import torch

        from benchmarks.step import torch_step

        torch.set_num_threads(self.spec["threads"])
        tf32 = self.spec["tf32"]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        # As XLA does, its trials in the warm-up; published code leaves it off.
        torch.backends.cudnn.benchmark = self.spec["side"] != "p1"
        on_gpu = self.spec["device"] == "cuda"
        self.about = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "TF32": tf32,
            "SDPA": _attention_backend(self.case, self.spec) if on_gpu else "cpu",
        }
        if self.spec["side"] == "p1":
            self.about["dtype"] = "float32"
        return torch_step.make(
            self.spec["side"], self.case, self.spec["batch"], self.spec["device"], self.spec["dtype"]
        )

    def sync(self, *results):
        if self.is_jax:
            import jax

            jax.block_until_ready(results or self.runner.state)
        elif self.spec["device"] == "cuda":
            import torch

            torch.cuda.synchronize()

    def first(self, draw) -> float:
        """Seconds of the first step, with compilation."""
        start = time.perf_counter()
        if self.is_jax:
            self.runner.compile(draw)
        self.runner.step(draw)
        self.sync()
        return time.perf_counter() - start

    def phases(self, draw) -> dict[str, float]:
        """Seconds of each phase, with a wait for the device between them."""
        found, last = {}, time.perf_counter()

        def mark(phase, *results):
            nonlocal last
            self.sync(*results)
            found[phase] = time.perf_counter() - last
            last = time.perf_counter()

        self.runner.step(draw, mark)
        return found

    def device_bytes(self) -> int | None:
        """Peak bytes in use on an accelerator since the process (jax) or `reset_peak` (torch)."""
        if self.spec["device"] == "cpu":
            return None
        if self.is_jax:
            import jax

            return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        import torch

        return torch.cuda.max_memory_allocated()


def _attention_backend(case, spec) -> str:
    """What SDPA picks for the largest self-attention; the choice is private to PyTorch, so it may be unknown."""
    import torch

    try:
        width, heads = case.unet["block_out_channels"][0], case.unet["attention_head_dim"]
        pixels = case.latent_shape[0] * case.latent_shape[1]
        dtype = torch.float32 if spec["side"] == "p1" else getattr(torch, spec["dtype"])
        q = torch.randn(1, heads, pixels, width // heads, device="cuda", dtype=dtype, requires_grad=True)
        return torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    except Exception as error:
        return f"unknown ({type(error).__name__})"


def gate(spec: dict) -> dict:
    """jax: makes the drift and its own values. torch: compares its values with those."""
    side = Side(spec)
    draw = cases.draw(side.case, GATE_STOP, spec["batch"], spec["seed"])
    drift_file, values_file = (pathlib.Path(spec["scratch"]) / name for name in ("drift.npz", "gate.npz"))
    result = {"first step, cold": side.first(cases.draw(side.case, 1, spec["batch"], spec["seed"]))}
    if side.is_jax:
        result["evaluations"] = {"s": draw.s, "count": side.runner.evaluations(draw)}
        side.runner.reset()
        origin = side.runner.gate(draw, None)
        gradients = {key.removeprefix("g_e:"): x for key, x in origin.items() if key.startswith("g_e:")}
        cases.save_drift(drift_file, cases.conflicting_drift(side.runner.weights(), gradients))
        np.savez(values_file, **side.runner.gate(draw, cases.load_drift(drift_file)))
        return result
    from benchmarks.step import torch_nets

    drift = cases.load_drift(drift_file)
    with np.load(values_file) as file:
        ours = {name: file[name] for name in file}
    side.runner.reset(drift)
    side.runner.kept = {}
    before = side.runner.evaluations, side.runner.calls
    side.runner.step(draw, given={name: ours[name] for name in cases.GIVEN})
    counted = {"count": side.runner.evaluations - before[0], "calls": side.runner.calls - before[1]}
    exact = spec["dtype"] == "float32" and not spec["tf32"]
    found, problems = agreement.compare(ours, side.runner.kept, drift, exact=exact)
    result |= {"agreement": found, "problems": problems, "evaluations": {"s": draw.s, **counted}}
    return result | {"flops": torch_nets.flops(side.case, spec["batch"])}


def timed(spec: dict) -> dict:
    """Compile and warm up, then every stop once, then the phases at a few stops."""
    side = Side(spec)
    draws = {s: cases.draw(side.case, s, spec["batch"], spec["seed"]) for s in spec["stops"]}
    warm = cases.draw(side.case, 2, spec["batch"], spec["seed"])

    def seconds(draw) -> float:
        losses = []
        (elapsed,) = trials.seconds(lambda: (losses.append(side.runner.step(draw)), side.sync()), 1)
        assert np.isfinite(float(losses[0])), "L_e is not finite"
        return elapsed

    first = side.first(warm)
    again = [seconds(warm) for _ in range(spec["warmup"])]
    side.phases(warm)  # a phase's own first run is no one's time
    _reset_peak(side)
    # A fixed shuffle, so that a machine that slows down does not pass for a cost per denoising step.
    order = np.random.default_rng(0).permutation(spec["stops"])
    steps = [{"s": int(s), "seconds": seconds(draws[s])} for s in order]
    memory = {"peak_rss": trials.memory("VmHWM"), "rss": trials.memory("VmRSS"), "peak_device": side.device_bytes()}
    chosen = spec["stops"][:: max(1, len(spec["stops"]) // 5)]
    phases = [{"s": int(s), **side.phases(draws[s])} for s in chosen]
    return {
        "about": side.about,
        "setup_s": side.setup_s,
        "first step": first,
        "first step beyond a warm one": first - float(np.median(again)),
        "steps": steps,
        "phases": phases,
        "memory": memory,
    }


def _reset_peak(side) -> None:
    if side.spec["device"] == "cuda" and not side.is_jax:
        import torch

        torch.cuda.reset_peak_memory_stats()
    trials.restart_high_water()  # the compiler's memory is not the step's


def main() -> None:
    spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
    if hasattr(os, "sched_setaffinity"):  # what bounds XLA's pool of threads as well as PyTorch's
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    try:
        result = {"gate": gate, "time": timed}[spec["task"]](spec)
    except Exception as error:
        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
    pathlib.Path(spec["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
