"""Every method by the name that tables, model cards and the command line use (`method=`); docs/method.md has them all.

A preset is a method with settings. Settings of scale (steps, batch, learning rate, trainable tensors, latents' pool)
are those of the paper unless a config file says otherwise, so that presets compare at the same scale. Where one of them
makes the method (the steps of a closed form, what esd-u trains) it is the preset's own: a change of method neither
brings another value nor leaves it behind.
"""

import dataclasses
import difflib

from aegis_jax.erasure import advunlearn, aegis, age, stereo
from aegis_jax.erasure.aegis.config import DrawnWordsConfig, LatentsOf2025
from aegis_jax.erasure.closed.room import METHODS as CLOSED
from aegis_jax.erasure.method import Method
from aegis_jax.errors import AegisError


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named method: what it is in a line, the room it is of, its settings, and which keys of SCALE are its own."""

    name: str
    about: str
    method: Method
    settings: object
    own: frozenset = frozenset()


def _changed(settings, changes: dict):
    """Frozen settings with some fields replaced; a dict replaces fields of a group."""
    inner = {k: _changed(getattr(settings, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return dataclasses.replace(settings, **inner)


def _merge(*changes: dict) -> dict:
    result: dict = {}
    for change in changes:
        for key, value in change.items():
            result[key] = result.get(key, {}) | value if isinstance(value, dict) else value
    return result


_RELEASED = {"grp": {"mu": 0.2, "cap": 1e6}, "latents": {"offset": True}}
_LATEST = {"soft": {"life": "run"}}
_NO_GRP = {"grp": {"rule": "none"}}
_ONE_LATENT = {"latents": {"shared": True}}
_TWO_LATENTS = {"latents": {"shared": False}}
_WORDS = {"words": {"preserve": 5.0, "context": "push"}}
_PLUS = {"soft": {"life": "run", "tokens": 4, "prefixes": 4, "gamma": 5e-3}, **_NO_GRP, **_ONE_LATENT, **_WORDS}
_NEAR = {"words": DrawnWordsConfig(**_WORDS["words"])}
_SHOWN = _merge(_PLUS, {"words": {"context": "shown"}})
_ESD = {"soft": {"use": "none", "prefixes": 1}, **_NO_GRP, **_ONE_LATENT}
_ESD_2025 = _ESD | {"latents": LatentsOf2025(shared=True), "steps": 200, "learning_rate": 5e-5}
_STILL = {"soft": {"beta": 0.0, "gamma": 0.0}}  # random prefixes, no sign steps
_UCE_2023 = {"tokens": "from_last", "preserve": ("",), "preserve_tokens": "all", "preserve_scale": 0.1}


# What is left as it is when a run's method is changed.
SCALE = ("steps", "batch", "seed", "learning_rate", "trainable", "compute_dtype", "low_memory")
SCALE_OF_LATENTS = ("steps", "refresh_every")

# name: (what it is, what it changes in `paper`)
_AEGIS = {
    "paper": ("AEGIS with the numbers of the paper's appendix", {}),
    "released": ("AEGIS as the authors' published command runs it", _RELEASED),
    "paper-latest": ("paper, v and p kept for the run (the released flag's default)", _LATEST),
    "paper-no-aet": ("paper without the adversarial erasure target: c' := c_e", {"soft": {"use": "prompt"}}),
    "paper-no-prompt": ("paper without the adversarial prompt: c* := c_e", {"soft": {"use": "target"}}),
    "paper-no-dgr": ("paper with a constant lambda and no conflict test", {"grp": {"rule": "constant", "omega": 1e-2}}),
    "paper-fixed-omega": ("paper with omega := 1", {"grp": {"rule": "fixed", "omega": 1.0}}),
    "paper-half-omega": ("paper with omega := 0.5", {"grp": {"rule": "fixed", "omega": 0.5}}),
    "paper-total-omega": ("paper, omega moved by the gradient of L_e + L_r", {"grp": {"rule": "total"}}),
    "paper-no-grp": ("paper with lambda := 0", _NO_GRP),
    "random-prefixes": ("paper without sign steps: random words before target and prompt", _STILL),
    "random-prefixes-no-grp": ("the same with lambda := 0", _merge(_STILL, _NO_GRP)),
    "esd": ("ESD: plain target, plain prompt, no penalty", _ESD),
    "esd-x": ("ESD-x: esd of the cross-attention", _merge(_ESD, {"trainable": "xattn"})),
    "esd-u": ("ESD-u: esd of all but the cross-attention", _merge(_ESD, {"trainable": "noxattn"})),
    "esd-x-2025": ("ESD-x as the authors' code of 2025 has it", _merge(_ESD_2025, {"trainable": "xattn"})),
    "esd-u-2025": ("ESD-u as the authors' code of 2025 has it", _merge(_ESD_2025, {"trainable": "layers"})),
    "esd+": ("ESD with what aegis+ adds: preservation, context, push", _merge(_ESD, _WORDS)),
    "aegis+": ("kept prefixes of four tokens, preservation, the concept in context, a push there", _PLUS),
    "aegis+shown": ("aegis+ that is pushed away from where its own trajectories show the concept", _SHOWN),
    "aegis+near": ("aegis+ that preserves most what the UNet draws, and draws like the concept", _PLUS | _NEAR),
    "aegis+near-speed": ("aegis+near that starts from SPEED's solution", _PLUS | _NEAR),
    "aegis+-redrawn": ("aegis+, v and p drawn anew at every step", _merge(_PLUS, {"soft": {"life": "step"}})),
    "aegis+-no-aet": ("aegis+ without the target: c' := c_e", _merge(_PLUS, {"soft": {"use": "prompt"}})),
    "aegis+-no-prompt": ("aegis+ without the prompt: c* := c_e", _merge(_PLUS, {"soft": {"use": "target"}})),
    "aegis+-no-preservation": ("aegis+ without preserved words", _merge(_PLUS, {"words": {"preserve": 0.0}})),
    "aegis+-no-context": ("aegis+ without the concept in context", _merge(_PLUS, {"words": {"context": "none"}})),
    "aegis+-no-push": ("aegis+ without the push in context", _merge(_PLUS, {"words": {"context": "erase"}})),
    "aegis+-two-latents": (
        "aegis+ with a latent of its own for the loss",
        _merge(_PLUS, _TWO_LATENTS),
    ),
}

# name: (what it is, the method, what it changes in its defaults)
_CLOSED = {
    "uce": ("UCE: concepts' last tokens to the empty prompt's, by least squares", "uce", {}),
    "uce-2023": ("UCE as first published: from the last token on, EOS and padding too", "uce", _UCE_2023),
    "rece": ("RECE: UCE, then the same against derived adversaries", "rece", {}),
    "speed": ("SPEED: values alone, in the null space of what is preserved", "speed", {}),
    "oce": ("OCE: values alone, turned by a rotation", "oce", {}),
}

# name: (what it is, the method, what it changes in its defaults, which keys of SCALE are its own)
_TRAINED = {
    "advunlearn": ("AdvUnlearn: the text encoder, trained against attacks", advunlearn.method, {}, {"trainable"}),
    "advunlearn-unet": ("AdvUnlearn of the UNet", advunlearn.method, {"trainable": "full"}, {}),
    "age": ("AGE: the concept becomes words that an adversary chooses", age.method, {}, {"trainable"}),
    "stereo": ("STEREO: a search for prompts that bring the concept back, then one erasure", stereo.method, {}, {}),
}


def _presets():
    for name, (about, changes) in _AEGIS.items():
        settings = _changed(aegis.method.settings, changes | {"method": name})
        yield Preset(name, about, aegis.method, settings, frozenset(changes).intersection(SCALE))
    for name, (about, method, changes, own) in _TRAINED.items():
        yield Preset(name, about, method, _changed(method.settings, changes | {"method": name}), frozenset(own))
    for name, (about, method, changes) in _CLOSED.items():
        settings = CLOSED[method].settings
        settings = _changed(settings, changes | {"method": name})
        yield Preset(name, about, CLOSED[method], settings, frozenset({"steps"}))


PRESETS = {preset.name: preset for preset in _presets()}
DEFAULT = "paper"


def preset(name: str) -> Preset:
    """The preset of that name. Raises `AegisError` for another, naming those that there are."""
    if not isinstance(name, str) or name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        advice = f"did you mean {close[0]!r}? " if close else ""
        raise AegisError(f"unknown method {name!r}; {advice}there are: {', '.join(PRESETS)}")
    return PRESETS[name]


def switched(settings, name: str):
    """The settings of the preset `name` at the scale (`SCALE`) of other settings."""
    new = preset(name).settings
    kept = {key for key in SCALE if hasattr(settings, key) and hasattr(new, key)}
    kept -= preset(name).own | preset(settings.method).own
    new = dataclasses.replace(new, **{key: getattr(settings, key) for key in kept})
    if hasattr(settings, "latents") and hasattr(new, "latents"):
        latents = {key: getattr(settings.latents, key) for key in SCALE_OF_LATENTS}
        new = dataclasses.replace(new, latents=dataclasses.replace(new.latents, **latents))
    return new
