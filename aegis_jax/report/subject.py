"""What an evaluation needs to know of the kind of model it examines: an embedded world, or any other by prompts.

`Embedded` (embedded.py) and `Pictured` (pictured.py) answer the same questions:

  record(kind)                 plain values that the figures of a kind of cell depend on, besides models and settings
  about()                      plain values for the report
  columns                      the figures that `plain` and `retention` give (`Column`)
  kept                         names of shares whose mean is "kept" in the chart, or ()
  retains                      whether there is anything to retain that can be measured
  guidance, steps              of images made for the judge
  usual                        {attack: settings} in place of the attack's own
  control(word)                the control's word, or None where none can be
  cases(n, seed, neutral)      what attacks by prompt and picture are given: a `Given` for each guidance
  texts(n, seed, neutral)      the prompts among them, without making an image
  collected(seed)              uint8 pictures of the concept by the base, which an attacker has
  learnt(seed)                 what attacks that learn one thing from these are given
  without(seed)                `Pictures` by the base that do not show the concept
  lacks(attack)                what the subject has not got that an attack needs, or None
  shown(images)                bool (n,), whether the judge sees the concept
  plain(pipeline, n, seed)     (figures, UNet evaluations) without attack
  retention(pipeline, n, seed) likewise of what is kept
  words                        texts whose d0 and d1 are measured
"""

import dataclasses

PLAIN, RETENTION, DIAGNOSTICS = "plain", "retention", "diagnostics"  # the kinds of cells that are no attacks


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure of a model.

    Attributes:
      kind: of the cells that it comes from.
      sense: what is better: "less", "more", or "none": to be read beside others.
      place: "summary" or "retention", the table where it stands.
      path: where it lies in a cell's figures, below its name.
      note: a line below the title.
    """

    name: str
    title: str
    sense: str
    place: str = "retention"
    kind: str = PLAIN
    path: tuple[str, ...] = ()
    note: str = ""


def near_column(place: str) -> Column:
    return Column("near", "near words", "more", place, RETENTION, ("near", "all"))


def distance_columns(rulers, sets) -> list[Column]:
    """Columns of `evaluation.retention.distances`."""
    titles = {"real": "to real images", "base": "to the base's"}
    return [
        Column(f"frechet_{ruler}_{name}", f"Frechet {titles[name]}", "less", kind=RETENTION, note=f"{ruler}'s features")
        for ruler in rulers
        for name in sets
    ]  # fmt: skip


CLIP_SCORE = Column("clip_score", "CLIP score", "more", kind=RETENTION)
