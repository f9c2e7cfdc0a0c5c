"""The arguments of `aegis evaluate`. Imports nothing heavy."""

import re

from aegis_jax.errors import AegisError
from aegis_jax.run.judge_arguments import SPEC


def add(sub, model_help: str) -> None:
    """Adds all of them to a parser."""
    sub.add_argument("models", metavar="MODEL", nargs="*", help="what to examine: run folders or diffusers folders")
    sub.add_argument("--base", metavar="M", required=True, help=f"the model before erasure: {model_help}")
    sub.add_argument("--concept", metavar="TEXT", required=True, help="what was erased; of world or canvas a value")
    sub.add_argument("--attacks", metavar="NAMES", default="all", help="all, none, or some with commas (default: all)")
    sub.add_argument("--baselines", metavar="NAMES", default="", help="presets to erase and examine too, with commas")
    sub.add_argument(
        "--config", metavar="FILE", help="of the baselines (default: of world or canvas its own, else the paper's)"
    )
    sub.add_argument("--seeds", metavar="LIST", default="0,1,2", help="evaluation seeds, pooled (default: 0,1,2)")
    sub.add_argument("--images", metavar="N", type=int, default=64, help="images a figure and seed (default: 64)")
    sub.add_argument("--cases", metavar="N", type=int, help="attacked prompts a seed (16; of --prompts all)")
    control = "a control: attacks by prompt with this word in the concept's place; none: no control (default: thing)"
    sub.add_argument("--neutral", metavar="WORD", help=control)
    near = "near concepts that are to be kept, with commas, besides those that are found"
    sub.add_argument("--near", metavar="WORDS", default="", help=near)
    sub.add_argument("--out", metavar="DIR", help="report and all it is made of; again: goes on (evaluations/CONCEPT)")
    sub.add_argument("--show", action="store_true", help="do not blur pictures (those of world and canvas never are)")
    other = sub.add_argument_group("of a base that is not world or canvas")
    other.add_argument("--judge", metavar="SPEC", help=SPEC)
    other.add_argument("--label", metavar="TEXT", help="its label that counts as the concept (default: the concept)")
    other.add_argument(
        "--prompts", metavar="FILE", help="what asks for the concept; .csv rows may bring seed, guidance"
    )
    other.add_argument("--guidance", type=float, help="of images whose row brings none (7.5)")
    other.add_argument("--image-steps", metavar="N", type=int, help="their DDIM steps (50)")
    other.add_argument("--retain", metavar="FILE", help="neutral prompts, such as COCO's: what is kept of the rest")
    other.add_argument("--real", metavar="DIR", help="real pictures of such, for a Frechet distance to them")
    other.add_argument("--clip", metavar="M", help="a CLIPModel: CLIP score, and features for the Frechet distance")
    other.add_argument("--beside", metavar="WORD", help="goes with the concept and is harmless, as person with nudity")


def given(args) -> dict:
    """What the parser found, as `plan.plan` takes it."""
    names = "attacks baselines config seeds images cases neutral near out judge label prompts guidance image_steps"
    return {name: getattr(args, name) for name in (*names.split(), "retain", "real", "clip", "beside")}


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
