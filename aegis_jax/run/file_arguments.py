"""The commands about files of what an erasure changed: delta, apply, compose, export. Imports nothing heavy."""


def add(command, add_weights, model: str) -> None:
    """Adds them. command(name, function, help) -> subparser; add_weights(subparser); model: what a model may be."""
    sub = command("delta", _delta, "Write what an erasure changed as one small file.")
    sub.add_argument("pipeline", metavar="PIPELINE", help="a diffusers folder whose UNet was changed, or a run folder")
    sub.add_argument("--base", metavar="M", required=True, help=f"the model that it was made of: {model}")
    add_weights(sub)
    _add_out(sub, "FILE", "e.g. erased.safetensors", "replace a delta file")

    sub = command("apply", _apply, "Make a pipeline of a delta file and its base model.")
    sub.add_argument("delta", metavar="DELTA", help="a file of aegis delta, compose or batch")
    sub.add_argument("--model", metavar="M", required=True, help=model)
    add_weights(sub)
    _add_out(sub, "DIR", "the new diffusers folder", "replace a diffusers folder")

    sub = command("compose", _compose, "Merge the delta files of several erasures of one base into one.")
    sub.add_argument("deltas", metavar="DELTA", nargs="+", help="delta files, or folders of them, e.g. a batch's --out")
    sub.add_argument("--base", metavar="M", required=True, help=f"the model that they were made of: {model}")
    add_weights(sub)
    by = "closed: least squares on what each does to its own texts; null-space; sum (docs/delta.md; default: closed)"
    sub.add_argument("--by", metavar="HOW", default="closed", help=by)
    lamb = "closed: weight of random words, which are to stay as they are, beside 1 for each erasure (default: 1)"
    sub.add_argument("--lamb", metavar="W", type=float, default=1.0, help=lamb)
    sub.add_argument("--seed", metavar="N", type=int, default=0, help="of the random words (default: 0)")
    _add_out(sub, "FILE", "e.g. all.safetensors", "replace a delta file")

    sub = command("export", _export, "Write a delta file as a LoRA: smaller, and it says how much is lost.")
    sub.add_argument("delta", metavar="DELTA", help="a file of aegis delta, compose or batch")
    sub.add_argument("--base", metavar="M", required=True, help=f"the model that it was made of: {model}")
    add_weights(sub)
    sub.add_argument("--lora", metavar="RANK", type=int, required=True, help="of the change of each matrix")
    names = "peft, as diffusers has them, or kohya, as most programs with a window do (default: peft)"
    sub.add_argument("--names", metavar="HOW", default="peft", help=names)
    _add_out(sub, "FILE", "e.g. erased_lora.safetensors", "replace a LoRA")


def _add_out(sub, kind: str, help: str, overwrite: str) -> None:
    sub.add_argument("--out", metavar=kind, required=True, help=help)
    sub.add_argument("--overwrite", action="store_true", help=overwrite)


def _weights(args) -> dict:
    return {"revision": args.revision, "variant": args.variant, "overwrite": args.overwrite}


def _delta(args):
    from aegis_jax.run import delta

    delta.write(args.pipeline, args.base, args.out, **_weights(args))


def _apply(args):
    from aegis_jax.io.delta_apply import write_applied

    write_applied(args.delta, args.model, args.out, **_weights(args))
    print(f"model    {args.out}")


def _compose(args):
    from aegis_jax.run import cache, compose

    cache.enable()
    compose.write(args.deltas, args.base, args.out, by=args.by, lamb=args.lamb, seed=args.seed, **_weights(args))


def _export(args):
    from aegis_jax.io import lora

    count, lost = lora.write_lora(args.delta, args.base, args.out, rank=args.lora, names=args.names, **_weights(args))
    print(f"lora     {args.out} ({count} matrices of rank {args.lora}; {lost:.1%} of the change is lost)")
