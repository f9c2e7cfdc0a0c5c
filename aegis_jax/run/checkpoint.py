"""Checkpoints of the training state, by Orbax, and the check that they belong to this run.

A state is stored as one flat {name: array}, the name being the leaf's path in the state. So what is
on disk has no structure that a restore could guess wrongly, and names and shapes can be compared
before anything is read. Frozen weights are never stored.
"""

import contextlib
import json
import logging
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.errors import AegisError

FORMAT = 2
_LOG = logging.getLogger("absl")
# Orbax numbers its operations by a counter of the process and tells their signals apart by its present value, so that
# two at once, of whatever checkpointers, wait for each other's. Held from the start of one until it is on disk.
_ONE_OPERATION = threading.Lock()


class Checkpoints:
    """The newest `keep` states under `folder`, each marked with `identity` (plain JSON values).

    Saving returns as soon as the arrays are safe from later steps and goes on in the background; a
    checkpoint becomes visible whole or not at all.
    """

    def __init__(self, folder: Path, identity: dict, keep: int, defaults: dict | None = None):
        """defaults: what holds for settings that a checkpoint, being older than they are, says nothing of."""
        self._failed: BaseException | None = None  # what went wrong in the background
        # Orbax logs every save, and an error once in each thread that sees it before raising it. A filter of one's own,
        # since other threads may have checkpoints too.
        self._quiet = lambda record: record.levelno >= logging.CRITICAL
        _LOG.addFilter(self._quiet)
        import orbax.checkpoint.experimental.v1 as ocp

        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(identity))  # as it comes back from disk
        self.defaults = json.loads(json.dumps(defaults or {}))
        training = ocp.training
        self._orbax = training.Checkpointer(
            self.folder,
            # This loop decides when to save.
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        try:
            with _ONE_OPERATION:
                self._orbax.close()
        finally:
            _LOG.removeFilter(self._quiet)
        if self._failed is not None and exc[0] is None:
            raise self._failed

    @property
    def latest(self) -> int | None:
        """Steps done in the newest checkpoint."""
        found = self._orbax.latest
        return None if found is None else found.step

    def save(self, step: int, state) -> None:
        """Saves the state after `step` steps; one that is there already stays."""
        if step == self.latest:
            return
        # Orbax refuses empty arrays, and there is nothing in them to keep.
        arrays = {name: leaf for name, leaf in _named(state).items() if leaf.size}
        self._begin()
        try:
            saving = self._orbax.save_async(step, arrays, custom_metadata={"format": FORMAT, "identity": self.identity})
            threading.Thread(target=self._finish, args=(saving,), name="checkpoint", daemon=True).start()
        except BaseException:
            _ONE_OPERATION.release()
            raise

    def _begin(self) -> None:
        """Waits for the operation before; raises what went wrong in it, if it was of this checkpointer."""
        _ONE_OPERATION.acquire()
        if self._failed is not None:
            _ONE_OPERATION.release()
            raise self._failed

    def _finish(self, saving) -> None:
        """Ends the operation of a save once it is on disk; in a thread of its own."""
        try:
            saving.result()
        except BaseException as error:
            self._failed = error
        finally:
            _ONE_OPERATION.release()

    @contextlib.contextmanager
    def _alone(self):
        self._begin()
        try:
            yield
        finally:
            _ONE_OPERATION.release()

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what went wrong on the way."""
        with self._alone():
            self._orbax.wait()

    def restore(self, like):
        """The newest state, in the structure, types and placement of the state `like`.

        `like` is given up: a device, or a host, has no room for two states, so its arrays are deleted once the
        checkpoint is known to fit, before anything is read.

        Raises `AegisError` if the checkpoint is of another run or its arrays are not those of
        `like`.
        """
        with self._alone():
            return self._restore(like)

    def _restore(self, like):
        step = self.latest
        where = self.folder / str(step)
        try:
            found = self._orbax.metadata(step)
            stored = {name: (m.shape, m.dtype) for name, m in found.metadata.items()}
            marks = found.custom_metadata
        except Exception as error:  # Orbax and tensorstore raise many kinds for damaged files
            raise _unreadable(where, error) from error
        self._check_identity(where, marks or {})
        named = _named(like)
        _check_arrays(where, {k: v for k, v in named.items() if v.size}, stored)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in named.items()
            if leaf.size
        }
        bound = {name: leaf.committed for name, leaf in named.items()}
        for name in abstract:
            named[name].delete()
        try:
            arrays = self._orbax.load(step, abstract)
        except Exception as error:
            raise _unreadable(where, error) from error
        # Each is given up before the next is copied.
        leaves = [_placed(arrays.pop(name), bound[name]) if name in arrays else leaf for name, leaf in named.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _check_identity(self, where, marks):
        if marks.get("format") != FORMAT:
            raise AegisError(f"{where} is not a checkpoint of this version of aegis_jax")
        refuse_other(where, self.defaults | marks["identity"], self.identity)


def _placed(restored, bound: bool):
    """Free to move unless `bound` to a device, where it would have programs of its own, compiled once more."""
    return restored if bound else jnp.asarray(np.asarray(restored))


def refuse_other(where, saved: dict, now: dict) -> None:
    """Raises `AegisError` if two runs differ in any setting that the result depends on."""
    different = [key for key in [*now, *sorted(saved.keys() - now.keys())] if saved.get(key) != now.get(key)]
    if not different:
        return
    found = "; ".join(f"{key} was {_short(saved.get(key))}, is {_short(now.get(key))}" for key in different)
    plain = {key: saved.get(key) for key in different if isinstance(saved.get(key), (bool, int, float, str))}
    same = " ".join(f"--config.{key}={value}" for key, value in plain.items() if " " not in key)
    raise AegisError(
        f"{where} cannot be resumed, its settings are others ({found}): "
        f"resume with the same settings{f' ({same})' * bool(same)} or choose another folder"
    )


def _short(value) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:12]}..."


def all_finite(state) -> bool:
    """Whether every floating-point array of the state is free of NaN and infinity."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.isdtype(x.dtype, "real floating")]
    return bool(_all_finite(leaves))


@jax.jit
def _all_finite(leaves):
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def _named(state) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): jnp.asarray(x) for p, x in leaves}


def _check_arrays(where, wanted, stored):
    problems = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
    problems += [f"{name} is unknown" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        shape, dtype = stored[name]
        if tuple(shape) != wanted[name].shape or np.dtype(dtype) != wanted[name].dtype:
            problems.append(f"{name} is {dtype}{list(shape)}, wanted {wanted[name].dtype}{list(wanted[name].shape)}")
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise AegisError(f"{where} does not fit this run, {len(problems)} arrays: {shown}")


def _unreadable(where, error) -> AegisError:
    reason = " ".join(str(error).split())[:200]
    return AegisError(
        f"{where} cannot be read ({type(error).__name__}: {reason}): "
        "delete that folder to resume from the checkpoint before it"
    )
