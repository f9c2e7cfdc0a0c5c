"""Self-attention on this machine's CPU: ours (models/attend.py), XLA's own and PyTorch's, forward pass and gradient.

  python -m benchmarks attention [--rounds 2] [--repeats 3]

Two latents (guidance's pair) in float32, of the sizes that SD 1.4 has at 64x64 latents, a quarter of its width, and the
VAE's single head. Each side runs in processes of its own, in turn; the sides must agree on the norms of output and
gradients, or no times are given. Compilation is left out: the first call is not timed.
"""

from benchmarks import trials

SIDES = ("ours", "xla", "pytorch")
SIZES = {  # latents, tokens, heads, head width
    "SD 1.4, 64x64": (2, 4096, 8, 40),
    "SD 1.4, 32x32": (2, 1024, 8, 80),
    "a quarter of its width, 64x64": (2, 4096, 8, 10),
    "a quarter of its width, 32x32": (2, 1024, 8, 20),
    "the VAE's, 512x512 pixels": (1, 4096, 1, 512),
}
TOLERANCE = 1e-4


def given(size):
    """q, k, v and what output is multiplied with before it is summed: (B, L, N, d) each."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) for _ in range(4)]


def in_jax(side: str, size):
    """(forward, gradient): functions without arguments that return arrays, computed."""
    import jax
    import jax.numpy as jnp

    from aegis_jax.models.attend import attend

    attention = attend if side == "ours" else jax.nn.dot_product_attention
    *qkv, weight = map(jnp.asarray, given(size))
    forward = jax.jit(attention)
    gradient = jax.jit(jax.grad(lambda *qkv: jnp.sum(weight * attention(*qkv)), argnums=(0, 1, 2)))
    return (lambda: [jax.block_until_ready(forward(*qkv))], lambda: jax.block_until_ready(gradient(*qkv)))


def in_pytorch(size):
    import torch

    *qkv, weight = (torch.tensor(x).transpose(1, 2).contiguous() for x in given(size))
    attention = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            return [attention(*qkv)]

    def gradient():
        wanted = [x.clone().requires_grad_() for x in qkv]
        return torch.autograd.grad((weight * attention(*wanted)).sum(), wanted)

    return forward, gradient


def trial(side: str, repeats: int) -> None:
    import numpy as np

    found = {}
    for name, size in SIZES.items():
        for kind, function in zip(
            ("forward", "gradient"), in_pytorch(size) if side == "pytorch" else in_jax(side, size)
        ):
            found[f"{name}|{kind}|norm"] = float(sum(np.linalg.norm(np.asarray(x)) for x in function()))
            found[f"{name}|{kind}"] = min(trials.seconds(function, repeats))
    trials.report(**found)


def compared(results: dict[str, list[dict]]) -> dict:
    figures = {}
    for name in SIZES:
        for kind in ("forward", "gradient"):
            key = f"{name}|{kind}"
            norms = [result[f"{key}|norm"] for side in SIDES for result in results[side]]
            if max(norms) > (1 + TOLERANCE) * min(norms):
                raise SystemExit(f"the sides disagree on {name}, {kind}: norms {norms}")
            figures[key] = {side: trials.spread([r[key] for r in results[side]]) for side in SIDES} | {
                f"{side} / ours": trials.ratio(results[side], results["ours"], key) for side in SIDES[1:]
            }
    return figures


def text(figures: dict) -> str:
    rows = []
    for key, found in figures.items():
        milliseconds = [f"{1e3 * found[side]['median']:.0f}" for side in SIDES]
        rows.append([*key.split("|"), *milliseconds, *(trials.shown(found[f"{side} / ours"]) for side in SIDES[1:])])
    head = ["", "", "ours, ms", "XLA's, ms", "PyTorch's, ms", "XLA's / ours", "PyTorch's / ours"]
    return trials.table(head, rows)


def main(argv) -> None:
    parser = trials.parser(__doc__, "attention_cpu.json", rounds=2, sides=SIDES)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many calls counts")
    args = parser.parse_args(argv)
    if args.side:
        return trial(args.side, args.repeats)
    about = trials.about()
    figures = compared(trials.by_sides("attention", SIDES, argv, args.rounds))
    print(text(figures))
    trials.write(args.out, {"about": about, "figures": figures})
