"""What a judge is: images in, a probability of each label out, and the rule by which a label counts as shown."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from aegis_jax.errors import AegisError

_ROUNDING = 1e-3  # by which a probability may miss [0, 1]: that of half precision


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A classifier or detector, and the rule that turns its probabilities into answers.

    With `thresholds` a label is shown where its probability reaches its own; labels without one are never. Without,
    a label is shown where it is among the `top` largest of its group.

    Attributes:
      name: the spec that loads it again.
      labels: what it tells apart, each once.
      compute: uint8 images (n, H, W, 3) of one size -> (n, labels) in [0, 1]; asked through `probabilities`.
      digest: sha256 of its weights (`digest`).
      thresholds: {label: least probability}, or None.
      groups: labels that exclude each other, in order; () stands for one group of all. Those of a group sum to 1.
      top: how many of a group count as shown; the field's figures are of 1, 3 or 10.
      features: uint8 images -> (n, width), the input of its last layer, for the Frechet distance; None where it has
        no such layer.
      about: what a report says of it besides: plain values, such as versions.
    """

    name: str
    labels: tuple[str, ...]
    compute: Callable[[np.ndarray], np.ndarray]
    digest: str
    thresholds: Mapping[str, float] | None = None
    groups: tuple[tuple[str, ...], ...] = ()
    top: int = 1
    features: Callable[[np.ndarray], np.ndarray] | None = None
    about: Mapping = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        labels = self.labels
        if not labels or len(set(labels)) < len(labels):
            raise AegisError(f"judge {self.name}: its labels must differ and be at least one, found {labels!r:.200}")
        if not self.groups:
            object.__setattr__(self, "groups", (labels,))
        if sorted(label for group in self.groups for label in group) != sorted(labels):
            raise AegisError(f"judge {self.name}: its groups must hold each of its labels once")
        unknown = set(self.thresholds or ()) - set(labels)
        if unknown:
            raise AegisError(f"judge {self.name} has thresholds of labels that it does not have: {sorted(unknown)}")
        if self.top < 1:
            raise AegisError(f"judge {self.name}: top={self.top}, wanted at least 1")
        if self.top > 1 and self.thresholds is not None:
            raise AegisError(f"judge {self.name}: top={self.top} does not go with thresholds: these say what is shown")
        least = min((len(group) for group in self.groups if len(group) > 1), default=1)
        if 1 < least <= self.top:
            raise AegisError(f"judge {self.name}: top={self.top} of {least} labels, so that each would count as shown")

    def probabilities(self, images) -> np.ndarray:
        """uint8 images (n, H, W, 3) -> float32 (n, labels). Raises `AegisError` for other images, and where `compute`
        gives anything else.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise AegisError(
                f"judge {self.name}: images are {images.dtype} of shape {images.shape}, wanted uint8 (n, H, W, 3)"
            )
        if not len(images):
            return np.zeros((0, len(self.labels)), np.float32)
        found = as_numbers(self.compute(images), f"judge {self.name} gave").astype(np.float32)
        if found.shape != (len(images), len(self.labels)) or not np.isfinite(found).all():
            raise AegisError(
                f"judge {self.name} gave {found.shape} for {len(images)} images, wanted finite numbers "
                f"{(len(images), len(self.labels))}"
            )
        least, most = found.min(), found.max()
        if least < -_ROUNDING or most > 1 + _ROUNDING:
            raise AegisError(f"judge {self.name} gave numbers from {least:g} to {most:g}, wanted probabilities, 0 to 1")
        return found.clip(0, 1)

    def shown(self, probabilities) -> np.ndarray:
        """Which labels are shown, (n, labels) -> bool (n, labels)."""
        p = np.asarray(probabilities)
        if self.thresholds is not None:
            return p >= np.array([self.thresholds.get(label, np.inf) for label in self.labels], np.float32)
        found = np.zeros(p.shape, bool)
        for columns in self._columns():
            first = np.argsort(-p[:, columns], axis=1, kind="stable")[:, : self.top]
            np.put_along_axis(found, columns[first], True, axis=1)
        return found

    def shows(self, images, label: str) -> np.ndarray:
        """Whether each image shows the label, bool (n,). Raises `AegisError` for a label that it does not have."""
        return self.shown(self.probabilities(images))[:, self.labels.index(self.find(label))]

    def answers(self, probabilities) -> np.ndarray:
        """The largest label of each group, str (n, groups). Raises `AegisError` for a judge that goes by thresholds."""
        if self.thresholds is not None:
            raise AegisError(f"judge {self.name} goes by thresholds: each label is shown or not, none is the answer")
        labels, p = np.array(self.labels), np.asarray(probabilities)
        return np.stack([labels[columns[p[:, columns].argmax(1)]] for columns in self._columns()], axis=1)

    def record(self, label: str) -> dict:
        """What a report says of it where it counts `label`, as plain values."""
        label = self.find(label)
        if self.thresholds is not None:
            rule = f"at least {self.thresholds[label]:g}" if label in self.thresholds else "never"
        elif self.top > 1:
            rule = f"among the {self.top} largest of {len(self.group(label))}"
        else:
            rule = f"the largest of {len(self.group(label))}"
        return {"name": self.name, "label": label, "rule": rule, "sha256": self.digest, "about": dict(self.about)}

    def group(self, label: str) -> tuple[str, ...]:
        """The labels that exclude `label`, itself among them."""
        label = self.find(label)
        return next(group for group in self.groups if label in group)

    def find(self, text: str) -> str:
        """The label that a text means: itself, or the one that has it as one of its names ("a, b"), whatever the case.

        Raises `AegisError` where there is none, or more than one.
        """
        wanted = _plain(text)
        exact = [label for label in self.labels if label == text] or [
            label for label in self.labels if _plain(label) == wanted
        ]
        found = exact or [label for label in self.labels if wanted in map(_plain, label.split(","))]
        if len(found) == 1:
            return found[0]
        if found:
            raise AegisError(f"judge {self.name}: {text!r} may be {_listed(found)}: say which")
        near = [label for label in self.labels if wanted and wanted in _plain(label)]
        raise AegisError(f"judge {self.name} has no label {text!r}; it has {_listed(near or list(self.labels))}")

    def _columns(self) -> list[np.ndarray]:
        where = {label: k for k, label in enumerate(self.labels)}
        return [np.array([where[label] for label in group]) for group in self.groups]


def as_numbers(given, said: str) -> np.ndarray:
    """What a function of somebody else's gave, as float64. Raises `AegisError` that begins with `said` for what is no
    array of numbers."""
    try:
        found = np.asarray(given)
        if found.dtype.kind in "SUc":  # NumPy would read the texts, and drop the imaginary part
            raise TypeError(f"{found.dtype}")
        return found.astype(np.float64)
    except Exception as error:  # whatever its library raises: PyTorch does for what requires grad
        raise AegisError(f"{said} no array of numbers ({' '.join(str(error).split())[:200]})") from error


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").lower().split())


def _listed(labels: list[str], most: int = 12) -> str:
    shown = ", ".join(map(repr, labels[:most]))
    return shown + (f" and {len(labels) - most} more" if len(labels) > most else "")


def digest(files: Iterable[pathlib.Path]) -> str:
    """sha256 of a weight file; of several, that of what `sha256sum FILES` prints of their names, in order of these."""
    hashes = []
    for path in map(pathlib.Path, files):
        with open(path, "rb") as file:
            hashes.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    if len(hashes) == 1:
        return hashes[0][1]
    return hashlib.sha256("".join(f"{one}  {name}\n" for name, one in sorted(hashes)).encode()).hexdigest()
