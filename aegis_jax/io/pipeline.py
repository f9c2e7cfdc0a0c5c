"""A Stable Diffusion pipeline in memory, and how it is loaded. Exporting is in `export.py`."""

import concurrent.futures
import copy
import dataclasses
import functools
import json
import warnings

import jax.numpy as jnp

from aegis_jax.io import convert, folder, hub, safetensors
from aegis_jax.io.tokenizer import Tokenizer
from aegis_jax.models import model, unet_config, vae
from aegis_jax.models.clip import CLIPTextModel
from aegis_jax.models.model import Model
from aegis_jax.models.unet import UNet2DConditionModel
from aegis_jax.models.vae import AutoencoderKL

_NAMED = 50  # keys spelled out in one notice
MODELS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a pipeline came from, for its way out.

    Attributes:
      folder: the examined folder; its headers hold every tensor's key, dtype and place.
      origins: {component: {leaf path: file and key}} for unet, vae and text_encoder.
    """

    folder: folder.Folder
    origins: dict[str, dict[str, convert.Origin]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The parts of a Stable Diffusion.

    Attributes:
      unet, vae, text_encoder: config, graph and parameters (see `models.model.Model`).
      tokenizer: text -> ids as a diffusers pipeline does it.
      scheduler: scheduler_config.json as read.
      source: where it was loaded from; None for a pipeline built in memory.
    """

    unet: Model
    vae: Model
    text_encoder: Model
    tokenizer: Tokenizer
    scheduler: dict
    source: Source | None = None


_UNKNOWN_OPTIONS = {"unet": unet_config.unknown, "vae": vae.unknown}  # transformers' configs hold many by nature


@functools.lru_cache(maxsize=16)
def _abstract(module_class, config: str) -> Model:
    """The abstract model of a config.json's text, kept because tracing it takes seconds."""
    return model.abstract(module_class, json.loads(config))


def _tell(unread: dict[str, list[str]], absent: tuple[str, ...]) -> None:
    """One warning that names what diffusers reads past, if anything; unread: {where: keys}."""
    parts = [f"{', '.join(_shortened(sorted(keys)))} in {where}" for where, keys in unread.items() if keys]
    if parts:
        parts = [f"not used, in diffusers neither, and kept in exports: {' and '.join(parts)}"]
    if absent:
        parts.append(f"left out, named in model_index.json without a folder of that name: {', '.join(absent)}")
    if parts:
        warnings.warn("; ".join(parts), stacklevel=1)  # of one place: said once, not again for the export


def _shortened(keys: list[str]) -> list[str]:
    return keys if len(keys) <= _NAMED else [*keys[:_NAMED], f"{len(keys) - _NAMED} more"]


def load_pipeline(source, *, revision: str | None = None, variant: str | None = None, dtype=jnp.float32) -> Pipeline:
    """Loads a Stable Diffusion 1.x or 2.x from safetensors.

    source: a diffusers folder, a hub id "name/name", or "world" (the embedded model).
    revision: branch, tag or commit of a hub id. variant: e.g. "fp16" for model.fp16.safetensors.
    dtype: of the parameters in memory (float32, bfloat16 or float16).

    Everything that can be told from configs and headers is checked at once, and mismatches of all
    components are raised together as one `AegisError`. What diffusers reads past (options and
    tensors that it does not know, a deleted safety checker) is named in one warning. The weights are
    then read by another thread while the caller goes on; whoever looks at a model's `params` waits
    for them. Peak memory is the parameters plus about one tensor.
    """
    safetensors.dtype_name(dtype)  # refuses other types before any work
    found = folder.examine(hub.locate(source, revision=revision, variant=variant), variant)
    abstract, origins, problems, unread = {}, {}, [], {"model_index.json": list(found.unread)}
    for name, module_class in MODELS.items():
        component = found.components[name]
        # A copy: that of the source must stay what the file says, whatever becomes of ours.
        config = copy.deepcopy(component.config)
        abstract[name] = dataclasses.replace(_abstract(module_class, json.dumps(config)), config=config)
        origins[name], faults, unused = convert.match(name, abstract[name], component.weights.headers)
        problems += faults
        unread[f"{name}/config.json"] = _UNKNOWN_OPTIONS[name](config) if name in _UNKNOWN_OPTIONS else []
        unread[f"the weights of {name}"] = unused
    convert.refuse(problems, found.path)
    _tell(unread, found.absent)
    # Of the table that was built, since a config may leave its size out.
    embeddings = abstract["text_encoder"].params["text_model"]["embeddings"]
    tokenizer = Tokenizer(
        found.path / "tokenizer",
        limit=embeddings["position_embedding"]["embedding"].shape[0],
        vocabulary=embeddings["token_embedding"]["embedding"].shape[0],
    )
    readers = {
        name: convert.reader(abstract[name], origins[name], found.components[name].weights.headers, dtype)
        for name in ("text_encoder", "unet", "vae")  # as they are needed
    }
    # One after the other: each reads on all cores.
    thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="weights")
    models = {name: dataclasses.replace(abstract[name], params=thread.submit(read)) for name, read in readers.items()}
    thread.shutdown(wait=False)
    return Pipeline(
        **models,
        tokenizer=tokenizer,
        scheduler=copy.deepcopy(found.components["scheduler"].config),
        source=Source(found, origins),
    )
