"""UA, IRA and CRA of UnlearnCanvas (Zhang et al., 2024), of any judge that has a group of labels for each domain.

Its images are of prompts that ask for one value of each of several domains, there style and object: "An {object} image
in {style} style.". What is erased is one value of one domain.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.evaluation.interval import share


def accuracies(
    asked: Mapping[str, Sequence[str]], answers: Mapping[str, Sequence[str]], domain: str, target: str
) -> dict[str, dict]:
    """Shares with count, n and interval, of m images.

      UA            of the images that ask for the target: not classified as the target
      IRA           of the others: classified, in the target's domain, as what was asked for
      CRA           of all images: classified, in the other domains, as what was asked for
      CRA_retained  the same of the images that do not ask for the target

    asked, answers: {domain: m values}, what the prompt says and what the classifier says. CRA counts the target's
    images too, as the authors' script does; what becomes of an object in an erased style is a matter of taste, so
    CRA_retained leaves them out. With several other domains their images count together.

    Raises `AegisError` where the two do not fit each other, or nothing asks for the target.
    """
    asked, answers = ({name: np.asarray(row) for name, row in rows.items()} for rows in (asked, answers))
    count = {len(row) for row in (*asked.values(), *answers.values())}
    if asked.keys() != answers.keys() or len(count) != 1:
        raise AegisError(f"asked {sorted(asked)} and answered {sorted(answers)}, with {sorted(count)} values each")
    if domain not in asked:
        raise AegisError(f"domain {domain!r} is none of {sorted(asked)}")
    wanted = asked[domain] == target
    if not wanted.any():
        raise AegisError(f"no image asks for {target!r} of {domain}")
    right = {name: asked[name] == answers[name] for name in asked}
    others = [right[name] for name in asked if name != domain]

    def of(hits: list[np.ndarray]) -> dict:
        return share(sum(int(row.sum()) for row in hits), sum(len(row) for row in hits))

    return {
        "UA": of([answers[domain][wanted] != target]),
        "IRA": of([right[domain][~wanted]]),
        "CRA": of(others),
        "CRA_retained": of([row[~wanted] for row in others]),
    }
