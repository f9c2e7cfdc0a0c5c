"""What `aegis attack` does between parsing and printing.

On the world its judge counts what comes back; with the user's pictures a judge of his choice (--judge) does. Without
one, what comes out is written for his eyes and no success is claimed.
"""

import contextlib
import dataclasses
import signal
import threading
from pathlib import Path

import jax
import numpy as np

from aegis_jax import worlds
from aegis_jax.attacks import METHODS, configure, find
from aegis_jax.attacks.given import Given, Viewer
from aegis_jax.attacks.ladder import NAME as LADDER
from aegis_jax.diffusion.sample import latent_shape, plan
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import expand, place
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.run import replay
from aegis_jax.run.attack_given import of_folder
from aegis_jax.run.attack_printed import print_counts, print_rates
from aegis_jax.run.console import made
from aegis_jax.run.judging import Question, in_words, question
from aegis_jax.run.progress import Progress
from aegis_jax.run.slug import numbered

# How an attack's pictures are made, but of the world; how many of each restart; how many prompts on the world.
GUIDANCE, STEPS, PICTURES, CASES = 7.5, 50, 4, 16
_STARTS = 0x57A475  # so that no other part of the program draws the same noise


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived while an attack ran."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclasses.dataclass(frozen=True)
class Job:
    """An attack that is about to run.

    Attributes:
      pipeline, original: under attack, and before erasure (of the world it is known) or None.
      asked: the user's judge, or None.
      guidance, steps: of the pictures that come out.
      about: what attack.json says of all this.
    """

    pipeline: object
    original: object
    concept: str
    method: str
    config: object
    guidance: float
    steps: int
    about: dict
    asked: Question | None = None

    def run(self, given: Given):
        """The attack's result; shows how it goes on."""
        progress, parts = Progress(), 100  # what the attacks count differs, so per cent are shown
        progress.start(0, parts)
        show = lambda done, total, loss: progress.update(parts * done // total, loss)  # noqa: E731
        try:
            return METHODS[self.method].run(self.pipeline, self.concept, given, self.config, show)
        finally:
            progress.end()


def attack(
    model, concept, *, method="soft-prompt", images=None, prompts=None, ladder=None, without=None, cases=None,
    out=None, original=None, guidance=None, image_steps=None, neutral=None, revision=None, variant=None, seed=0,
    judge=None, judge_label=None, **settings,
) -> None:  # fmt: skip
    """`aegis attack`.

    settings: what the user gave of the method's config; what he left out is the method's own or, on the world, what
    evaluation/cases.py has for it. prompts: a file with one for each picture of the folder `images`; cases: on the
    world instead, how many. ladder: a file of wordings. without: a folder of pictures that do not show the concept.
    original: the model before erasure, or None (of the world it is known). guidance and image_steps: of the pictures
    that come out, None for those of the model's kind. neutral: the word that stands in place of the concept's. seed: of
    what the attack draws and, on the world, of what it is given. judge: a spec (`aegis_jax.judges`), with `images`;
    judge_label: which of its labels counts, by default the concept. Raises `AegisError` for whatever does not go with
    the method or with the model.
    """
    from aegis_jax.evaluation import cases as world_cases
    from aegis_jax.evaluation import world
    from aegis_jax.evaluation.attacked import attacker_images
    from aegis_jax.world import quality

    if not concept.strip():
        raise AegisError("--concept is empty: wanted what was erased")
    files = {"prompts": prompts, "ladder": ladder, "without": without}
    _check_flags(method, settings, files | {"cases": cases}, neutral)
    if not 0 <= seed < 2**32:
        raise AegisError(f"--seed: seed={seed}, wanted 0 to 2**32 - 1")
    settings |= {name: value for name, value in (("seed", seed), ("neutral", neutral)) if _has(method, name, value)}
    pipeline = load_pipeline(model, revision=revision, variant=variant)
    embedded, base = worlds.of(pipeline) or (None, None)
    value = world.find(concept, embedded.name) if embedded and images is None else None
    if value is None and images is None:
        raise AegisError("no --images given: an attack needs pictures of the concept")
    look = {"guidance": guidance, "image_steps": image_steps, "judge": judge, "judge_label": judge_label}
    of_pictures = files | look
    if method == "soft-prompt":
        of_pictures["out"] = out
    _check_pictures(value is not None, cases, of_pictures)
    if judge_label is not None and judge is None:
        raise AegisError("--judge-label goes with --judge")
    asked = None if judge is None else question(judge, concept if judge_label is None else judge_label)
    own = (quality.GUIDANCE, quality.STEPS) if embedded else (GUIDANCE, STEPS)
    guidance, steps = (usual if given is None else given for given, usual in zip((guidance, image_steps), own))
    config = configure(method, (world_cases.SMALL.get(method, {}) if embedded else {}) | settings)
    before = base if original is None else load_pipeline(original)
    known = embedded.name if embedded and original is None else original and place(original)
    about = {
        "method": method, "settings": dataclasses.asdict(config), "concept": concept, "neutral": neutral,
        "model": place(model), "original": known,
        "guidance": guidance, "steps": steps, "judge": asked and asked.judge.record(asked.label),
    }  # fmt: skip
    job = Job(pipeline, before, concept, method, config, guidance, steps, about, asked)
    folder = expand(out or "attack") if out or value is None else None
    if folder is not None and folder.exists():  # told before anything is computed, and looked at again afterwards
        raise AegisError(f"{folder} exists: choose another --out")
    plan(pipeline, steps, guidance)  # what cannot be sampled afterwards is refused before the attack
    if value is None:
        given = of_folder(job, expand(images), neutral, **files)
    elif method == "soft-prompt":
        return _family(job, value)
    elif find(method).of == "concept":
        pictures = attacker_images(before, value, seed=seed)
        given = world_cases.of_concept(before, value, concept, pictures)
    else:
        given = world_cases.cases(before, value, CASES if cases is None else cases, seed=seed, neutral=neutral)
        if find(method).without:
            given = dataclasses.replace(given, without=world_cases.without(before, value, seed=seed))
    with _stopped_by_sigterm(), contextlib.nullcontext() if folder is None else made(folder, is_new=True):
        _given(job, given, value, folder)


@contextlib.contextmanager
def _stopped_by_sigterm():
    """The first SIGTERM, which would leave an empty folder that refuses the next attempt, raises `Stopped`; a second
    one acts as usual, and a handler of the user's own stays.

    Outside the main thread Python allows no signal handlers.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(signum, frame):
        signal.signal(signum, signal.SIG_DFL)
        raise Stopped(signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _has(method: str, name: str, value) -> bool:
    """Whether a value was given that the method's config has a field for."""
    return value is not None and name in find(method).config.__dataclass_fields__


def _check_flags(method: str, settings: dict, of_cases: dict, neutral) -> None:
    """Refuses what does not go with the method."""
    kind, known = find(method), list(find(method).config.__dataclass_fields__)
    wrong = [name for name in settings if name not in known]
    fits = {"prompts": kind.says, "cases": kind.of != "concept", "without": kind.without, "ladder": method == LADDER}
    fits["neutral"] = kind.says or "neutral" in known
    wrong += [name for name, value in (of_cases | {"neutral": neutral}).items() if value is not None and not fits[name]]
    if wrong:
        own = ", ".join(_flag(name) for name in known if name != "seed") or "none"
        raise AegisError(f"{_flag(wrong[0])} does not go with --method {method}; its own are {own}")
    at = settings.get("place", "before")
    if neutral is not None and kind.of == "concept" and at != "neutral":
        raise AegisError(f"--neutral goes with --place neutral: at place {at!r} no such word stands")


def _check_pictures(judged: bool, cases, of_pictures: dict) -> None:
    """Refuses what goes with the user's pictures where the world's judge is asked, and the other way round."""
    for name, value in of_pictures.items():
        if judged and value is not None:
            raise AegisError(f"{_flag(name)} goes with --images: on the world the judge counts, in its own way")
    if cases is not None and not judged:
        raise AegisError("--cases goes without --images: each picture is a case")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(job: Job, given: Given, value, out: Path | None) -> None:
    """Attacks with what is given and prints what came of it; pictures and files go into `out`.

    value: the world's, for its judge; None where the user's judges, or nobody.
    """
    from aegis_jax.evaluation.cases import counts, rates

    found, about, of = job.run(given), job.about, find(job.method).of
    if found.outcomes is not None:
        about = about | {"outcomes": counts(found, _rows(given, found))}
        print_counts(of, about["outcomes"])
    elif value is not None:
        about = about | {"shown": rates(job.pipeline, found, value, seed=job.config.seed)}
        print_rates(value, about["shown"], "under what was found")
    if found.generated:
        print(f"the search drew {found.generated} pictures")
    if out is not None:
        pictures = {"concept": _by_restart, "picture": _by_picture}.get(of, _by_prompt)(job, given, found)
        _write(job, found, pictures, about, out)


def _rows(given: Given, found) -> int:
    """Of each prompt: its restarts, or its rungs."""
    return len(found.prompts) // len(given.prompts)


def _by_prompt(job: Job, given: Given, found) -> list[replay.Picture]:
    """A picture of every row, from its prompt's own noise or that with which it showed the concept."""
    prompts, restarts = len(given.prompts), _rows(given, found)
    seeds = found.seeds or [seed for seed in given.seeds for _ in range(restarts)]
    starts = Viewer(job.pipeline, given, 1).noise(seeds) if found.latents is None else found.latents
    named = [seed if found.latents is None else None for seed in seeds]  # a start of the attack's own has no seed
    names = [
        f"prompt-{numbered(prompt, prompts)}-restart-{numbered(restart, restarts, 1)}"
        for prompt in range(prompts)
        for restart in range(restarts)
    ]
    return [replay.Picture(name, k, starts[k], named[k], k % restarts) for k, name in enumerate(names)]


def _by_picture(job: Job, given: Given, found) -> list[replay.Picture]:
    """What comes back of every picture, from the noise found."""
    count = len(found.latents)
    return [replay.Picture(f"picture-{numbered(k, count)}", k, start) for k, start in enumerate(found.latents)]


def _by_restart(job: Job, given: Given, found) -> list[replay.Picture]:
    """Pictures of every restart, and its loss printed."""
    shape, pictures = (PICTURES, *latent_shape(job.pipeline)), []
    for restart in range(len(found.prompts)):
        starts = np.random.default_rng([_STARTS, job.config.seed, restart]).standard_normal(shape, np.float32)
        pictures += [
            replay.Picture(f"restart-{restart}-{k}", restart, starts[k], None, restart) for k in range(PICTURES)
        ]
        first, last = found.losses[0, restart], found.losses[-1, restart]
        own = ", the attacker's pick" if restart == found.pick else ""
        goal = f"{job.config.goal} " if hasattr(job.config, "goal") else ""
        print(f"restart {restart}: {goal}loss {first:.4f} -> {last:.4f}{own}")
    return pictures


def _write(job: Job, found, pictures: list[replay.Picture], about: dict, out: Path) -> None:
    from aegis_jax.evaluation.attacked import sample_conditioning

    rows = np.array([picture.row for picture in pictures])
    cond = jax.tree.map(lambda x: np.asarray(x)[rows], found.conditioning)
    start = np.stack([picture.start for picture in pictures])
    images = found.images
    if images is None:
        images = sample_conditioning(job.pipeline, cond, start, steps=job.steps, guidance=job.guidance)
    if job.asked is not None and found.outcomes is None:
        shown = job.asked.counted(images)
        about = about | {"outcomes": {"pictures": shown}}
        print(f"the judge sees {job.asked.label!r} in {in_words(shown)} of the pictures that came out")
    replay.write(out, found, pictures, images, about)
    print(f"wrote {len(pictures)} images to {out}")


def _family(job: Job, value) -> None:
    """Attacks the world by one member of the soft-prompt family and prints how often its judge sees the concept."""
    from aegis_jax.evaluation.attacked import attack_family

    config, progress = job.config, Progress()
    progress.start(0, config.steps)
    found = attack_family(
        job.original, job.pipeline, value, {"it": config}, seed=config.seed, text=job.concept,
        progress=lambda done, steps, loss: progress.update(done * config.steps // steps, loss),
    )  # fmt: skip
    print_rates(value, found["members"]["it"], "under soft prompts")
