"""The `aegis` command: parses, calls, prints. Heavy imports wait until a command needs them.

Exit codes: 0 done; 2 something the user can mend, said in one line; 1 a check that failed
(`aegis verify`), or concepts that did (`aegis batch`); 128 + signal after SIGTERM or Ctrl-C, the run
saved. Schedulers take a code other than 0 as "not finished", which is what an interrupted run is.
"""

import argparse
import contextlib
import os
import re
import sys
import traceback
import warnings
from pathlib import Path

from aegis_jax import __version__
from aegis_jax.errors import AGAIN, AegisError, is_full_device
from aegis_jax.report import arguments as evaluate_arguments
from aegis_jax.run import attack_arguments, file_arguments, judge_arguments

MODEL = "a diffusers folder, a hub id, world or canvas"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"aegis: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (2>&-): what is printed there would else go to the other, or to a file
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Names and concepts may hold what a terminal that is not UTF-8 cannot show: \u68b5 instead of a traceback.
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _notice
        return _run(argv)


def _notice(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning as users of a command need it: what, but not in which line of whose source."""
    print(f"aegis: note: {' '.join(str(message).split())}", file=sys.stderr)


def _run(argv) -> int:
    is_all = argv is None  # that this process does
    argv = list(sys.argv[1:] if is_all else argv)
    if argv[:2] == ["batch", "status"]:
        argv = ["batch status", *argv[2:]]
    args, rest = _parser().parse_known_args(argv)
    try:
        if args.command is _evaluate:
            args.attack_settings, rest = evaluate_arguments.attack_settings(rest)
        args.argv = argv
        args.overrides = _overrides(rest, allowed=args.command in (_erase, _batch, _plan, _evaluate))
        return args.command(args) or 0
    except (AegisError, OSError) as error:
        print(f"aegis: error: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "code", 2)
    except MemoryError as error:
        said = f" ({error})" if str(error) else ""
        print(f"aegis: error: this machine's memory is full{said}; ask for less", file=sys.stderr)
        return 2
    except Exception as error:
        if not is_full_device(error):
            if args.command is not _batch:
                raise
            traceback.print_exc()
            return AGAIN  # a worker's own trouble: 1 would say that the batch is settled
        first = str(error).strip().splitlines()[0]
        advice = "lower --batch" if args.command in (_attack, _sample) else "take a larger device"
        print(f"aegis: error: the device's memory is full ({first}); {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        signum = getattr(error, "signum", 2)
        print(f"aegis: stopped: {str(error) or 'interrupted'}", file=sys.stderr)
        if is_all and args.command in (_sample, _attack, _evaluate):  # others have work to put away
            _end(128 + signum)
        return 128 + signum


def _end(code: int) -> None:
    """Ends the process where it stands. What XLA is compiling it goes on compiling in a thread of its own, which would
    end an interpreter that takes its leave by a segmentation fault, with a code of its own and much later.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads
            stream.flush()
    os._exit(code)


def _overrides(rest: list[str], *, allowed: bool) -> list[tuple[str, str]]:
    """`--config.key=value` arguments as (key, value) pairs; anything else is an error."""
    pairs = []
    for argument in rest:
        match = re.fullmatch(r"--config\.([^=]+)=(.*)", argument, re.DOTALL)
        if not (match and allowed):
            advice = "; write --config.key=value" if argument.startswith("--config.") else ""
            raise AegisError(f"unknown argument {argument!r}{advice}")
        pairs.append(match.groups())
    return pairs


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="aegis", description="Concept erasure for Stable Diffusion in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"aegis_jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, function, help, **more):
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False, **more)
        sub.set_defaults(command=function)
        return sub

    sub = command(
        "erase", _erase, "Erase concepts from a model and export the result.",
        epilog="Any setting can be changed with --config.key=value, e.g. --config.steps=500.",
    )  # fmt: skip
    _add_model(sub)
    sub.add_argument(
        "--concept", metavar="TEXT", action="append", help="what to erase; may be repeated (default: the config's)"
    )
    sub.add_argument("--concepts", metavar="FILE", help="the same from a .csv or .jsonl with a row each (name, words)")
    sub.add_argument("--out", metavar="DIR", help="run folder (default: runs/CONCEPTS, the next free)")
    sub.add_argument(
        "--config",
        metavar="FILE",
        help="a config file, or the name of one of ours, e.g. sd14",
    )
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the run in --out")
    how.add_argument("--auto-resume", action="store_true", help="the same if one has begun there, else begin it")
    how.add_argument("--overwrite", action="store_true", help="replace the run in --out")

    sub = command(
        "batch", _batch, "Erase many concepts, one delta file each; start it as often as there are machines.",
        epilog="Any setting can be changed with --config.key=value. The same command again goes on with what is left. "
        "aegis batch status DIR says how far it is. "
        "Exit codes: 0 all done, 1 some concepts failed for good, 2 something to mend, 134 an error of no known "
        "kind, 128 + signal.",
    )  # fmt: skip
    sub.add_argument("plan", metavar="PLAN", help="a .csv or .jsonl: name, words, config keys (docs/scale.md)")
    _add_model(sub)
    sub.add_argument("--out", metavar="DIR", required=True, help="folder that all workers see, or gs://BUCKET/PATH")
    sub.add_argument("--config", metavar="FILE", help="a config file, or the name of one of ours, e.g. sd14")
    sub.add_argument("--lanes", metavar="K", type=int, help="erasures at once on each device (default: 8)")
    lease = "after which a worker that is silent has lost its rows (default: 120)"
    sub.add_argument("--lease", metavar="SECONDS", type=float, help=lease)

    sub = command("batch status", _batch_status, "How far a batch has come.")
    sub.add_argument("out", metavar="DIR", help="the --out of aegis batch")

    sub = command(
        "plan", _plan, "Say whether a run fits on chips that are not there, and what it costs. Nothing runs.",
        epilog="Any setting can be changed with --config.key=value, e.g. --config.trainable=xattn. "
        "What is estimated, counted, compiled and assumed stands in every row (docs/plan.md).",
    )  # fmt: skip
    sub.add_argument("--model", metavar="M", help=f"sd14 or sd21 (no weights are needed), or {MODEL}")
    _add_weights(sub)
    sub.add_argument("--config", metavar="FILE", help="a config file, or the name of one of ours, e.g. sd14")
    sub.add_argument("--topology", metavar="T", required=True, help="e.g. v5e:1, v6e:2x4, v5p, h100:8, gpu:24GiB")
    sub.add_argument("--lanes", metavar="K", type=int, default=1, help="runs that share each chip (default: 1)")
    sub.add_argument("--concepts", metavar="N", type=int, default=1, help="how many to erase, one a run (default: 1)")
    sub.add_argument("--price", metavar="DOLLARS", type=float, help="of a chip-hour")
    sub.add_argument("--utilisation", metavar="SHARE", type=float, help="of the chip's peak (default: assumed)")
    sub.add_argument("--compile", action="store_true", help="ask the TPU's compiler (extra plan; minutes or more)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    file_arguments.add(command, _add_weights, MODEL)

    sub = command("sample", _sample, "Generate images.")
    _add_model(sub, required=True)
    prompts = sub.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", action="append", help="may be repeated")
    prompts.add_argument(
        "--prompts", metavar="FILE",
        help="a .csv with a column prompt and, if each has its own, evaluation_seed, sd_seed or seed; "
        "or a text file with a prompt a line",
    )  # fmt: skip
    sub.add_argument("--out", metavar="DIR", default="samples", help="folder of the PNGs (default: samples)")
    sub.add_argument("--images", metavar="N", type=int, default=1, help="images per prompt, of seed, seed + 1, ...")
    sub.add_argument("--seed", type=int, default=0, help="of every prompt that brings none (default: 0)")
    sub.add_argument("--height", metavar="PIXELS", type=int, help="default: the model's own size")
    sub.add_argument("--width", metavar="PIXELS", type=int)
    sub.add_argument("--batch", metavar="N", type=int, help="images per network call (default: what fits well)")
    sub.add_argument("--steps", type=int, default=25, help="DDIM steps")
    sub.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance scale")
    sub.add_argument("--negative-prompt", metavar="TEXT", default="")
    sub.add_argument("--overwrite", action="store_true", help="replace images of the same name")

    sub = command("verify", _verify, "Compare a diffusers folder here and in PyTorch diffusers.")
    sub.add_argument("folder", metavar="DIR", help="a diffusers folder, a run folder, or a hub id")
    _add_weights(sub)
    sub.add_argument("--prompt", metavar="TEXT", default="a photo")
    sub.add_argument("--steps", type=int, default=25, help="DDIM steps of the compared image")

    sub = command(
        "attack", _attack, "Try to bring an erased concept back.",
        epilog="For the world the original model makes the images, and its judge says how often it worked.",
    )  # fmt: skip
    _add_model(sub, required=True)
    attack_arguments.add(sub, MODEL)
    judge_arguments.add(command)

    sub = command(
        "evaluate", _evaluate, "Attack models, their base and baselines; one page of figures, pictures and commands.",
        epilog="--attack.NAME.KEY=VALUE changes a setting of an attack, --config.KEY=VALUE one of the baselines. "
        "The same command goes on after an interruption (docs/evaluate.md).",
    )  # fmt: skip
    evaluate_arguments.add(sub, MODEL)

    world = command("world", None, "The embedded world: look at it.")
    actions = world.add_subparsers(title="actions", metavar="ACTION", required=True)
    sub = actions.add_parser("show", help="a picture of what it generates", allow_abbrev=False)
    sub.set_defaults(command=_world_show)
    sub.add_argument("--out", metavar="FILE.png", default="world.png")
    return parser


def _add_model(sub, required: bool = False) -> None:
    sub.add_argument("--model", metavar="M", required=required, help=MODEL)
    _add_weights(sub)


def _add_weights(sub) -> None:
    sub.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    sub.add_argument("--variant", metavar="V", help="which weights, e.g. fp16 for model.fp16.safetensors")


def _erase(args):
    from aegis_jax.run import cache, console

    cache.enable()
    console.erase(
        args.model, _concepts(args), config=args.config, overrides=_weights(args) + args.overrides,
        out=args.out, resume=args.resume, auto_resume=args.auto_resume, overwrite=args.overwrite,
    )  # fmt: skip


def _concepts(args) -> list[str] | None:
    if args.concepts is None:
        return args.concept
    from aegis_jax.batch import rows
    from aegis_jax.io.hub import expand

    return [*(args.concept or ()), *rows.together(expand(args.concepts))]


def _plan(args):
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device is needed, and with libtpu JAX would look for one
    from aegis_jax.plan import report

    found = report.report(
        args.model, None, config=args.config, overrides=_weights(args) + args.overrides, topology_name=args.topology,
        lanes=args.lanes, count=args.concepts, price=args.price, share=args.utilisation, compile=args.compile,
    )  # fmt: skip
    print(report.to_json(found) if args.json else report.text(found), end="\n" * args.json)


def _batch(args):
    from aegis_jax.batch import console
    from aegis_jax.run import cache

    cache.enable()
    return console.batch(
        args.plan, args.model, args.out, config=args.config, overrides=_weights(args) + args.overrides,
        lanes=args.lanes, lease=args.lease,
    )  # fmt: skip


def _batch_status(args):
    from aegis_jax.batch import status

    status.show(args.out)


def _weights(args) -> list[tuple[str, str]]:
    return [(key, value) for key in ("revision", "variant") if (value := getattr(args, key)) is not None]


def _sample(args):
    from aegis_jax.run import cache, console

    cache.enable()
    console.sample(
        args.model, args.prompt, args.out, file=args.prompts, revision=args.revision, variant=args.variant,
        images=args.images, overwrite=args.overwrite, height=args.height, width=args.width, batch=args.batch,
        seed=args.seed, steps=args.steps, guidance=args.guidance, negative_prompt=args.negative_prompt,
    )  # fmt: skip


def _verify(args):
    from aegis_jax.run import cache, verify

    cache.enable()
    report = verify.verify(
        args.folder, revision=args.revision, variant=args.variant, prompt=args.prompt, steps=args.steps
    )
    print(report.text())
    return 0 if report.agrees else 1


def _attack(args):
    from aegis_jax.run import attack, cache

    cache.enable()
    attack.attack(
        args.model, args.concept, method=args.method, revision=args.revision, variant=args.variant, images=args.images,
        prompts=args.prompts, ladder=args.ladder, without=args.without, cases=args.cases, out=args.out,
        original=args.original, neutral=args.neutral, guidance=args.guidance, image_steps=args.image_steps,
        judge=args.judge, judge_label=args.judge_label,
        **attack_arguments.given(args),
    )  # fmt: skip


def _evaluate(args):
    from aegis_jax.report import evaluate
    from aegis_jax.run import cache

    cache.enable()
    evaluate.command(
        args.models, args.argv, base=args.base, concept=args.concept, settings=args.attack_settings,
        overrides=args.overrides, show=args.show, **evaluate_arguments.given(args),
    )  # fmt: skip


def _world_show(args):
    from aegis_jax import world
    from aegis_jax.run import cache

    cache.enable()
    world.show(Path(args.out))
    print(f"wrote {args.out}")
