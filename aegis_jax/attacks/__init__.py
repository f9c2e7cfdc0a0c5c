"""Attacks that try to bring an erased concept back. `attack` is the one entry; each method has a file."""

import dataclasses
from collections.abc import Callable

from aegis_jax.attacks import ladder, p4d, probes, recall, revival, ring_a_bell, word_search
from aegis_jax.attacks.cce import CCEConfig, cce
from aegis_jax.attacks.cce import check_fit as check_cce
from aegis_jax.attacks.given import Given, Pictures, is_whole
from aegis_jax.attacks.images import checked
from aegis_jax.attacks.result import AttackResult
from aegis_jax.attacks.search import placed
from aegis_jax.attacks.soft_prompt import SoftPromptConfig, soft_prompt
from aegis_jax.attacks.soft_prompt import check_fit as check_soft_prompt
from aegis_jax.attacks.tina import TINAConfig, tina
from aegis_jax.attacks.unlearndiffatk import UnlearnDiffAtkConfig, unlearndiffatk
from aegis_jax.attacks.unlearndiffatk import plan as unlearndiffatk_plan
from aegis_jax.diffusion.conditioning import check_loaded, prompt_list
from aegis_jax.diffusion.sample import plan
from aegis_jax.errors import AegisError


@dataclasses.dataclass(frozen=True)
class Method:
    """An attack: `run(pipeline, concept, given, config, progress)` and the class of its config.

    of: what it goes for. "concept": one thing learnt from all pictures. The others ask the judge themselves: "prompt":
    words for each prompt of `given`; "picture": start noise for each of its pictures; "guided": the prompts as they
    are, drawn from a picture; "weights": the same by other weights.
    without: whether it takes pictures that do not show the concept. asks: whether it searches words
    by a classifier of the attacker's own (`Given.probability`).
    check_fit: (pipeline, concept, prompts, config) -> None; raises `AegisError` for what `run` would refuse of settings
    that do not fit the pipeline, or one of the prompts, in a moment; or None.
    """

    run: Callable
    config: type
    of: str = "concept"
    without: bool = False
    asks: bool = False
    check_fit: Callable | None = None

    @property
    def in_words(self) -> bool:
        return self.of == "prompt" or self.asks

    @property
    def says(self) -> bool:
        """Whether it shows the prompts of `given`, and a control may put another word into them."""
        return self.of in ("prompt", "guided", "weights")


def _soft_prompt(pipeline, concept: str, given: Given, config: SoftPromptConfig, progress=None) -> AttackResult:
    return soft_prompt(pipeline, concept, given.images, config, progress, original=given.original)


def _searched(run: Callable, config: type, plan: Callable) -> Method:
    """A search for words, whose `plan` is made of (pipeline, prompts, config)."""
    check = lambda pipeline, _, prompts, config: placed(pipeline, prompts, plan(pipeline, prompts, config))  # noqa: E731
    return Method(run, config, of="prompt", check_fit=check)


METHODS = {
    "soft-prompt": Method(_soft_prompt, SoftPromptConfig, check_fit=check_soft_prompt),
    "unlearndiffatk": _searched(unlearndiffatk, UnlearnDiffAtkConfig, unlearndiffatk_plan),
    p4d.HARD_PROMPT: _searched(p4d.hard_prompt, p4d.HardPromptConfig, p4d.hard_prompt_plan),
    p4d.N: _searched(p4d.p4d_n, p4d.P4DNConfig, p4d.n_plan),
    p4d.K: _searched(p4d.p4d_k, p4d.P4DKConfig, p4d.k_plan),
    "cce": Method(cce, CCEConfig, check_fit=check_cce),
    "tina": Method(tina, TINAConfig, of="picture"),
    ring_a_bell.NAME: Method(
        ring_a_bell.ring_a_bell, ring_a_bell.RingABellConfig, of="prompt", check_fit=ring_a_bell.check_fit
    ),
    ring_a_bell.EMBEDDING: Method(ring_a_bell.embedding, ring_a_bell.EmbeddingConfig, of="prompt"),
    word_search.NAME: Method(
        word_search.word_search, word_search.WordSearchConfig, asks=True, check_fit=word_search.check_fit
    ),
    ladder.NAME: Method(ladder.ladder, ladder.LadderConfig, of="prompt"),
    recall.NAME: Method(recall.recall, recall.RecallConfig, of="guided", without=True, check_fit=recall.check_fit),
    probes.NOISE: Method(probes.noise_probe, probes.NoiseConfig, of="guided", without=True),
    probes.COMPLETION: Method(probes.completion_probe, probes.CompletionConfig, of="guided", without=True),
    probes.INPAINTING: Method(probes.inpainting_probe, probes.InpaintingConfig, of="guided", without=True),
    revival.NAME: Method(revival.revival, revival.RevivalConfig, of="weights", without=True),
}


def find(method: str) -> Method:
    """Raises `AegisError` for an unknown method."""
    if method not in METHODS:
        raise AegisError(f"attack method {method!r} is unknown; choose one of: {', '.join(METHODS)}")
    return METHODS[method]


def configure(method: str, settings: dict):
    """The method's config with these settings. Raises `AegisError` for an unknown one."""
    config_class = find(method).config
    known = [field.name for field in dataclasses.fields(config_class)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise AegisError(f"attack {method} has no setting {unknown[0]!r}; it has: {', '.join(known)}")
    return config_class(**settings)


def attack(
    pipeline, concept: str, *, method: str = "soft-prompt", images, prompts=None, seeds=None, made_from=None,
    wordings=None, without=None, original=None, judge=None, similarity=None, probability=None,
    image_steps: int = 50, guidance: float = 7.5, progress=None, **settings,
) -> AttackResult:  # fmt: skip
    """Attacks an erased pipeline.

    Args:
      pipeline: the pipeline under attack.
      concept: the erased concept's text.
      method: a key of `METHODS`.
      images: uint8 (n, H, W, 3), what the concept looks like; from the model before erasure, or real ones.
      prompts, seeds: of attacks by prompt: those attacked, by default the concept's text, and the seed of the noise
        that each is tried with, by default 0 to n - 1.
      made_from: what each picture was made from, where `prompts` are a control's (`given.Given`).
      wordings: {rung: texts}, of the ladder.
      without: (images, prompts) that do not show the concept, of attacks that take them (`Method.without`).
      original: the pipeline before erasure, where the attacker has it; some attacks need it.
      judge, similarity, probability, image_steps, guidance: see `given.Given`.
      progress: called with (done, in all, mean loss); steps of all restarts are counted.
      settings: fields of the method's config class.

    Raises `AegisError` for an unknown method or setting, and for arguments of other types or lengths.
    """
    for one in (pipeline,) if original is None else (pipeline, original):
        check_loaded(one)
    if not isinstance(concept, str):
        raise AegisError(f"concept = {concept!r:.80}, wanted a text")
    config, images = configure(method, settings), checked(images, "images")
    if not is_whole(image_steps):
        raise AegisError(f"image_steps = {image_steps!r:.80}, wanted a whole number")
    _, guidance = plan(pipeline, image_steps, guidance)
    if without is not None and not (isinstance(without, (list, tuple)) and len(without) == 2):
        raise AegisError(f"without is a {type(without).__name__}, wanted a pair: images and their prompts")
    given = Given(
        images=images,
        prompts=[concept] * len(images) if prompts is None else prompt_list(prompts, "prompts"),
        seeds=range(len(images)) if seeds is None else seeds,
        original=original,
        judge=judge,
        similarity=similarity,
        probability=probability,
        steps=image_steps,
        guidance=guidance,
        made_from=None if made_from is None else prompt_list(made_from, "made_from"),
        ladder=wordings,
        without=None if without is None else Pictures(without[0], prompt_list(without[1], "without")),
    )
    return find(method).run(pipeline, concept, given, config, progress)
