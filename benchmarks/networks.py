"""aegis_jax's models with a case's weights."""

import jax.numpy as jnp

from aegis_jax.models import model as model_lib
from aegis_jax.models.layout import from_torch, torch_key, torch_shape


def key_of(path: str) -> str:
    """The case's name of the parameter at `path`."""
    return torch_key(path).removeprefix("text_model.")


def build(case, component: str, module_class, config: dict) -> model_lib.Model:
    """The model with the case's weights, float32. component: "unet" or "text"."""
    abstract = model_lib.abstract(module_class, config)
    flat = model_lib.flatten(abstract.params)
    tensors = case.tensors(component, {key_of(path): torch_shape(path, x.shape) for path, x in flat.items()})
    params = {path: jnp.asarray(from_torch(path, tensors[key_of(path)])) for path in flat}
    return model_lib.Model(config, abstract.graph, model_lib.unflatten(params))
