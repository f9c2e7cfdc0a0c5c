"""The leaf rule between our parameters and PyTorch's, both ways.

The path of a leaf is the PyTorch module path, so only the last part of the name and the memory layout change:

  kernel, rank 4, HWIO     <->  weight, OIHW
  kernel, rank 2, (in,out) <->  weight, (out, in)
  scale, embedding         <->  weight
  bias, and any other      <->  the same name
"""

_WEIGHTS = ("kernel", "scale", "embedding")
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}  # of a kernel, by its rank: which of our axes become PyTorch's


def torch_key(path: str) -> str:
    """`down_blocks.0.resnets.0.conv1.kernel` -> `down_blocks.0.resnets.0.conv1.weight`."""
    module, dot, leaf = path.rpartition(".")
    return f"{module}{dot}{'weight' if leaf in _WEIGHTS else leaf}"


def to_torch(path: str, array):
    """A leaf's array in PyTorch's layout (a view of a numpy array): HWIO -> OIHW, (in, out) -> (out, in)."""
    if path.endswith(".kernel") and array.ndim > 1:
        return array.transpose(_TO_TORCH[array.ndim])
    return array


def from_torch(path: str, array):
    """The inverse of `to_torch`: OIHW -> HWIO, (out, in) -> (in, out)."""
    if path.endswith(".kernel") and array.ndim > 1:
        return array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
    return array


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf's tensor in PyTorch's layout."""
    axes = _TO_TORCH.get(len(shape)) if path.endswith(".kernel") else None
    return tuple(shape[axis] for axis in axes) if axes else tuple(shape)
