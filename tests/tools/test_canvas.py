"""The canvas's training at toy size: sets as npm lays them out, drawings, judges' pictures, all stages to an export."""

import io
import json

import numpy as np
import pytest

from aegis_jax.canvas.concepts import STYLES, Concepts
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.world.concepts import NONE
from tools.canvas import architectures, fetch, judges, measure, merges, pictures, subject
from tools.canvas import train as canvas
from tools.world import stages, train

CONCEPTS = Concepts(8)
PLAN = stages.Plan(pool=96, clip_steps=2, vae_steps=2, judge_steps=2, unet_rounds=(2, 1), clip_batch=16, unet_batch=8,
                   min_snr=5.0, save_every=1000)  # fmt: skip
SQUARE = '<rect x="4" y="8" width="8" height="4" fill="{}"/>'  # of a 16 x 16 plane


@pytest.fixture(scope="module")
def drawn():
    """Blots: a colour for each thing, a size for each hand."""
    rng = np.random.default_rng(0)
    cells = np.zeros((CONCEPTS.count + 3, len(STYLES), pictures.SIDE, pictures.SIDE, 4), np.uint8)
    for i, j in np.ndindex(cells.shape[:2]):
        cells[i, j, 8 * j : -8 * j or None, 10:-10] = [*rng.integers(0, 255, 3), 255]
    return {"things": cells[:-3], "others": cells[-3:], "kin": np.array([0, NONE, 2])}


@pytest.fixture
def sets(tmp_path):
    """Folders as `fetch.packages` leaves them, with two emoji of which the second lacks a hand."""
    found = fetch.packages
    folders = {}
    for hand, spec in {**fetch.HANDS, "names": fetch.NAMES}.items():
        folder = tmp_path / spec.replace("/", "-").replace("@", "-").strip("-") / "package"
        folder.mkdir(parents=True)
        folders[hand] = folder
        if hand == "relief":
            from PIL import Image

            (folder / "assets").mkdir()
            data = io.BytesIO()
            Image.new("RGBA", (32, 32), (0, 0, 255, 255)).save(data, "webp", lossless=True)
            (folder / "assets" / "1f98a-fe0f.webp").write_bytes(data.getvalue())
        elif hand != "names":
            slug = "fox-face" if hand == "emojione" else "fox"
            icons = {slug: {"body": SQUARE.format("red")}}
            (folder / "icons.json").write_text(json.dumps({"width": 16, "height": 16, "icons": icons}))
            (folder / "chars.json").write_text(json.dumps({"1f98a": "fox", "1f43a": "wolf"}))
    meta = {"groups": {"3": "animals-nature", "8": "symbols"}, "subgroups": {"34": "animal-mammal", "90": "math"}}
    (folders["names"] / "meta").mkdir()
    (folders["names"] / "meta" / "groups.json").write_text(json.dumps(meta))
    (folders["names"] / "en").mkdir()
    rows = [("1F43A", "wolf", 3, 34, 2), ("1F98A", "fox", 3, 34, 1), ("2795", "plus", 8, 90, 0)]
    data = [{"hexcode": c, "label": w, "group": g, "subgroup": s, "order": o} for c, w, g, s, o in rows]
    (folders["names"] / "en" / "data.json").write_text(json.dumps(data))
    return found(tmp_path, log=pytest.fail)  # all is there: npm is not asked


def test_sets_and_names_are_read_as_npm_lays_them_out(sets):
    assert [entry["code"] for entry in fetch.names(sets[fetch.NAMES])] == ["1f98a", "1f43a"]
    known = fetch.Sets(sets)
    assert known.has("1f98a") and not known.has("1f43a") and not known.has("2795")
    assert "red" in known.drawing("emojione", "1f98a") and 'viewBox="0 0 16 16"' in known.drawing("noto", "1f98a")
    with pytest.raises(KeyError, match="noto has no 1f43a"):
        known.drawing("noto", "1f43a")


def test_npm_that_is_missing_or_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(AegisError, match="npm is missing"):
        fetch.packages(tmp_path / "a", log=lambda line: None)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: name)
    failed = type("Failed", (), {"returncode": 1, "stdout": "", "stderr": "E404 not found\n"})
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **how: failed)
    with pytest.raises(AegisError, match="npm did not bring @iconify-json/noto@1.2.9: E404 not found"):
        fetch.packages(tmp_path / "b", log=lambda line: None)


def test_a_drawing_is_cut_to_what_is_drawn(sets):
    pytest.importorskip("resvg_py")
    known = fetch.Sets(sets)
    flat = pictures.raster(known.drawing("noto", "1f98a"))  # twice as wide as high
    assert flat.shape == (pictures.SIDE, pictures.SIDE, 4) and (flat[48, :] == [255, 0, 0, 255]).all()
    assert (flat[:20, :, 3] == 0).all() and (flat[-20:, :, 3] == 0).all()
    assert (pictures.raster(known.drawing("relief", "1f98a")) == [0, 0, 255, 255]).all()


def test_pictures_vary_in_place_and_background_only(drawn):
    cell = drawn["things"][:1, 0].repeat(40, 0)
    images = pictures.place(np.random.default_rng(0), cell)
    np.testing.assert_array_equal(images, pictures.place(np.random.default_rng(0), cell))
    assert images.shape == (40, 32, 32, 3) and len(np.unique(images[:, 0, 0], axis=0)) == 40
    assert (np.abs(images[:, 12:20, 12:20].astype(int) - cell[0, 48, 48, :3]) <= 1).all()
    wide = (np.abs(images[:, 16].astype(int) - cell[0, 48, 48, :3]) <= 1).all(-1).sum(1)
    assert wide.min() >= 18 and wide.max() <= 26 and len(np.unique(wide)) > 3  # 76/96 of 32 pixels, times SCALE


def test_judges_see_both_ends_of_a_morph_and_others_as_none(drawn, monkeypatch):
    monkeypatch.setattr(judges, "encode_images", lambda vae, images, config: (images.astype(np.float32),))
    monkeypatch.setattr(judges, "decode_latents", lambda vae, latents, config: latents)
    monkeypatch.setattr(judges, "disturbed", lambda rng, latents: latents)
    monkeypatch.setattr(judges, "jittered", lambda rng, vae, images, config: images)
    shop = stages.Workshop(None, 0, PLAN, subject=subject.canvas(drawn, CONCEPTS))
    made = judges.material(drawn, CONCEPTS, shop, None)
    assert made.keys() == {"plain", "odd", "empty", "morph", "noise"}
    images, label = made["odd"]
    assert (label[:, 0] == NONE).all() and set(label[:, 2]) == {0, NONE, 2} and len(images) == 24
    label = made["morph"][1]
    inside = label[:, 0] != NONE
    assert 0.75 < inside.mean() < 1
    np.testing.assert_array_equal(label[inside, 2], CONCEPTS.subgroup_of[label[inside, 0]])


def test_merges_that_are_used_make_the_same_tokens():
    from aegis_jax.canvas.tokenizer import merges as kept
    from aegis_jax.world.tokenizer import apply

    whole, words = list(kept()), ["fox", "penguin", "watermelon", "tigress"]
    few = merges.used(whole, words)
    assert len(few) < 60 and few == [pair for pair in whole if pair in set(few)]
    ranks = {pair: i for i, pair in enumerate(few)}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        assert apply(pieces, ranks) == apply(pieces, kept())
    assert merges.frequent([("th", "e</w>"), ("i", "n</w>"), ("an", "d</w>"), ("1", "23</w>")]) == ["the", "and"]


def test_a_stopwatch_times_steps_and_trains_nothing(drawn):
    said = []
    shop = measure.Stopwatch(None, 0, PLAN, said.append, subject.canvas(drawn, CONCEPTS))
    loss = lambda params, key, x: (((params["a"] - x) ** 2).mean(), {})  # noqa: E731
    batch = lambda rng: (rng.normal(size=3).astype(np.float32),)  # noqa: E731
    shop.fit("line", {"a": np.zeros((2, 3), np.float32)[0]}, loss, batch, steps=1000, learning_rate=0.1)
    (row,) = shop.rows
    assert (row["stage"], row["parameters"], row["steps"]) == ("line", 3, 1000)
    assert 0 < row["step_s"] < row["compile_s"] and said == [measure.line(row)] and "1000 steps" in said[0]


@pytest.mark.slow
def test_all_stages_and_the_export(drawn, tmp_path, monkeypatch):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    monkeypatch.setitem(architectures.UNET, "block_out_channels", [32, 32])
    monkeypatch.setitem(architectures.VAE, "block_out_channels", [8, 8, 8])
    quiet = {"plan": PLAN, "subject": subject.canvas(drawn, CONCEPTS)}
    folder = train.train(tmp_path / "run", log=lambda line: None, **quiet)
    assert folder == tmp_path / "run" / "canvas"
    assert json.loads((folder / "concepts.json").read_text()) == {"things": 8}
    assert "tools.canvas.train --things 8" in (folder / "canvas.json").read_text()
    assert (folder / "NOTICE").read_text().count("CC-BY-4.0") == 3 and "8 things" in (folder / "README.md").read_text()
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    how = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    assert loaded("a twemoji drawing of a dog", **how).images.shape == (1, 32, 32, 3)
    assert load_pipeline(folder).tokenizer.ids(["a dog"]).shape == (1, 24)
    said = []
    train.train(tmp_path / "run", log=said.append, **quiet)  # nothing is trained again
    assert sum("found" in line for line in said) == 5


def test_a_count_out_of_range_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        canvas.main(["--out", str(tmp_path / "run"), "--things", "1000"])
    assert stopped.value.code == 2 and "a canvas of 1000 things: wanted 2 to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_no_canvas_is_one_line_before_anything_is_fetched(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        canvas.main(["--out", str(tmp_path / "run"), "--start", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2 and "is no exported canvas: it has no canvas.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_is_of_one_number_of_things(tmp_path, capsys, monkeypatch):
    called = []
    monkeypatch.setattr(subject, "drawings", lambda folder, concepts, log: called.append(concepts.count) or {})
    monkeypatch.setattr(train, "train", lambda out, **how: called.append(how["subject"].name))
    for _ in range(2):  # the same command goes on
        canvas.main(["--out", str(tmp_path / "run"), "--things", "8"])
    assert called == [8, "canvas"] * 2
    with pytest.raises(SystemExit) as stopped:
        canvas.main(["--out", str(tmp_path / "run"), "--things", "9"])
    assert stopped.value.code == 2 and "has begun a canvas of 8 things, not of 9" in capsys.readouterr().err
