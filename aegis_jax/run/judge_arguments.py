"""The arguments of `aegis judge`. Imports nothing heavy."""

SPEC = "who says what a picture shows: world, hf:FOLDER, nudenet:, clip:FOLDER, ... (docs/judges.md)"


def add(command) -> None:
    """Adds the command. command(name, function, help) -> subparser."""
    sub = command("judge", _judge, "Say what pictures show.")
    sub.add_argument("folder", metavar="DIR", help="pictures")
    sub.add_argument("--judge", metavar="SPEC", required=True, help=SPEC)
    sub.add_argument("--label", metavar="TEXT", action="append", default=[], help="count this one; may be repeated")
    sub.add_argument("--out", metavar="FILE.csv", help="every label's probability, a row a picture")


def _judge(args):
    from aegis_jax.run import cache, judging

    cache.enable()
    judging.judge_folder(args.folder, args.judge, args.label, args.out)
