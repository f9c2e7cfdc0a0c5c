"""manifest.json: what a run was made from, with what, and what came out."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import jax

from aegis_jax.models.model import hash_into

BASE, TOKENIZER = "base model", "tokenizer"
_KEPT = {"fingerprint": BASE, "tokenizer": TOKENIZER}  # their keys in a manifest
PACKAGES = "aegis_jax jax jaxlib flax optax orbax-checkpoint numpy transformers".split()


def describe(run, pipeline, origin: dict) -> dict:
    """The manifest at the start of a run; origin: the `identity` of the pipeline."""
    device = jax.devices()[0]
    return {
        "status": "running",
        "method": run.erase.method,
        "concepts": list(run.concepts),
        "seed": run.erase.seed,
        "model": {
            "given": run.model,
            **{key: origin[name] for key, name in _KEPT.items()},
            "files": source_hashes(pipeline),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git(),
        "platform": platform.platform(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "command": sys.argv,
        "started": now(),
        "resumed": [],
    }


def identity(pipeline) -> dict[str, str]:
    """What a run is made from, by the names under which runs are compared."""
    return {BASE: fingerprint(pipeline), TOKENIZER: pipeline.tokenizer.digest()}


def identity_of(story: dict, now: dict[str, str]) -> dict[str, str]:
    """The same of a manifest; now: what holds for one that is older than a name and says nothing of it."""
    return {name: story["model"].get(key, now[name]) for key, name in _KEPT.items()}


def fingerprint(pipeline) -> str:
    """sha256 of what training reads of a pipeline: UNet and text encoder parameters, and schedule.

    Of the arrays in memory rather than of files, since a pipeline may have been changed since it
    was loaded.
    """
    digest = hashlib.sha256(json.dumps(pipeline.scheduler, sort_keys=True).encode())
    for name in ("unet", "text_encoder"):
        hash_into(digest, name, getattr(pipeline, name))
    return digest.hexdigest()


def source_hashes(pipeline) -> dict[str, str]:
    """{path in the source folder: sha256} of the files that the pipeline was loaded from."""
    if pipeline.source is None:
        return {}
    folder = pipeline.source.folder
    paths = {file.path for file in folder.files}
    for component in folder.components.values():
        paths |= {file.path for file in component.files}
        if component.weights:
            paths |= {header.path for header in component.weights.headers}
    return {str(path.relative_to(folder.path)): _sha256(path) for path in sorted(paths)}


def folder_hashes(folder: Path) -> dict[str, str]:
    """{path in the folder: sha256} of every file in it."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str | None]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None  # aegis_jax itself, used from a checkout without installing
    return found


def _git() -> dict | None:
    """Revision of the checkout that this code lies in; None outside one."""
    here = Path(__file__).parent.parent.parent
    if not (here / ".git").exists():
        return None

    def ask(*args):
        answer = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    try:
        revision, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain")
    except FileNotFoundError:  # no git on this machine
        return None
    return {"revision": revision, "modified": bool(changes)}
