"""What `aegis compose` does: delta files of one base merged into one, and what of each erasure that leaves.

The rows that a concept's change is to be kept on (erasure/compose.py) are those of prompts in which it stands alone or
among random words, as in training by random words (erasure/aegis/words.py); those that are to stay are of prompts of
such words alone. All are drawn from the tokenizer: no data is needed.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import encode_ids
from aegis_jax.erasure.aegis.words import random_prompts, vocabulary
from aegis_jax.erasure.compose import Merged, answers, interference, outside, summed
from aegis_jax.erasure.texts import check_text_width, concept_tokens
from aegis_jax.erasure.trainable import select
from aegis_jax.errors import AegisError
from aegis_jax.io import delta, delta_apply, delta_write
from aegis_jax.io.hub import expand, place
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.model import full_precision
from aegis_jax.run import card

BY = ("closed", "null-space", "sum")
PROMPTS, PRESERVED = 64, 256  # of random words: for each erasure, and for what is to stay
FREE = 1e-2  # null-space: share of the random words' largest variance up to which a direction counts as free of them
SHOWN = 0.1  # interference from which a pair is named


@dataclasses.dataclass(frozen=True)
class Composed:
    """A merged change.

    Attributes:
      drift: {leaf path: array, float32}.
      names: of each erasure, its concepts.
      interference: (N, N), as `erasure.compose.interference` of the concepts' own tokens; NaN where nothing is known.
      lost: (N,), ||X_i D - X_i D_i|| / ||X_i D_i|| on them: the share of each erasure that the merged change lacks.
    """

    drift: dict[str, np.ndarray]
    names: list[str]
    interference: np.ndarray
    lost: np.ndarray


def write(deltas, base, out, *, by="closed", lamb=1.0, seed=0, revision=None, variant=None, overwrite=False) -> None:
    """`aegis compose`: writes the merged delta file and prints what it keeps of each erasure."""
    _check(by, lamb, seed)
    paths = found(deltas, out)
    path = delta_write.check_path(out, overwrite)
    headers = [delta.read_delta(each) for each in paths]
    concepts = [_concepts(header) for header in headers]
    pipeline = load_pipeline(base, revision=revision, variant=variant)
    hashes = delta.base_hashes(pipeline.source.folder)
    drifts = (delta_apply.read_drift(pipeline, each, hashes)[0] for each in paths)
    result = compose(pipeline, drifts, concepts, by=by, lamb=lamb, seed=seed)
    everything = list(dict.fromkeys(name for names in concepts for name in names))
    methods = sorted({header.metadata.get("method", "unknown") for header in headers})
    name = place(base)
    name = Path(name).name if Path(name).is_absolute() else name
    about = {"concepts": json.dumps(everything, ensure_ascii=False), "method": f"compose {by}: {', '.join(methods)}"}
    delta_write.check_path(out, overwrite)  # again: it took a while
    count = delta_write.write_drift(
        pipeline, {"unet": {leaf: jnp.asarray(x) for leaf, x in result.drift.items()}}, path,
        card=card.composed(name, everything, by, methods), base=name, hashes=hashes, about=about,
    )  # fmt: skip
    print(text(result))
    print(f"delta    {out} ({count} tensors, {path.stat().st_size / 1e6:.1f} MB)")
    print(f"apply    {delta_apply.command(out, base, revision, variant)}")


def found(deltas, out=None) -> list[Path]:
    """The files named, and those of folders (of a batch: of its results), each once; `AegisError` for too few.

    out: where the merged one goes; one that lies there is none of a folder's, being what was merged before.
    """
    paths, before = [], out and expand(out).resolve()
    for given in map(expand, deltas):
        folder = given / "results" if (given / "results").is_dir() else given
        inside = [given]
        if folder.is_dir():
            inside = [path for path in sorted(folder.glob("*.safetensors")) if path.resolve() != before]
        if not inside:
            raise AegisError(f"{folder} holds no .safetensors: name delta files, or the folder of a batch")
        paths += inside
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    if len(paths) < 2:
        raise AegisError(f"one delta file, {paths[0]}: name two or more, or the folder of a batch")
    return paths


def _concepts(header) -> list[str]:
    """What a delta file says that it erases."""
    try:
        names = json.loads(header.metadata.get("concepts", "null"))
    except (ValueError, RecursionError):
        names = None
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise AegisError(
            f"{header.path} does not say what it erases (concepts in its metadata): write it by `aegis delta` from the "
            "run's folder"
        )
    return names


def compose(
    pipeline, drifts: Iterable[Mapping[str, np.ndarray]], concepts: list[list[str]], *, by="closed", lamb=1.0, seed=0
) -> Composed:
    """The merged change of erasures of one pipeline.

    drifts: {leaf path: change} of each, gone through once. concepts: of each, in the same order. by: "closed", the
    least squares of `erasure.compose.Merged` with `lamb` on the preserved rows; "null-space", the sum less what it does
    to these; "sum". The first two take changes of keys and values of cross-attention alone. Raises `AegisError` for
    others, and for texts that the tokenizer cannot take.
    """
    _check(by, lamb, seed)
    texts = _Texts(pipeline, concepts, seed)
    zeros = {leaf: np.zeros(x.shape, np.float32) for leaf, x in select(pipeline.unet.params, "kv").items()}
    if not zeros:
        raise AegisError("this UNet has no cross-attention: no text reaches it by which erasures could be merged")
    merged, total = Merged(texts.preserved.shape[1], texts.preserved, lamb=lamb), {}
    own, does, names = [], [], [", ".join(each) for each in concepts]
    for i, drift in enumerate(drifts):
        others = sorted(drift.keys() - zeros.keys())
        if others and by != "sum":
            raise AegisError(
                f"the erasure of {names[i]} changes {others[0]}, whose input is no text: only keys and values can be "
                "merged so; erase with --config.trainable=kv, or take --by sum"
            )
        whole = {leaf: drift.get(leaf, zero) for leaf, zero in zeros.items()}  # some are left as they were
        if by == "closed":
            merged.add(whole, texts.among_words(i))
        else:
            total = summed([total, drift])
        each = [answers(whole, rows) for rows in texts.alone]
        own.append(each[i])
        does.append([np.linalg.norm(x) for x in each])
    drift = merged.solve() if by == "closed" else total
    if by == "null-space":
        drift = outside(drift, texts.preserved, FREE)
    drift = {leaf: x.astype(np.float32) for leaf, x in drift.items()}
    does = np.array(does)
    sizes = np.where(np.diagonal(does) > 0, np.diagonal(does), np.nan)
    whole = {leaf: drift.get(leaf, zero) for leaf, zero in zeros.items()}
    off = np.array([np.linalg.norm(answers(whole, rows) - x) for rows, x in zip(texts.alone, own)])
    return Composed(drift, names, interference(does), off / sizes)


def _check(by: str, lamb: float, seed: int) -> None:
    if by not in BY:
        raise AegisError(f"--by {by}: wanted one of {', '.join(BY)}")
    if not 0 <= lamb < np.inf:
        raise AegisError(f"--lamb {lamb}: wanted 0 or more")
    if not 0 <= seed < 2**32:
        raise AegisError(f"--seed {seed}: wanted 0 to 2**32 - 1")


class _Texts:
    """What stands for the concepts, as rows of their encodings, float64, each (n, d).

    Attributes:
      alone: of each erasure, the tokens of its concepts, each by itself, and the end of the text.
      preserved: prompts of random words. BOS, which is the same in all prompts, is in these alone: it is to stay.
    """

    def __init__(self, pipeline, concepts: list[list[str]], seed: int):
        tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
        check_text_width(pipeline.unet.config, encoder.params)
        self._every = list(dict.fromkeys(name for names in concepts for name in names))
        lengths = {name: len(concept_tokens(tokenizer, name)) for name in self._every}
        self._concepts, self._graph, self._key = concepts, encoder.graph, jax.random.key(seed)
        self._params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), encoder.params)
        with full_precision(jnp.float32):
            self._words = vocabulary(tokenizer, self._graph, self._params, self._every, seed)
            own = [encode_ids(self._graph, self._params, tokenizer.ids(names)).embedding for names in concepts]
        self.alone = [
            np.concatenate([x[1 : lengths[name] + 2] for x, name in zip(np.asarray(rows, np.float64), names)])
            for rows, names in zip(own, concepts)
        ]
        self.preserved = self._random(jax.random.fold_in(self._key, len(concepts)), None, PRESERVED)

    def among_words(self, i: int) -> np.ndarray:
        """The concepts of erasure i among random words, or alone; without BOS."""
        mine = jnp.array([self._every.index(name) for name in self._concepts[i]], jnp.int32)
        rows = self._random(jax.random.fold_in(self._key, i), mine, PROMPTS)
        length = self._words.length
        return rows.reshape(-1, length, rows.shape[1])[PROMPTS:, 1:].reshape(-1, rows.shape[1])

    def _random(self, key, concepts, batch: int) -> np.ndarray:
        with full_precision(jnp.float32):
            found = random_prompts(self._graph, self._params, self._words, key, concepts, batch=batch).embedding
        return np.asarray(found, np.float64).reshape(-1, found.shape[-1])


def text(result: Composed) -> str:
    """What the merged change lacks of each erasure, and which of them are in each other's way."""
    names = [" ".join(name.split()) for name in result.names]  # one line each
    width = max(map(len, names))
    told = [
        "changes no keys or values of its own tokens"
        if np.isnan(lost)
        else f"{lost:.0%} off its own erasure at its own tokens"
        for lost in result.lost
    ]
    lines = [f"{name:{width}}  {what}" for name, what in zip(names, told)]
    many = range(len(names))
    pairs = [(result.interference[i, j], i, j) for i in many for j in many if i != j]
    for much, i, j in sorted((pair for pair in pairs if pair[0] > SHOWN), reverse=True)[:5]:
        lines.append(f"the erasure of {names[i]} does {much:.0%} as much to {names[j]} as its own")
    return "\n".join(lines)
