"""Hub ids: offline through the cache's layout, and which files would be downloaded."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from aegis_jax.errors import AegisError
from aegis_jax.io import hub

ROOT = pathlib.Path(__file__).parents[2]
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(tiny, tmp_path):
    """A cache folder as huggingface_hub lays it out, with two revisions of org/tiny."""
    repository = tmp_path / "hub/models--org--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for number, (revision, commit) in enumerate(COMMITS.items()):
        (repository / "refs" / revision).write_text(commit)
        source = tiny(seed=number)
        for path in sorted(source.rglob("*")):
            if path.is_file():
                blob = repository / "blobs" / f"{number}-{path.parent.name}-{path.name}"
                shutil.copy(path, blob)
                link = repository / "snapshots" / commit / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))
    return tmp_path


@pytest.fixture
def offline(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))


LOAD_AND_SAVE = """
import sys
from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import load_pipeline
pipeline = load_pipeline("org/tiny", revision=sys.argv[1])
print(pipeline.tokenizer.ids(["a red star"])[0, :5].tolist())
save_pipeline(pipeline, sys.argv[2])
"""


def test_offline_through_the_cache(cache, tiny, tmp_path):
    env = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD_AND_SAVE, "v2", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[590, 320, 532, 542, 591]\n"
    for name in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"):
        copied = tmp_path / "out" / name
        assert copied.read_bytes() == (tiny(seed=1) / name).read_bytes()
        assert not copied.is_symlink()


def test_revisions(cache, offline):
    snapshots = cache / "hub/models--org--tiny/snapshots"
    assert hub.locate("org/tiny") == snapshots / COMMITS["main"]
    assert hub.locate("org/tiny", revision="v2") == snapshots / COMMITS["v2"]
    assert hub.locate("org/tiny", revision=COMMITS["v2"]) == snapshots / COMMITS["v2"]
    with pytest.raises(AegisError, match="org/tiny at revision 'v3' is no local folder, is not in"):
        hub.locate("org/tiny", revision="v3")
    with pytest.raises(AegisError, match="no/such is no local folder, is not in the hub's cache"):
        hub.locate("no/such")


def test_what_records_name_gives_the_same_again(cache, offline):
    """A branch moves, a commit does not."""
    for given, wanted in COMMITS.items():
        folder = hub.locate("org/tiny", revision=given)
        assert (hub.place("org/tiny"), hub.commit("org/tiny", folder)) == ("org/tiny", wanted)
        assert hub.locate("org/tiny", revision=wanted) == folder
        assert (hub.place(folder), hub.commit(folder, folder)) == (str(folder), "")
    assert (hub.place("world"), hub.commit("world", hub.locate("world"))) == ("world", "")


def test_not_a_pipeline_on_the_hub(cache, offline):
    (cache / "hub/models--org--tiny/snapshots" / COMMITS["main"] / "model_index.json").unlink()
    with pytest.raises(AegisError, match="org/tiny on the hub has no model_index.json"):
        hub.locate("org/tiny")


def test_local_folders(tiny, tmp_path, monkeypatch):
    folder = tiny()
    assert hub.locate(folder) == hub.locate(str(folder)) == folder
    with pytest.raises(AegisError, match="revision 'v2' was given but .* is a local folder"):
        hub.locate(folder, revision="v2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world").mkdir()
    monkeypatch.setitem(hub.EMBEDDED, "world", folder)
    assert hub.locate("world") == folder
    assert hub.locate("./world") == pathlib.Path("world")
    monkeypatch.setitem(hub.EMBEDDED, "world", tmp_path / "gone")
    with pytest.raises(AegisError, match="the embedded world has no weights"):
        hub.locate("world")


# The files of stable-diffusion-v1-5 on the hub, and some more.
REPOSITORY = """
.gitattributes model_index.json README.md LICENSE.md v1-5-pruned.ckpt v1-5-pruned.safetensors
feature_extractor/preprocessor_config.json scheduler/scheduler_config.json
safety_checker/config.json safety_checker/model.safetensors safety_checker/pytorch_model.bin
safety_checker/model.fp16.safetensors
text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
text_encoder/pytorch_model.bin tokenizer/merges.txt tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json tokenizer/vocab.json unet/config.json
unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.safetensors
unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.non_ema.safetensors
unet/diffusion_pytorch_model-00001-of-00002.safetensors
unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors vae/config.json
vae/diffusion_pytorch_model.safetensors images/a.png transformer/config.json vae_decoder/model.onnx
""".split()
INDEX = """{"_class_name": "StableDiffusionPipeline", "requires_safety_checker": true,
"feature_extractor": ["a", "b"], "safety_checker": ["a", "b"], "scheduler": ["a", "b"],
"text_encoder": ["a", "b"], "tokenizer": ["a", "b"], "unet": ["a", "b"], "vae": ["a", "b"],
"image_encoder": [null, null]}"""
TEXTS = {
    name for name in REPOSITORY if name.endswith((".json", ".txt", "LICENSE.md")) and not name.startswith("transformer")
}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_needed_files_are_downloaded(variant, tmp_path, monkeypatch):
    asked = []

    def download(repository, *, revision, allow_patterns):
        assert (repository, revision) == ("org/sd", "main")
        chosen = set(filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns))
        asked.append(chosen)
        for name in chosen:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(INDEX if name == "model_index.json" else "")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.locate("org/sd", revision="main", variant=variant) == tmp_path
    assert asked[0] == {"model_index.json"}
    if variant:
        wanted = {name for name in REPOSITORY if ".fp16" in name}
        wanted.add("vae/diffusion_pytorch_model.safetensors")  # it has no fp16
    else:
        wanted = {
            name for name in REPOSITORY if name.endswith(".safetensors") and "/" in name and ".fp16" not in name
        } - {"unet/diffusion_pytorch_model.non_ema.safetensors"}
    assert set().union(*asked) == TEXTS | wanted


@pytest.fixture
def published(tmp_path, monkeypatch):
    """published(folder) makes it the hub's only repository, org/sd."""

    def publish(folder):
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        cache = tmp_path / "cache"

        def download(repository, *, revision, allow_patterns):
            for name in filter_repo_objects(files, allow_patterns=allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, cache / name)
            return str(cache)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository, revision: files)
        return cache

    return publish


@pytest.mark.parametrize(
    ("ending", "asked", "message"),
    [
        (".bin", None, r"org/sd/unet/\w+.bin is a pickle.*from_pretrained\('org/sd'\)"),
        (".fp16.safetensors", None, "org/sd/unet has weights of variant fp16 only: give variant='fp16'"),
        (".fp16.safetensors", "bf16", "org/sd/unet has weights of variant fp16 only: give variant='fp16'"),
        (".msgpack", None, r"org/sd/unet/\w+.msgpack holds Flax weights"),
    ],
)
def test_weights_that_are_not_downloaded_are_named(ending, asked, message, tiny_copy, published, monkeypatch):
    folder = tiny_copy()
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(ending))
    cache = published(folder)
    with pytest.raises(AegisError, match=message):
        hub.locate("org/sd", variant=asked)
    assert not list(cache.glob("unet/diff*"))

    def offline(*given, **more):
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    assert hub.locate("org/sd", variant=asked) == cache  # whose faults are told when it is read


def test_an_empty_list_in_the_index_is_no_component(tiny_copy, published):
    folder = tiny_copy()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"x": []}))
    published(folder)
    assert (hub.locate("org/sd") / "unet/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(
    "error, message",
    [
        (errors.GatedRepoError, "org/sd is gated: accept its licence"),
        (errors.RepositoryNotFoundError, "org/sd is neither a local folder nor a hub repository"),
        (errors.RevisionNotFoundError, "org/sd has no revision None"),
        (errors.HfHubHTTPError, "the hub cannot be reached"),
        (lambda text, response: errors.HFValidationError(text), "no way"),
        (
            lambda text, response: PermissionError(13, "Permission denied"),
            "cannot download org/sd: P",
        ),
        (lambda text, response: errors.HTTPError(text), "cannot download org/sd: no way"),
    ],
)
def test_what_the_hub_may_answer(error, message, monkeypatch):
    response = types.SimpleNamespace(headers={}, request=None)

    def download(*arguments, **options):
        raise error("no\nway", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(AegisError, match=message) as raised:
        hub.locate("org/sd")
    assert "\n" not in str(raised.value)


def model_cache(tmp_path, names):
    """The cache with a single model, org/classifier."""
    snapshot = tmp_path / "hub/models--org--classifier/snapshots" / COMMITS["main"]
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(COMMITS["main"])
    for name in names:
        (snapshot / name).write_text("{}")
    return snapshot


def test_a_single_model_comes_from_the_cache_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shards = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    snapshot = model_cache(tmp_path, ["config.json", *shards])
    assert hub.locate_model("org/classifier") == snapshot == hub.locate_model(snapshot)
    assert [path.name for path in hub.model_weights(snapshot)] == shards
    (snapshot / "model.safetensors").write_text("")
    assert hub.model_weights(snapshot) == [snapshot / "model.safetensors"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()  # then it is a mistyped path, and nothing is asked of the hub
    with pytest.raises(AegisError, match="org/classifier is no model: wanted a folder with a config.json"):
        hub.locate_model("org/classifier")


def test_no_pickle_of_a_single_model_is_downloaded(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(hub, "_fetch", lambda repository, revision, patterns: seen.append(patterns) or tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AegisError, match="pickles are refused"):
        hub.locate_model("org/classifier")
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "merges.txt"]
    kept = list(filter_repo_objects(files, allow_patterns=seen[0]))
    assert kept == ["config.json", "model.safetensors", "merges.txt"]
