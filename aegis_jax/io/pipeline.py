"""A Stable Diffusion pipeline in memory, and how it is loaded. Exporting is in `export.py`."""

import concurrent.futures
import copy
import dataclasses
import functools
import json

import jax.numpy as jnp

from aegis_jax.io import convert, folder, hub, safetensors
from aegis_jax.io.tokenizer import Tokenizer
from aegis_jax.models import model
from aegis_jax.models.clip import CLIPTextModel
from aegis_jax.models.model import Model
from aegis_jax.models.unet import UNet2DConditionModel
from aegis_jax.models.vae import AutoencoderKL

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


@functools.lru_cache(maxsize=16)
def _abstract(module_class, config: str) -> Model:
    """The abstract model of a config.json's text, kept because tracing it takes seconds."""
    return model.abstract(module_class, json.loads(config))


def load_pipeline(source, *, revision: str | None = None, variant: str | None = None, dtype=jnp.float32) -> Pipeline:
    """Loads a Stable Diffusion 1.x or 2.x from safetensors.

    source: a diffusers folder, a hub id "name/name", or "world" (the embedded model).
    revision: branch, tag or commit of a hub id. variant: e.g. "fp16" for model.fp16.safetensors.
    dtype: of the parameters in memory (float32, bfloat16 or float16).

    Everything that can be told from configs and headers is checked at once, and mismatches of all
    components are raised together as one `AegisError`. The weights are then read by another thread
    while the caller goes on; whoever looks at a model's `params` waits for them. Peak memory is the
    parameters plus about one tensor.
    """
    safetensors.dtype_name(dtype)  # refuses other types before any work
    found = folder.examine(hub.locate(source, revision=revision, variant=variant), variant)
    abstract, origins, problems = {}, {}, []
    for name, module_class in MODELS.items():
        component = found.components[name]
        # A copy: that of the source must stay what the file says, whatever becomes of ours.
        config = copy.deepcopy(component.config)
        abstract[name] = dataclasses.replace(_abstract(module_class, json.dumps(config)), config=config)
        origins[name], faults = convert.match(name, abstract[name], component.weights.headers)
        problems += faults
    convert.refuse(problems, found.path)
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
