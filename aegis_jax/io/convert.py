"""PyTorch tensors -> parameter tree: models/layout.py's leaf rule applied to whole files, strictly.

Exceptions: older VAE files name the attention layers query/key/value/proj_attn and may keep them as
1x1 convolutions; CLIP files come with and without the prefix `text_model.` and may hold the
constant `position_ids`, which is no parameter. The kind of a leaf is taken from the abstract
parameter tree, never guessed from the file.
"""

import dataclasses
import math
import re

import jax
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import safetensors, tiles
from aegis_jax.models.layout import from_torch, torch_key, torch_shape
from aegis_jax.models.model import Model, flatten, unflatten

_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_OLD_VAE_KEY = re.compile(r"(.*\.attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)")
_PARAMETER_TYPES = ("F32", "F16", "BF16")
_LISTED = 10  # problems spelled out in one error


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a leaf came from: which of the component's weight files, and under which key."""

    file: int
    key: str


def match(component: str, model: Model, headers: tuple[safetensors.Header, ...]) -> tuple[dict[str, Origin], list[str]]:
    """Finds the tensor of every leaf of an abstract model, from the headers alone.

    Returns ({leaf path: Origin}, problems). The problems are missing leaves, wrong shapes and
    types, keys that nothing uses and keys found twice; all of them, each naming the tensor, what
    was found and what was wanted.
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
        key = next((name for name in _names(component, torch_key(path)) if name in where), None)
        if key is None:
            problems.append(f"missing {torch_key(path)!r} {wanted}")
            continue
        used.add(key)
        origins[path] = where[key]
        entry = headers[where[key].file].entries[key]
        if entry.shape not in {wanted, _old_shape(key, wanted)}:
            problems.append(f"{key!r} has shape {entry.shape}, wanted {wanted}")
        if entry.dtype not in _PARAMETER_TYPES:
            problems.append(f"{key!r} has type {entry.dtype}, wanted one of {', '.join(_PARAMETER_TYPES)}")
    problems += [
        f"unused {key!r} {headers[origin.file].entries[key].shape}"
        for key, origin in where.items()
        if key not in used and not _is_constant(component, key)
    ]
    return origins, [f"{component}: {problem}" for problem in problems]


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

    Tensors are read one at a time into one buffer and laid out straight into their final memory:
    the peak is the parameters plus the largest tensor of the files.
    """
    dtype = safetensors.DTYPES[safetensors.dtype_name(dtype)]
    shapes = {path: leaf.shape for path, leaf in flatten(model.params).items()}
    read_entries = [headers[origin.file].entries[origin.key] for origin in origins.values()]
    buffer = np.empty(max((entry.nbytes for entry in read_entries), default=0), np.uint8)
    leaves = {}
    for index, header in enumerate(headers):
        paths = [path for path, origin in origins.items() if origin.file == index]
        with safetensors.open_unchanged(header) as file:
            for path in sorted(paths, key=lambda path: header.entries[origins[path].key].start):
                array = _read_leaf(file, header, origins[path].key, path, shapes[path], dtype, buffer)
                leaves[path] = jax.device_put(array).block_until_ready()
    return Model(model.config, model.graph, unflatten({path: leaves[path] for path in shapes}))


def _read_leaf(file, header, key: str, path: str, shape, dtype: np.dtype, buffer: np.ndarray) -> np.ndarray:
    """A leaf in our layout and `dtype`, in memory of its own; `buffer` is used on the way."""
    memory = _aligned(math.prod(shape) * dtype.itemsize)
    if header.entries[key].numpy_dtype == dtype and not path.endswith(".kernel"):
        return safetensors.read_tensor(file, header, key, memory).reshape(shape)  # only kernels are laid out anew
    array = memory.view(dtype).reshape(shape)
    tensor = safetensors.read_tensor(file, header, key, buffer).reshape(torch_shape(path, shape))
    with np.errstate(over="ignore"):
        tiles.copy(array, from_torch(path, tensor))
    return array


def _aligned(size: int) -> np.ndarray:
    """Fresh memory, uint8."""
    # On the CPU device_put (but not jnp.asarray) takes over memory that is aligned to 64 bytes
    # without a copy; elsewhere waiting for it keeps the host from holding two tensors.
    memory = np.empty(size + 63, np.uint8)
    first = -memory.ctypes.data % 64
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
