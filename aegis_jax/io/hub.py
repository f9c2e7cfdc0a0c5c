"""Where a pipeline's files are: a local folder, the embedded world, or a hub repository."""

import errno
import json
import os
import pathlib
import re
from collections.abc import Iterable

from aegis_jax.errors import AegisError

_PACKAGE = pathlib.Path(__file__).parent.parent
# The embedded worlds by name, and what to do where a version comes without the weights of one.
EMBEDDED = {name: _PACKAGE / name / "weights" for name in ("world", "canvas")}
_WITHOUT = {
    "world": "the embedded world has no weights in {folder}: install aegis_jax again",
    "canvas": "the canvas's weights are not in this version; train them by `python -m tools.canvas.train --out DIR` "
    "in the repository (docs/canvas.md), and put DIR/canvas in the place of {folder}",
}
# What the names of a component's weight files begin with: the library that reads it, of these two, looks for no other.
_TRANSFORMERS, _DIFFUSERS = "model", "diffusion_pytorch_model"
_STEMS = {"unet": (_DIFFUSERS,), "vae": (_DIFFUSERS,)} | dict.fromkeys(
    ("text_encoder", "safety_checker", "image_encoder"), (_TRANSFORMERS,)
)
NEEDED = ("unet", "vae", "text_encoder")  # without weights of these there is no pipeline
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
FLAX = ".msgpack"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONVERT = (
    "convert it once in PyTorch: StableDiffusionPipeline.{load}({source!r})"
    '.save_pretrained("FOLDER", safe_serialization=True), then give FOLDER'
)
# Versions that were seen to carry every weight over. With diffusers 0.31 those of the VAE's attention come out random;
# with 0.39 and transformers 4.57 the text encoder's are not copied and the VAE is not read; then Flax was removed.
_CONVERT_FLAX = (
    "convert it once in PyTorch, in an environment of its own because later versions lose weights on the way: "
    'pip install torch "diffusers==0.14.0" "transformers==4.30.2" "huggingface_hub==0.16.4" "flax==0.7.5" '
    '"jax[cpu]==0.4.23" "scipy<1.13" "numpy<2"; '
    "StableDiffusionPipeline.from_pretrained({source!r}, from_flax=True, safety_checker=None)"
    '.save_pretrained("FOLDER", safe_serialization=True), then give FOLDER'
)


def locate(source, *, revision: str | None = None, variant: str | None = None) -> pathlib.Path:
    """The local folder of a source: itself, an embedded world's weights, or a hub repository's snapshot.

    source: path of a diffusers folder, hub id "name/name", "world" or "canvas" (a folder of that name is
    "./world"). revision: branch, tag or commit of a hub id. variant: which weights to download.
    """
    path = expand(source)
    is_local = path.exists() or str(source) in EMBEDDED
    if revision is not None and is_local:
        raise AegisError(
            f"revision {revision!r} was given but {source} is a local folder: revisions are for hub ids only"
        )
    if str(source) in EMBEDDED:
        folder = EMBEDDED[str(source)]
        if not (folder / "model_index.json").is_file():
            raise AegisError(_WITHOUT[str(source)].format(folder=folder))
        return folder
    if path.is_file():
        refuse_file(path)
    if path.exists():
        return path
    if _HUB_ID.fullmatch(str(source)):
        # "runs/star" below an existing folder "runs" is a mistyped path: not sent over the net.
        if path.parent.is_dir():
            raise AegisError(
                f"{source} does not exist in the folder {path.parent}; "
                "if a hub id is meant, start from another directory"
            )
        return _download(str(source), revision, variant)
    raise AegisError(f"{source} does not exist: give a diffusers folder, a hub id like name/name, world or canvas")


def locate_model(source, *, revision: str | None = None) -> pathlib.Path:
    """The local folder of a single model, such as a classifier: itself, or a hub repository's snapshot.

    Raises `AegisError` where there is no config.json with safetensors beside it.
    """
    folder = expand(source)
    # As in `locate`, a mistyped path is not sent over the net.
    if not folder.exists() and _HUB_ID.fullmatch(str(source)) and not folder.parent.is_dir():
        folder = _fetch(str(source), revision, ["*.json", "*.txt", "*.model", "*.safetensors"])
    elif revision is not None:
        raise AegisError(f"revision {revision!r} was given but {source} is no hub id")
    if not (folder / "config.json").is_file():
        raise AegisError(f"{source} is no model: wanted a folder with a config.json, or a hub id like name/name")
    if not model_weights(folder):
        raise AegisError(
            f"{source} has no model.safetensors, and pickles are refused; convert it once in PyTorch: its class's "
            f'from_pretrained({str(source)!r}).save_pretrained("FOLDER"), then give FOLDER'
        )
    return folder


def model_weights(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a single model's folder, in order."""
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))


def model_settings(folder: pathlib.Path) -> list[pathlib.Path]:
    """What else a single model's answers depend on: configs, of how pictures are prepared too, and its tokenizer."""
    return sorted([*folder.glob("*.json"), *folder.glob("merges.txt")])


def expand(path) -> pathlib.Path:
    """A path with its ~ spelled out; `AegisError` where that is nobody's home, not UTF-8, a circle, or no path."""
    if not isinstance(path, str | os.PathLike):
        raise AegisError(f"wanted a path or a name, found an object of type {type(path).__name__}")
    try:
        path = pathlib.Path(path).expanduser()
    except RuntimeError:
        raise AegisError(f"{path} begins with ~ but there is no such home folder: write the path out") from None
    try:
        str(path).encode()
        path.resolve(strict=True)
    except UnicodeEncodeError:
        raise AegisError(f"{str(path)!r} is not UTF-8: rename it") from None
    except ValueError:  # a null byte
        raise AegisError(f"{str(path)!r} is not a path") from None
    except (RuntimeError, OSError) as error:  # RuntimeError: before Python 3.13
        if isinstance(error, RuntimeError) or error.errno == errno.ELOOP:
            raise AegisError(f"{path} cannot be followed: symbolic links in a circle") from None
    return path


def place(source) -> str:
    """A model as records name it: "world" or "canvas", an absolute folder, or the hub id."""
    path = expand(source)
    for name, folder in EMBEDDED.items():
        if str(source) == name or path.resolve() == folder.resolve():
            return name
    return str(path.resolve()) if path.is_dir() else str(source)


def commit(source, folder: pathlib.Path) -> str:
    """The revision that gives a hub id's `folder` (of `locate`) again, whatever its branch has by then; else ""."""
    return folder.name if not expand(source).exists() and folder.parent.name == "snapshots" else ""


def refuse_file(path: pathlib.Path) -> None:
    """Raises the `AegisError` for a single file where a diffusers folder is wanted."""
    advice = _CONVERT.format(load="from_single_file", source=str(path))
    if path.suffix in PICKLES:
        raise AegisError(f"{path} is a pickle, which can run code when it is read, so it is refused; {advice}")
    if path.suffix == FLAX:
        folder = next((p for p in path.parents if (p / "model_index.json").is_file()), "the folder of its pipeline")
        raise AegisError(f"{path} holds Flax weights, which are not read; {how_to_convert_flax(folder)}")
    if path.suffix == ".safetensors":
        raise AegisError(f"{path} is a single file, not a diffusers folder; {advice}")
    raise AegisError(f"{path} is a file: give a diffusers folder, a hub id like name/name, world or canvas")


def how_to_convert(folder) -> str:
    """The sentence that tells how to turn a folder of pickles into safetensors."""
    return _CONVERT.format(load="from_pretrained", source=str(folder))


def how_to_convert_flax(folder) -> str:
    """The same for a folder of Flax weights."""
    return _CONVERT_FLAX.format(source=str(folder))


def stems(component: str) -> tuple[str, ...]:
    """What the names of a component's weight files begin with; either where it is none that is known here."""
    return _STEMS.get(component, (_DIFFUSERS, _TRANSFORMERS))


def variants(component: str, names: Iterable[str]) -> set[str]:
    """The variants of which a component has weights among files of these names: "fp16" of model.fp16.safetensors."""
    found = [name for name in names if name.startswith(stems(component)) and name.endswith(".safetensors")]
    marked = [name.partition(".")[2].removesuffix("safetensors").rstrip(".") for name in found]
    return {re.sub(r"-\d+-of-\d+$", "", mark) for mark in marked if mark}


def refuse_weights(component: str, names: Iterable[str], folder: str, source: str) -> None:
    """Raises the `AegisError` for a component without weights that are read, where its files' names say why.

    folder: that of the component as the message names it; source: what diffusers would load the pipeline from.
    """
    names = sorted(names)
    found = sorted(variants(component, names))
    if found:
        raise OtherVariants(folder, found)
    for name in names:
        if name.endswith(PICKLES):
            raise AegisError(
                f"{folder}/{name} is a pickle, which can run code when it is read, so it is refused; "
                f"{how_to_convert(source)}"
            )
    for name in names:
        if name.endswith(FLAX):
            raise AegisError(f"{folder}/{name} holds Flax weights, which are not read; {how_to_convert_flax(source)}")
    other = {_DIFFUSERS, _TRANSFORMERS} - set(stems(component))
    for name in names:
        if re.split("[.-]", name)[0] in other and name.endswith(".safetensors"):
            wanted = stems(component)[0]
            raise AegisError(
                f"{folder} has no weights of a name that diffusers reads: wanted {wanted}.safetensors, found {name}; "
                "rename it, or save the model again in PyTorch"
            )


class OtherVariants(AegisError):
    """A component has weights of variants alone, of none that was asked for."""

    def __init__(self, folder: str, found: list[str]):
        super().__init__(
            f"{folder} has weights of variant {', '.join(found)} only: give variant={found[0]!r} "
            f"(--variant {found[0]} on the command line)"
        )


def _download(repository: str, revision: str | None, variant: str | None) -> pathlib.Path:
    """The snapshot of a hub repository, with only the files that a pipeline needs."""

    index = _fetch(repository, revision, ["model_index.json"]) / "model_index.json"
    try:
        fields = json.loads(index.read_text(encoding="utf-8"))
        # Values are [library, class] for components, plain settings otherwise.
        names = [name for name, value in fields.items() if isinstance(value, list) and value[:1] not in ([], [None])]
    except FileNotFoundError:
        raise AegisError(f"{repository} on the hub has no model_index.json: it is no diffusers pipeline") from None
    except (ValueError, AttributeError, RecursionError):
        names = []  # reported with the folder's other faults when it is read
    texts = [f"{name}/{pattern}" for name in names for pattern in ("*.json", "*.txt", "*.model")]
    texts += ["model_index.json", "LICENSE*"]
    folder = _fetch(repository, revision, texts + _weights(names, variant or ""))
    plain = [name for name in names if variant and not list((folder / name).glob(f"*.{variant}*.safetensors"))]
    if plain:
        folder = _fetch(repository, revision, texts + _weights(plain, ""))
    bare = [name for name in names if name in NEEDED and not list((folder / name).glob("*.safetensors"))]
    _refuse_undownloaded(repository, revision, bare)
    return folder


def _refuse_undownloaded(repository: str, revision: str | None, bare: list[str]) -> None:
    """Says what components of which no weights were downloaded have instead, where the hub's list of files tells."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        files = huggingface_hub.list_repo_files(repository, revision=revision) if bare else []
    except (OSError, ValueError, errors.HTTPError):  # out of reach: the folder's own faults are told when it is read
        return
    for name in bare:
        here = [file.rpartition("/")[2] for file in files if file.rpartition("/")[0] == name]
        refuse_weights(name, here, f"{repository}/{name}", repository)


def _weights(names: list[str], variant: str) -> list[str]:
    middle = f".{variant}" if variant else ""
    return [
        f"{name}/{stem}{middle}{ending}"
        for name in names
        for stem in stems(name)
        for ending in (".safetensors", "-*-of-*.safetensors")
    ]


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    named = repository + (f" at revision {revision!r}" if revision else "")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise AegisError(f"{named} is gated: accept its licence on the hub and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise AegisError(
            f"{repository} has no revision {revision!r} on the hub: give a branch, tag or commit"
        ) from None
    except errors.RepositoryNotFoundError:
        raise AegisError(
            f"{repository} is neither a local folder nor a hub repository that you can read: "
            "check the name, or log in with `hf auth login`"
        ) from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
    ) as error:
        raise AegisError(
            f"{named} is no local folder, is not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}): check the name and the connection, or give a local folder"
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:  # disk, malformed id, proxy
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise AegisError(f"cannot download {named}: {reason}") from error
