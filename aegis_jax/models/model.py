"""A model after loading: its structure and a plain tree of parameters.

Flax NNX modules give structure and initialisation. Here they are split once into a graph (hashable, static under
`jax.jit`) and a nested dict of arrays; everything afterwards is a pure function of that dict. A dotted path into the
dict is the diffusers / transformers module path, because the modules use the same attribute names:
`params["down_blocks"][0]["resnets"][0]["conv1"]["kernel"]` is `down_blocks.0.resnets.0.conv1.weight` in PyTorch.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aegis_jax.models.initial import NoKeys


def full_precision(dtype):
    """A context in which products of float32 are taken in float32, if `dtype` is that.

    XLA's own choice is TF32 on GPUs and bfloat16 on TPUs. A precision that the user has set in JAX stands.
    """
    if dtype == jnp.float32 and jax.config.jax_default_matmul_precision is None:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of that name; "auto" is bfloat16 on accelerators and float32 on a CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def hash_into(digest, name: str, model: "Model") -> None:
    """Feeds a digest of hashlib all that a model's outputs depend on, under that name: its config and parameters."""
    digest.update(json.dumps(model.config, sort_keys=True).encode())
    for path, leaf in sorted(flatten(model.params).items()):
        array = np.asarray(leaf)
        digest.update(f"{name}.{path} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)


class Graph:
    """A network's structure: an NNX graph definition that is cheap to hash and compare.

    A full-size UNet's `GraphDef` takes some 10 ms to hash, and a static argument is hashed at every call.
    """

    def __init__(self, definition: nnx.GraphDef):
        self.definition = definition
        self._hash = hash(definition)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (
            isinstance(other, Graph) and self._hash == other._hash and self.definition == other.definition
        )


class _Awaited:
    """A field that may be set to a future; whoever looks at it waits for the result."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, instance, owner=None):
        if instance is None:
            raise AttributeError(self.name)  # tells dataclasses that there is no default
        value = instance.__dict__[self.name]
        if isinstance(value, concurrent.futures.Future):
            value = instance.__dict__[self.name] = value.result()
        return value

    def __set__(self, instance, value):
        instance.__dict__[self.name] = value


@dataclasses.dataclass(frozen=True)
class Model:
    """A network: its config.json, its structure and its parameters.

    Attributes:
      config: config.json as read, every key kept.
      graph: the structure; hashable, so it can be a static argument of `jax.jit`.
      params: nested plain dict of arrays (of `jax.ShapeDtypeStruct` in an abstract model). May be given as a
        future of one, of weights that are still being read; the first look at it waits, and raises what reading raised.
    """

    config: dict
    graph: Graph
    params: dict = _Awaited()

    def __getstate__(self):
        return self.__dict__ | {"params": self.params}  # a future can be neither copied nor pickled


def _split(module: nnx.Module, config: dict) -> Model:
    graph, state = nnx.split(module, nnx.Param)
    return Model(config, Graph(graph), nnx.to_pure_dict(state))


def abstract(module_class, config: dict) -> Model:
    """The model's structure with `jax.ShapeDtypeStruct` leaves (float32); allocates nothing.

    Raises `AegisError` if the config asks for something that `module_class` does not support.
    """
    return _split(module_class(config, rngs=NoKeys()), config)


def bind(graph: Graph, params: dict) -> nnx.Module:
    """The module with these parameters, to be called inside a traced function and then dropped."""
    return nnx.merge(graph.definition, nnx.State(params))


def flatten(params: dict) -> dict[str, Any]:
    """Nested parameters -> `{"down_blocks.0.resnets.0.conv1.kernel": leaf}`, in depth-first order."""
    flat = {}

    def walk(node, prefix):
        for name, child in node.items():
            path = f"{prefix}.{name}" if prefix else str(name)
            if isinstance(child, dict):
                walk(child, path)
            else:
                flat[path] = child

    walk(params, "")
    return flat


def unflatten(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten`: list positions become integer keys again."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return nested
