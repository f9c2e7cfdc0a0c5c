"""What an evaluation is made of: models (rows), attacks, cells; all of it checked before anything starts."""

import dataclasses
import hashlib
import importlib.util
import json
import numbers
from pathlib import Path

import jax

from aegis_jax import __version__, worlds
from aegis_jax.attacks import find
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import expand, place
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.judges.judge import digest as digest_of
from aegis_jax.models.model import hash_into
from aegis_jax.report import asked as of_user
from aegis_jax.report.chosen import chosen, fitting, listed, names, possible
from aegis_jax.report.embedded import Embedded
from aegis_jax.report.pictured import Pictured
from aegis_jax.report.rows import Row, baseline_row, check_same_kind, model_row
from aegis_jax.report.subject import DIAGNOSTICS, PLAIN, RETENTION
from aegis_jax.run.config import pairs
from aegis_jax.run.slug import slug

SEEDS = 100_000  # below it the seeds of cases, prompts and noise stay apart
CASES = 16  # prompts to attack a seed, on an embedded world


@dataclasses.dataclass(frozen=True)
class Plan:
    """An evaluation.

    Attributes:
      subject: what kind of model is examined, and how (subject.py).
      attacks: {name: settings}.
      neutral: the control's word, or None.
      settings, config, overrides: what the user gave of attacks and baselines, for the commands in the report.
      options: likewise of the subject, (flag, value).
      left_out: {attack: why not}, of all attacks those that cannot be.
    """

    subject: object
    text: str
    base: str
    rows: list[Row]
    attacks: dict[str, object]
    seeds: tuple[int, ...]
    images: int
    cases: int
    neutral: str | None
    out: Path
    settings: dict[str, dict[str, str]]
    config: str | None
    overrides: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...] = ()
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def cells(self) -> list[tuple[Row, dict]]:
        """(row, cell) of all there is to measure; a cell names all that its figures depend on but for the models."""
        found = []
        unattacked = (PLAIN, *([RETENTION] if self.subject.retains else []), DIAGNOSTICS)
        for seed in self.seeds:
            for kind in (*unattacked, *self.attacks):
                record = json.loads(json.dumps(self.subject.record(kind)))
                for neutral in self._words(kind):
                    found += [(row, self._cell(kind, neutral, seed) | record) for row in self.rows]
        return found

    def _words(self, kind: str) -> list[str | None]:
        """The neutral words of a kind of cell: None is the concept itself."""
        controlled = self.neutral is not None and kind in self.attacks and find(kind).says
        return [None, self.neutral] if controlled else [None]

    def _cell(self, kind: str, neutral: str | None, seed: int) -> dict:
        config = self.attacks.get(kind)
        return {
            "kind": kind, "settings": None if config is None else dataclasses.asdict(config), "neutral": neutral,
            "seed": seed, "images": self.images, "cases": self.cases, "concept": self.text,
        }  # fmt: skip


def versions() -> dict:
    return {"aegis_jax": __version__, "jax": jax.__version__, "backend": jax.default_backend()}


def key(cell: dict) -> str:
    """The name of a cell's files: a hash of what it depends on."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:24]


def model_digest(pipeline) -> str:
    """sha256 of all that a pipeline's pictures depend on: weights and configs, tokenizer, noise schedule."""
    digest = hashlib.sha256(json.dumps(pipeline.scheduler, sort_keys=True).encode())
    words = [file for file in pipeline.tokenizer.folder.iterdir() if file.suffix in (".json", ".txt")]
    digest.update(f"tokenizer {pipeline.tokenizer.model_max_length} {digest_of(words)}".encode())
    for name in ("unet", "vae", "text_encoder"):
        hash_into(digest, name, getattr(pipeline, name))
    return digest.hexdigest()


def plan(
    models, base, concept, *, attacks="all", settings=None, baselines="", config=None, overrides=(),
    seeds="0,1,2", images=64, cases=None, neutral=None, near="", out=None, **options,
) -> tuple[Plan, dict]:  # fmt: skip
    """(the plan, {row's name: pipeline} of the models that are there). Raises `AegisError` for all that cannot be.

    attacks, baselines, seeds, near: lists as on the command line, or Python's. settings: {attack: {setting: text}};
    overrides: (key, text) pairs of the baselines' settings. cases: None for 16 on an embedded world and a prompt set's
    every row elsewhere. neutral: "none" for no control, None for "thing" where it can be. options: `asked.OPTIONS`, of
    models that are of no embedded world.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise AegisError(f"the report needs {package}: pip install 'aegis_jax[report]'")
    for flag, count, least in (("images", images, 2), ("cases", 1 if cases is None else cases, 1)):
        if not isinstance(count, numbers.Integral) or count < least:
            raise AegisError(f"--{flag} {count}: wanted a whole number, {least} or more")
    images, cases = int(images), None if cases is None else int(cases)
    if not isinstance(concept, str):
        raise AegisError(f"concept = {concept!r:.80}, wanted a text")
    overrides = pairs(overrides)
    attacks, baselines, near = listed("attacks", attacks), listed("baselines", baselines), listed("near", near)
    drawn = _seeds(listed("seeds", seeds))
    original = load_pipeline(base)
    found = worlds.of(original)
    within = found[0].name if found else None
    taken = chosen(attacks, settings or {}, Embedded.usual if within else Pictured.usual)
    if set(options) - set(of_user.OPTIONS):
        raise TypeError(f"evaluate takes no {sorted(set(options) - set(of_user.OPTIONS))}")
    options = dict.fromkeys(of_user.OPTIONS) | options
    wanted = names(baselines)
    if not wanted and (config is not None or overrides):
        flag = f"--config {config}" if config is not None else f"--config.{overrides[0][0]}"
        raise AegisError(f"{flag}: settings are those of baselines, so name some by --baselines")
    config = config or within
    subject = _subject(original, within, concept, near, options)
    taken, lacking = possible(subject, taken, everything=attacks == "all")
    if cases is None:
        cases = CASES if within else len(subject.asked.prompts.prompts)
    control = None if neutral == "none" else subject.control(neutral or "thing")
    if neutral not in (None, "none") and control is None:
        raise AegisError(f"--neutral {neutral}: a prompt does not say {concept!r}, and would control nothing")
    unnamed = set(taken) - set(settings or {}) if attacks == "all" else frozenset()
    taken, unfit = fitting(original, subject, taken, cases, drawn, control, unnamed=unnamed)
    folder = expand(out or Path("evaluations") / slug(concept)).absolute()
    rows, loaded = [Row("base", "base", place(base))], {"base": original}
    for given in [models] if isinstance(models, str | Path) else models:
        row = model_row(given, rows)
        pipeline = load_pipeline(row.model)
        check_same_kind(given, pipeline, original)
        rows.append(row)
        loaded[row.name] = pipeline
    for name in wanted:
        rows.append(baseline_row(name, base, concept, config, overrides, folder, rows))
    said = [("near", near)] if near else []
    said += [(name, str(value)) for name, value in options.items() if value is not None]
    asked = (settings or {}, config and str(config), tuple(overrides), tuple(said), lacking | unfit)
    return Plan(subject, concept, place(base), rows, taken, drawn, images, cases, control, folder, *asked), loaded


def _subject(original, within: str | None, concept: str, near: str, options: dict):
    """within: the embedded world that the model is of, if it is one."""
    if not concept.strip():
        raise AegisError("--concept is empty: wanted what was erased")
    if within is None:
        return Pictured(original, concept, of_user.asked(concept, near, options))
    given = [name for name, value in options.items() if value is not None]
    if given:
        flag = given[0].replace("_", "-")
        raise AegisError(f"--{flag} goes with another base: on the {within} its own judge counts, in its own way")
    return Embedded(original, concept, names(near), within)


def _seeds(text: str) -> tuple[int, ...]:
    found = names(text)
    most = len(str(SEEDS))  # digits; Python refuses to read thousands of them
    if not found or not all(n.isdecimal() and len(n) <= most and int(n) < SEEDS for n in found):
        raise AegisError(f"--seeds {text!r}: wanted whole numbers from 0 to {SEEDS - 1}, with commas between")
    return tuple(dict.fromkeys(map(int, found)))
