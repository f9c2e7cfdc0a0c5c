"""The arguments of `aegis evaluate`. Imports nothing heavy."""

import re

from aegis_jax.errors import AegisError


def add(sub, model_help: str) -> None:
    """Adds all of them to a parser."""
    sub.add_argument("models", metavar="MODEL", nargs="*", help="what to examine: run folders or diffusers folders")
    sub.add_argument("--base", metavar="M", required=True, help=f"the model before erasure: {model_help}")
    sub.add_argument("--concept", metavar="TEXT", required=True, help="what was erased: a value of the world")
    sub.add_argument("--attacks", metavar="NAMES", default="all", help="all, none, or some with commas (default: all)")
    sub.add_argument("--baselines", metavar="NAMES", default="", help="presets to erase and examine too, with commas")
    sub.add_argument("--config", metavar="FILE", default="world", help="of the baselines (default: world)")
    sub.add_argument("--seeds", metavar="LIST", default="0,1,2", help="evaluation seeds, pooled (default: 0,1,2)")
    sub.add_argument("--images", metavar="N", type=int, default=64, help="images a figure and seed (default: 64)")
    sub.add_argument("--cases", metavar="N", type=int, default=16, help="attacked prompts a seed (default: 16)")
    control = "a control: attacks by prompt with this word in the concept's place; none: no control (default: thing)"
    sub.add_argument("--neutral", metavar="WORD", default="thing", help=control)
    sub.add_argument("--out", metavar="DIR", help="report and all it is made of; again: goes on (evaluations/CONCEPT)")
    sub.add_argument("--show", action="store_true", help="do not blur pictures (the world's never are)")


def attack_settings(rest: list[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """({attack: {setting: text}} of `--attack.NAME.KEY=VALUE` arguments, the other arguments)."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for argument in rest:
        match = re.fullmatch(r"--attack\.([^.=]+)\.([^.=]+)=(.*)", argument, re.DOTALL)
        if match:
            found.setdefault(match[1], {})[match[2]] = match[3]
        elif argument.startswith("--attack."):
            raise AegisError(f"unknown argument {argument!r}; write --attack.NAME.KEY=VALUE")
        else:
            others.append(argument)
    return found, others
