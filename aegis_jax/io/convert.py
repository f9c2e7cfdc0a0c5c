"""PyTorch tensors -> parameter tree: models/layout.py's leaf rule applied to whole files, strictly.

Exceptions: older VAE files name the attention layers query/key/value/proj_attn and may keep them as
1x1 convolutions; CLIP files come with and without the prefix `text_model.` and may hold the
constant `position_ids`, which is no parameter. The kind of a leaf is taken from the abstract
parameter tree, never guessed from the file.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import parts, safetensors, tiles
from aegis_jax.models.layout import to_torch, torch_key, torch_shape
from aegis_jax.models.model import Model, flatten, unflatten

_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_OLD_VAE_KEY = re.compile(r"(.*\.attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)")
_PARAMETER_TYPES = ("F32", "F16", "BF16")
_GROUP = 1 << 25  # bytes of leaves that share one allocation
_ALIGNED = 64  # bytes
_LISTED = 10  # problems spelled out in one error


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a leaf came from: which of the component's weight files, and under which key."""

    file: int
    key: str


def match(
    component: str, model: Model, headers: tuple[safetensors.Header, ...]
) -> tuple[dict[str, Origin], list[str], list[str]]:
    """Finds the tensor of every leaf of an abstract model, from the headers alone.

    Returns ({leaf path: Origin}, problems, unused). The problems are missing leaves, wrong shapes and
    types, and tensors found twice; all of them, each naming the tensor, what was found and what was
    wanted. unused: keys that the model has no place for; PyTorch reads past them, so they are no
    problem by themselves, but beside a missing leaf they may be that leaf misnamed and are listed
    with the problems.
    """
    where: dict[str, Origin] = {}
    problems = []
    for index, header in enumerate(headers):
        for key in header.entries:
            if key in where:
                first = headers[where[key].file].path.name
                problems.append(f"{key!r} is in two files, {first} and {header.path.name}")
            where.setdefault(key, Origin(index, key))
    origins, used = {}, set()
    for path, leaf in flatten(model.params).items():
        wanted = torch_shape(path, leaf.shape)
        keys = [name for name in _names(component, torch_key(path)) if name in where]
        if not keys:
            problems.append(f"missing {torch_key(path)!r} {wanted}")
            continue
        if len(keys) > 1:
            problems.append(f"{keys[0]!r} is there twice, also as {keys[1]!r}")
        used.update(keys)
        key = keys[0]
        origins[path] = where[key]
        entry = headers[where[key].file].entries[key]
        if entry.shape not in {wanted, _old_shape(key, wanted)}:
            problems.append(f"{key!r} has shape {entry.shape}, wanted {wanted}")
        if entry.dtype not in _PARAMETER_TYPES:
            problems.append(f"{key!r} has type {entry.dtype}, wanted one of {', '.join(_PARAMETER_TYPES)}")
    unused = [key for key in where if key not in used and not _is_constant(component, key)]
    if problems:
        problems += [f"unused {key!r} {headers[where[key].file].entries[key].shape}" for key in unused]
    return origins, [f"{component}: {problem}" for problem in problems], unused


def refuse(problems: list[str], where) -> None:
    """Raises one `AegisError` with the number of problems and the first of them, if any."""
    if problems:
        shown = problems
        if len(problems) > _LISTED:  # both ends: missing leaves come first, unused keys last
            shown = [*problems[: _LISTED // 2], "...", *problems[-_LISTED // 2 :]]
        raise AegisError(
            f"the weights in {where} do not fit their config.json, {len(problems)} "
            f"problem{'s' * (len(problems) > 1)}: {'; '.join(shown)}. "
            "Check that weights and config belong together"
        )


def read(model: Model, origins: dict[str, Origin], headers: tuple[safetensors.Header, ...], dtype) -> Model:
    """The model with the parameters of `headers`, cast to `dtype`.

    Tensors are read part by part and laid out straight into their final memory: the peak is the
    parameters plus a part for each core.
    """
    return dataclasses.replace(model, params=reader(model, origins, headers, dtype)())


def reader(
    model: Model, origins: dict[str, Origin], headers: tuple[safetensors.Header, ...], dtype
) -> Callable[[], dict]:
    """What reads the parameters of `headers` as `read` does, to be called once, in any thread.

    The files are opened here and now: they may be moved or deleted before they are read.
    """
    dtype = safetensors.DTYPES[safetensors.dtype_name(dtype)]
    shapes = {path: leaf.shape for path, leaf in flatten(model.params).items()}
    device = jax.config.jax_default_device  # a setting of the caller's thread
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safetensors.open_unchanged(header)) for header in headers]
        files = stack.pop_all()

    def read_all():
        leaves = {}
        with files, jax.default_device(device):
            for index, (header, file) in enumerate(zip(headers, opened)):
                keys = {path: origin.key for path, origin in origins.items() if origin.file == index}
                in_order = sorted(keys, key=lambda path: header.entries[keys[path]].start)
                for arrays in _groups({path: shapes[path] for path in in_order}, dtype):
                    _fill(arrays, keys, file, header)
                    # Elsewhere than on the CPU, waiting keeps the host from holding two groups.
                    leaves |= jax.block_until_ready(jax.device_put(arrays))
        return unflatten({path: leaves[path] for path in shapes})

    return read_all


def _groups(shapes: dict[str, tuple], dtype: np.dtype) -> Iterator[dict[str, np.ndarray]]:
    """Fresh arrays of these shapes, in groups of about `_GROUP` bytes.

    The leaves of a group lie in one piece of memory: a page fault for every 4 kB of many small ones takes longer
    than reading them. The piece lives as long as one of them, so a group must not be large.
    """
    sizes = {path: -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED for path, shape in shapes.items()}
    waiting = list(shapes)
    while waiting:
        total, group = 0, []
        while waiting and total < _GROUP:
            group.append(waiting.pop(0))
            total += sizes[group[-1]]
        memory, arrays = _aligned(total), {}
        for path in group:
            mine, memory = memory[: sizes[path]], memory[sizes[path] :]
            arrays[path] = mine.view(dtype)[: math.prod(shapes[path])].reshape(shapes[path])
        yield arrays


def _fill(arrays: dict[str, np.ndarray], keys: dict[str, str], file, header: safetensors.Header) -> None:
    """Reads the tensor keys[path] of the file into each arrays[path], laid out and cast."""

    def read_part(job):
        path, rows = job
        target = to_torch(path, arrays[path])[rows]
        as_it_is = header.entries[keys[path]].numpy_dtype == target.dtype and target.flags.c_contiguous
        buffer = target.reshape(-1).view(np.uint8) if as_it_is else None
        tensor = safetensors.read_tensor(file, header, keys[path], buffer, rows)
        if not _is_finite(tensor):  # here, where it still is in the cache
            raise AegisError(
                f"{header.path}: tensor {keys[path]!r} has values that are not finite: download or copy it again, or "
                "take another checkpoint"
            )
        if not as_it_is:
            with np.errstate(over="ignore"):
                tiles.copy(target, tensor.reshape(target.shape))

    shapes = {path: torch_shape(path, array.shape) for path, array in arrays.items()}
    jobs = [(path, rows) for path in arrays for rows in parts.split(shapes[path], arrays[path].itemsize)]
    parts.on_all_cores(read_part, jobs)


def _is_finite(tensor: np.ndarray) -> bool:
    """Whether all values of one of `_PARAMETER_TYPES` are finite.

    Told by the bits, since NumPy's own test takes thirty times as long for 16 of them: taken for signed integers,
    infinity and the NaNs after it are the largest; for unsigned ones, those of the other sign.
    """
    size, (above, below) = tensor.dtype.itemsize, np.array([np.inf, -np.inf], tensor.dtype)
    limits = {f"i{size}": above, f"u{size}": below}
    return all(tensor.view(bits).max() < limit.view(bits) for bits, limit in limits.items())


def _aligned(size: int) -> np.ndarray:
    """Fresh memory, uint8."""
    # On the CPU device_put (but not jnp.asarray) takes over memory that is aligned without a copy.
    memory = np.empty(size + _ALIGNED - 1, np.uint8)
    first = -memory.ctypes.data % _ALIGNED
    return memory[first : first + size]


def _names(component: str, key: str) -> list[str]:
    """The keys under which a tensor may stand in a file, today's name first."""
    names = [key]
    if component == "text_encoder":
        names.append(key.removeprefix("text_model."))
    old = _OLD_VAE_KEY.fullmatch(key) if component == "vae" else None
    if old:
        names.append(f"{old[1]}.{_OLD_VAE_NAMES[old[2]]}.{old[3]}")
    return names


def _old_shape(key: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The other shape that is allowed: a 1x1 convolution, under one of the old VAE names."""
    is_old = key.endswith(tuple(f".{name}.weight" for name in _OLD_VAE_NAMES.values()))
    return (*wanted, 1, 1) if is_old else wanted


def _is_constant(component: str, key: str) -> bool:
    return component == "text_encoder" and key.removeprefix("text_model.") == "embeddings.position_ids"


def name_today(component: str, key: str) -> str | None:
    """The name that PyTorch has today for a tensor of a file; None for what is a constant and no parameter."""
    if _is_constant(component, key):
        return None
    if component == "text_encoder" and not key.startswith("text_model."):
        return f"text_model.{key}"
    for new, old in _OLD_VAE_NAMES.items() if component == "vae" and ".attentions." in key else ():
        key = key.replace(f".{old}.", f".{new}.")
    return key
