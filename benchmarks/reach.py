"""How far a closed form moves the values of prompts on the embedded world: of the concept's word, and of other prompts.

    python -m benchmarks reach                  every closed form, as published and with the world's other values held
    python -m benchmarks reach --presets uce    one, or several

For a concept's prompt "a striped red star", over the values of all cross-attention layers:

  way     at the tokens behind the last word (EOS, padding): the change's share of the way to the same prompt without
          the concept's word, 1 if it goes all of it; these tokens see the whole prompt, and a closed form was asked
          for the concept's own text alone
  others  the change of a prompt without the concept ("a dotted blue heart"), beside the values themselves; BOS left out

Nothing is sampled. Prints a Markdown table, in per cent, and writes the shares to benchmarks/results/closed_reach.json.
"""

import numpy as np

from benchmarks import study, trials

PROMPT, OTHER = "a striped red star", "a dotted blue heart"
WITHOUT = {"star": "a striped red thing", "red": "a striped star", "striped": "a red star"}


def reach(pipeline, run) -> tuple[float, float]:
    """(way, others) of a closed form's run for its one concept."""
    from aegis_jax.erasure.closed.rows import encoded
    from aegis_jax.models.model import flatten

    (concept,) = run.concepts
    texts = encoded(pipeline, [PROMPT, WITHOUT[concept], OTHER])
    said, unsaid, other = (each.embedding for each in texts.values())
    behind = slice(texts[PROMPT].last + 1, None)
    _, solution = run.method.start(pipeline, [concept], run.erase, None)
    weights = flatten(pipeline.unet.params)
    along = way = moved = size = 0.0
    for path, change in solution.drift.items():
        if path.endswith(".to_v.kernel"):
            w, change = (np.asarray(x, np.float64) for x in (weights[path], change))
            whole = (unsaid - said)[behind] @ w
            along, way = along + np.sum(said[behind] @ change * whole), way + np.sum(whole**2)
            moved, size = moved + np.sum((other[1:] @ change) ** 2), size + np.sum((other[1:] @ w) ** 2)
    return float(along / way), float(np.sqrt(moved / size))


def main(argv: list[str]) -> None:
    options = trials.parser(__doc__, "closed_reach.json")
    options.add_argument("--presets", nargs="+", default=study.CLOSED, help="names of study.CLOSED")
    given = options.parse_args(argv)

    import aegis_jax

    pipeline = aegis_jax.load_pipeline("world")
    found = {name: [reach(pipeline, study.settings(cell)) for cell in study.closed([name])] for name in given.presets}
    head = ["per cent", *(f"{concept}: {what}" for concept in study.CONCEPTS for what in ("way", "others"))]
    print(trials.table(head, [[name, *(f"{100 * x:.0f}" for x in np.ravel(pairs))] for name, pairs in found.items()]))
    shares = {name: dict(zip(study.CONCEPTS, pairs)) for name, pairs in found.items()}
    trials.write(given.out, {"way, others": shares, "about": trials.about()})
