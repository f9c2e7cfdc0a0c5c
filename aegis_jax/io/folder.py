"""What a diffusers folder holds: components, configs and weight files, all checked at once."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable

from aegis_jax.errors import AegisError
from aegis_jax.io import hub, safetensors

# The classes that each required component may have; what is not here is refused by name.
REQUIRED = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": None,  # any: sampling is DDIM with the betas and offsets of its config
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
FOREIGN = ("transformer", "prior", "text_encoder_2", "unet_2")  # of other architectures
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # a pipeline may go without them
NEED_WEIGHTS = ("safety_checker", "image_encoder")  # not needed here, but diffusers loads none of them without
_DEEPEST = 100  # lists and objects in each other that a JSON file may have; more would overflow the stack in copies
_SUPPORTED = "aegis_jax reads Stable Diffusion 1.x and 2.x (StableDiffusionPipeline)"


@dataclasses.dataclass(frozen=True)
class File:
    """A small file to copy: where it is, its name in an export, its state when found."""

    path: pathlib.Path
    name: str
    size: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Weights:
    """A component's weight files.

    names: theirs in an export, without the variant. index: of sharded weights.
    """

    headers: tuple[safetensors.Header, ...]
    names: tuple[str, ...]
    index: File | None


@dataclasses.dataclass(frozen=True)
class Component:
    """One entry of model_index.json.

    config: of those in CONFIGS only, without what diffusers does not take from the file. weights: None where a
    component has none.
    """

    name: str
    class_name: str
    config: dict | None
    files: tuple[File, ...]
    weights: Weights | None


@dataclasses.dataclass(frozen=True)
class Folder:
    """A diffusers folder: model_index.json as read, files to copy, and its components.

    absent: optional components that the index names and the folder does not have, a deleted safety checker for
    example; diffusers loads such a folder when told to do without. unread: what else the index lists without being a
    component that is there; diffusers reads past it.
    """

    path: pathlib.Path
    index: dict
    files: tuple[File, ...]
    components: dict[str, Component]
    absent: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


def examine(path: pathlib.Path, variant: str | None = None) -> Folder:
    """Reads every config and every safetensors header of a diffusers folder, no weights.

    variant: as in diffusers, e.g. "fp16" for `model.fp16.safetensors`; a component without it falls
    back to the plain name. Raises `AegisError` for whatever is no pipeline, unsupported, incomplete
    or damaged.
    """
    if not (path / "model_index.json").is_file():
        _refuse_other_folder(path)
    index = read_json(path / "model_index.json")
    classes = _check_classes(path, index)
    found = variants(path, classes)
    if variant is not None and variant not in found:
        others = f"variants there: {', '.join(sorted(found))}" if found else "it has no variants"
        raise AegisError(f"{path} has no weights of variant {variant!r}: {others}")
    absent = tuple(name for name in classes if name in OPTIONAL and not (path / name).exists())
    components = {
        name: _component(path, name, class_name, variant) for name, class_name in classes.items() if name not in absent
    }
    licences = sorted(p for p in path.iterdir() if p.is_file() and p.name.upper().startswith("LICENSE"))
    files = (
        _file(path / "model_index.json"),
        *(_file(p) for p in licences if p.suffix in {"", ".txt", ".md"}),
    )
    unread = tuple(
        name
        for name, value in index.items()
        if isinstance(value, list) and name not in classes and value[1:] != [None] and not name.startswith("_")
    )
    return Folder(path, index, files, components, absent, unread)


def read_json(path: pathlib.Path) -> dict:
    """A JSON file that holds an object; `AegisError` if it is missing, broken or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AegisError(f"{path} is missing: the folder is incomplete, download or copy it again") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AegisError(f"{path} is not valid JSON ({reason}): mend it or download it again") from None
    except OSError as error:
        raise AegisError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise AegisError(f"{path} holds a JSON {type(value).__name__}, wanted an object: download it again")
    if _is_deep(value):
        raise AegisError(f"{path} is not valid JSON (nested too deeply): mend it or download it again")
    return value


def _is_deep(value: dict) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner = [x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)]
        level = [x for x in inner if isinstance(x, (dict, list))]
    return bool(level)


def _refuse_other_folder(path: pathlib.Path) -> None:
    if not path.is_dir():
        raise AegisError(f"{path} is not a folder")
    if (path / "pipeline" / "model_index.json").is_file():
        raise AegisError(f"{path} is the folder of a run: its result is {path / 'pipeline'}")
    if (path / "metrics.jsonl").is_file():
        raise AegisError(f"{path} is the folder of a run that has no result yet: go on with it (aegis erase --resume)")
    if (path / "config.json").is_file():
        raise AegisError(
            f"{path} has a config.json but no model_index.json: it looks like one component, give the folder above it"
        )
    for file in sorted(path.iterdir()):
        if file.suffix in {*hub.PICKLES, ".safetensors", hub.FLAX}:
            hub.refuse_file(file)
    raise AegisError(f"{path} is not a diffusers pipeline: it has no model_index.json")


def _check_classes(path: pathlib.Path, index: dict) -> dict[str, str]:
    """{component: class name} of the components that the pipeline has."""
    where = path / "model_index.json"
    pipeline = index.get("_class_name")
    named = [value[1] for value in index.values() if isinstance(value, list) and len(value) == 2]
    if any(str(name).startswith("Flax") for name in (pipeline, *named)):
        raise AegisError(f"{where}: the weights are Flax's, which are not read; {hub.how_to_convert_flax(path)}")
    if pipeline not in PIPELINES:
        raise AegisError(f"{where}: {pipeline} is not supported; {_SUPPORTED}")
    classes = {}
    for name, value in index.items():
        if not isinstance(value, list):
            continue
        if not _is_pair(value):
            if name not in (*REQUIRED, *OPTIONAL):  # no component that the pipeline takes
                continue
            raise AegisError(f"{where}: {name} should be [library, class], found {json.dumps(value)[:100]}")
        if name != pathlib.Path(name).name or name in ("", ".."):
            raise AegisError(f"{where}: {name!r} is not the name of a component")
        known = name in (*REQUIRED, *OPTIONAL, *FOREIGN)
        if value[1] is not None and (known or (path / name).exists()):
            classes[name] = value[1]
    problems = []
    for name, allowed in REQUIRED.items():
        if name not in classes:
            problems.append(f"{name} is missing")
        elif allowed and classes[name] not in allowed:
            problems.append(f"{name} is a {classes[name]}, wanted {allowed[0]}")
    others = [f"{name} ({classes[name]})" for name in FOREIGN if name in classes]
    if others:
        problems.append(f"{', '.join(others)} belongs to another architecture")
    if problems:
        raise AegisError(f"{where}: {'; '.join(problems)}; {_SUPPORTED}")
    return classes


def _is_pair(value: list) -> bool:
    """Whether an entry of model_index.json is [library, class], or [null, null] as of a component left out."""
    return len(value) == 2 and all(part is None or isinstance(part, str) for part in value)


def _component(root: pathlib.Path, name: str, class_name: str, variant: str | None) -> Component:
    path = root / name
    if not path.is_dir():
        raise AegisError(f"{root}: model_index.json names the component {name} but there is no folder of that name")
    config = _settings(path / CONFIGS[name]) if name in CONFIGS else None
    if name in REQUIRED and REQUIRED[name] and config and config.get("_class_name", class_name) != class_name:
        raise AegisError(
            f"{path / CONFIGS[name]}: _class_name is {config['_class_name']}, "
            f"model_index.json says {class_name}: they must agree"
        )
    files = tuple(
        _file(file)
        for file in sorted(path.iterdir())
        if file.suffix in {".json", ".txt", ".model"} and ".index." not in file.name and file.is_file()
    )
    weights = _weights(path, name, variant)
    if weights is None and name in hub.NEEDED:
        raise AegisError(
            f"{path} has no weights: wanted {hub.stems(name)[0]}.safetensors, or .safetensors.index.json and its files"
        )
    return Component(name, class_name, config, files, weights)


def _settings(path: pathlib.Path) -> dict:
    """A component's config, without what diffusers' classes have by default and filled in when the file was written."""
    config = read_json(path)
    filled_in = config.pop("_use_default_values", None)
    return {key: value for key, value in config.items() if not (isinstance(filled_in, list) and key in filled_in)}


def variants(root: pathlib.Path, components: Iterable[str]) -> set[str]:
    """The variants of which any of these components has weights."""
    return {found for name in components for found in hub.variants(name, _names(root / name))}


def _names(path: pathlib.Path) -> list[str]:
    return [file.name for file in path.iterdir()] if path.is_dir() else []


def _weights(path: pathlib.Path, component: str, variant: str | None) -> Weights | None:
    for mark in dict.fromkeys((variant, None)):
        for stem in hub.stems(component):
            middle = f".{mark}" if mark else ""
            single = path / f"{stem}{middle}.safetensors"
            indices = [
                path / f"{stem}.safetensors.index{middle}.json",
                path / f"{stem}.safetensors{middle}.index.json",
            ]
            index = next((file for file in indices if file.is_file()), None)
            # Where both exist diffusers reads the shards, transformers the single file.
            if index and not (single.is_file() and stem == "model"):
                return _shards(path, stem, index, middle)
            if single.is_file():
                return Weights((safetensors.read_header(single),), (f"{stem}.safetensors",), None)
    hub.refuse_weights(component, _names(path), str(path), str(path.parent))
    return None


def _shards(path: pathlib.Path, stem: str, index: pathlib.Path, middle: str) -> Weights:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise AegisError(f"{index}: weight_map should give every tensor its file; download it again")
    names = sorted(set(table.values()))
    for name in names:
        if name != pathlib.Path(name).name or not name.endswith(".safetensors"):
            raise AegisError(f"{index}: {name!r} is not the name of a safetensors file in the same folder")
        if not (path / name).is_file():
            raise AegisError(f"{path / name} is missing, {index.name} names it: download or copy the folder again")
    headers = tuple(safetensors.read_header(path / name) for name in names)
    held = {(key, header.path.name) for header in headers for key in header.entries}
    wrong = sorted(held.symmetric_difference(table.items()))
    if wrong:
        key, name = wrong[0]
        which = "holds it, the index does not say so" if wrong[0] in held else "does not hold it"
        raise AegisError(f"{index} and its files disagree on {len(wrong)} tensors; first {key!r}: {name} {which}")
    plain = tuple(name.replace(middle, "", 1) if middle else name for name in names)
    return Weights(headers, plain, _file(index, f"{stem}.safetensors.index.json"))


def _file(path: pathlib.Path, name: str | None = None) -> File:
    status = path.stat()
    return File(path, name or path.name, status.st_size, status.st_mtime_ns)
