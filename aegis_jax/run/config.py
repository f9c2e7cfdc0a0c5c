"""What a run is: model, concepts, the method's settings, and how it is kept.

Three layers, later ones win: the defaults of the dataclasses, a config file, `key=value` overrides.
A config file is Python with `get_config()` returning an `ml_collections.ConfigDict` of the keys
that differ from the defaults. Keys are the fields of `RunConfig` (but `erase`, whose own fields
stand beside them) and of the groups in it: `steps`, `grp.omega`, `checkpoint.every`. `method` names a
preset: it sets all that makes a method and leaves the scale of the run (presets.SCALE) as it is; what
else its layer sets comes on top.
"""

import dataclasses
import difflib
import importlib.util
import numbers
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

from aegis_jax import worlds
from aegis_jax.erasure.presets import DEFAULT, preset, switched
from aegis_jax.errors import AegisError

if typing.TYPE_CHECKING:
    from aegis_jax.world.interface import EmbeddedWorld

_WANTED = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps from one checkpoint to the next
    keep: int = 2  # newest checkpoints kept


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # devices that share a batch
    fsdp: int = 1  # devices that share every large tensor


@dataclasses.dataclass(frozen=True)
class PictureConfig:
    images: int = 3  # per prompt, before and after; 0: no picture
    steps: int = 25  # DDIM steps
    guidance: float = 7.5  # classifier-free guidance scale


@dataclasses.dataclass(frozen=True)
class RunConfig:
    model: str = ""  # diffusers folder, hub id, "world" or "canvas"
    revision: str = ""  # branch, tag or commit of a hub id
    variant: str = ""  # which of the model's weights, e.g. "fp16" for model.fp16.safetensors
    concepts: tuple[str, ...] = ()  # what to erase, as text
    checkpoint: CheckpointConfig = CheckpointConfig()
    picture: PictureConfig = PictureConfig()
    mesh: MeshConfig = MeshConfig()
    erase: typing.Any = preset(DEFAULT).settings  # of the method (erasure.method.Method.settings)

    @property
    def method(self):
        """The method of the settings (`erasure.method.Method`)."""
        return preset(self.erase.method).method

    @property
    def world(self) -> "EmbeddedWorld | None":
        """The embedded world that is erased from, if it is one."""
        return worlds.find(self.model) if self.model in worlds.NAMES else None

    def validate(self) -> None:
        """Raises `AegisError` for values out of range, the method's own included."""
        for key, value, least in (
            ("mesh.data", self.mesh.data, 1),
            ("mesh.fsdp", self.mesh.fsdp, 1),
            ("checkpoint.every", self.checkpoint.every, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("picture.images", self.picture.images, 0),
            ("picture.steps", self.picture.steps, 1),
        ):
            if value < least:
                raise AegisError(f"config key {key!r}: got {value}, wanted {least} or more")
        self.method.check(self.erase)
        if self.erase.steps >= 2**31:
            raise AegisError("config key 'steps': wanted less than 2**31, since they are counted in 32 bits")
        devices = self.mesh.data * self.mesh.fsdp
        if getattr(self.erase, "batch", devices) % devices:
            raise AegisError(
                f"batch={self.erase.batch} is not divisible by the {devices} devices of mesh.data={self.mesh.data} x "
                f"mesh.fsdp={self.mesh.fsdp}, so each would compute all of it; take a multiple as batch"
            )


def load(source=None, overrides: Iterable[tuple[str, str]] = ()) -> RunConfig:
    """The configuration from a file and overrides, checked.

    source: None (the defaults), a path, or the name of a config that comes with aegis_jax, such as
    "world". overrides: (dotted key, text) pairs from the command line.
    """
    entries = flat(_read_file(source)) if source is not None else {}
    where = f"{source}: " if source is not None else ""
    return merge(merge(RunConfig(), entries, where=where), {}, overrides)


def merge(
    config: RunConfig,
    entries: Mapping[str, typing.Any],
    overrides: Iterable[tuple[str, str]] = (),
    where: str = "",
) -> RunConfig:
    """`config` with typed entries {dotted key: value} and textual overrides set, and checked."""
    overrides = pairs(overrides)
    method = dict(overrides).get("method", entries.get("method"))
    if method is not None:
        config = dataclasses.replace(config, erase=switched(config.erase, method))
    types, problems, values = keys(config), [], {}
    for key, value in entries.items():
        _set(values, problems, types, key, value, where)
    for key, text in overrides:
        value = _parse(types[key], text) if key in types else text
        _set(values, problems, types, key, value, "")
    if problems:
        raise AegisError("; ".join(problems))
    config = _replace(config, values)
    config.validate()
    return config


def pairs(overrides) -> list[tuple[str, str]]:
    """Overrides as a list. Raises `AegisError` for what are no (key, text) pairs."""
    found = [None] if isinstance(overrides, Mapping) or not isinstance(overrides, Iterable) else list(overrides)
    if not all(isinstance(pair, tuple | list) and list(map(type, pair)) == [str, str] for pair in found):
        raise AegisError(f"overrides={overrides!r:.80}: wanted pairs of texts, such as [('steps', '500')]")
    return found


def typed(config: RunConfig) -> RunConfig:
    """The configuration, each value as its key's type. Raises `AegisError` naming every other, as `merge` does."""
    types, problems, found = keys(config), [], {}
    for key, value in values(config).items():
        _set(found, problems, types, key, value, "")
    if problems:
        raise AegisError("; ".join(problems))
    return _replace(config, found)


def keys(config: RunConfig | None = None) -> dict[str, typing.Any]:
    """Every key of a configuration with its type: {"steps": int, "grp.omega": float, ...}."""
    config = config or RunConfig()

    def walk(cls, prefix):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kind = hints[field.name]
            if cls is RunConfig and field.name == "erase":
                yield from walk(type(config.erase), "")
            elif dataclasses.is_dataclass(kind):
                yield from walk(kind, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}", kind

    return dict(walk(RunConfig, ""))


def values(config: RunConfig) -> dict[str, typing.Any]:
    """{dotted key: value}, what `merge` takes; tuples are given as lists, as JSON has them."""
    tree = dataclasses.asdict(config)
    tree |= tree.pop("erase")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flat(tree).items()}


def find(source) -> Path:
    """The file of a config. A bare name is always one of ours; a path, with a separator or .py, is the user's file."""
    if not isinstance(source, str | os.PathLike):
        kind = f"the class {source.__name__}" if isinstance(source, type) else f"of type {type(source).__name__}"
        raise AegisError(f"config is {kind}: give settings such as EraseConfig(), a dict of them, or a config's name")
    path = Path(source)
    if path.suffix == ".py" and path.is_file():
        return path
    # An installation has its configs inside the package, a checkout beside it: there another package's never lie.
    package = Path(__file__).parent.parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    ours = {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"} if folder else {}
    if str(source) in ours:
        return ours[str(source)]
    raise AegisError(f"config {str(source)!r} not found: give a .py file or one of {', '.join(ours)}")


def _read_file(source) -> dict:
    path = find(source)
    spec = importlib.util.spec_from_file_location("aegis_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # whatever the user's Python raises
        raise AegisError(f"{path}: {type(error).__name__}: {error}") from error
    if not hasattr(config, "to_dict"):
        raise AegisError(f"{path}: get_config() gave {type(config).__name__}, wanted ConfigDict")
    return config.to_dict()


def flat(tree: Mapping, prefix: str = "") -> dict:
    """{"grp": {"omega": 1}} -> {"grp.omega": 1}; a mapping that is empty stays, for its key may be none."""
    entries = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            entries |= flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries


def _set(values, problems, types, key, value, where):
    if key not in types:
        if not (isinstance(value, Mapping) and not value and _group(key, types)):  # a group of which nothing is set
            problems.append(f"{where}{_unknown(key, types)}")
        return
    try:
        values[key] = _checked(types[key], value)
    except TypeError:
        problems.append(
            f"{where}config key {key!r}: got {value!r} ({type(value).__name__}), wanted {_WANTED[types[key]]}"
        )


def _group(key: str, types) -> list[str]:
    """The keys of a group of that name, if there is one."""
    return sorted(k for k in types if k.startswith(f"{key}."))


def _unknown(key: str, types) -> str:
    group = _group(key, types)
    if group:
        return f"config key {key!r} is a group: set {', '.join(group)}"
    close = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
    # A right name in the wrong group is far in letters and near in meaning.
    last = key.rpartition(".")[2]
    close = [k for k in types if k.rpartition(".")[2] == last] or close
    advice = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(types)}"
    return f"unknown config key {key!r}; {advice}"


def _checked(kind, value):
    """`value` as `kind`, or TypeError; an int passes as float, a list as tuple, NumPy's numbers as Python's."""
    if kind == tuple[str, ...] and isinstance(value, (tuple, list)):
        return tuple(_checked(str, item) for item in value)
    number = {int: numbers.Integral, float: numbers.Real}.get(kind)
    if number and isinstance(value, number) and type(value) is not bool:
        try:
            return kind(value)
        except OverflowError:  # a whole number beyond the floats
            raise TypeError from None
    if type(value) is kind:
        return value
    raise TypeError


def _parse(kind, text: str):
    """Text from the command line as `kind`; what cannot be read so stays text, to be refused."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(","))
    if kind in (int, float):
        try:
            return text if "_" in text else kind(text)  # Python reads 7_5 as 75
        except ValueError:
            return text
    return text


def _replace(config, values: dict):
    """A dataclass tree with dotted keys replaced; keys of `erase` come without that prefix."""
    changes, groups = {}, {}
    own = {field.name for field in dataclasses.fields(config)}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        if name not in own:
            groups.setdefault("erase", {})[key] = value
        elif rest:
            groups.setdefault(name, {})[rest] = value
        else:
            changes[name] = value
    for name, inner in groups.items():
        changes[name] = _replace(getattr(config, name), inner)
    return dataclasses.replace(config, **changes)
