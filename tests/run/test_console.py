"""run/console.py: what the commands write, where, and what they pass on."""

import threading

import numpy as np
import pytest
from PIL import Image

from aegis_jax.cli import main
from aegis_jax.io.pictures import picture_files
from aegis_jax.run import console
from aegis_jax.run.prompts import COLUMNS, check_index


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--model", "world"], "star"),  # of configs/world.py
        (["--model", "world", "--concept", "red"], "red"),
        (["--model", "world", "--config.concepts=heart,red"], "heart-red"),
        (["--config", "mine.py"], "dr-seuss"),
    ],
)
def test_run_folders_are_named_after_the_configs_concepts(tmp_path, monkeypatch, given, wanted):
    monkeypatch.chdir(tmp_path)
    keys = {"model": "world", "concepts": ["Dr. Seuss"]}
    (tmp_path / "mine.py").write_text(f"import ml_collections as m\nget_config = lambda: m.ConfigDict({keys})\n")
    seen = []
    monkeypatch.setattr(console, "erase_concepts", lambda *args, out, **more: seen.append(out.as_posix()))
    with pytest.raises(AttributeError):  # the stand-in has no result
        main(["erase", *given])
    assert seen == [f"runs/{wanted}"]


def test_two_processes_that_sample_into_a_folder_keep_each_others_rows(folder, tmp_path, monkeypatch):
    """The other begins when this one has looked into the folder, and writes while this one samples."""

    def drawn(pipeline, prompts, **more):
        if prompts == ["a"]:
            assert main(["sample", "--model", str(folder), "--prompt", "b", "--out", str(tmp_path)]) == 0
        return np.zeros((len(prompts), 16, 16, 3), np.uint8)

    monkeypatch.setattr(console, "sample_images", drawn)
    assert main(["sample", "--model", str(folder), "--prompt", "a", "--out", str(tmp_path)]) == 0
    assert check_index(tmp_path).keys() == {"000-a.png", "000-b.png"}


def test_pictures_of_a_thousand_prompts_are_by_name_in_the_order_of_these(folder, tmp_path, monkeypatch):
    """By which `aegis attack --images DIR --prompts FILE` pairs them."""
    monkeypatch.setattr(
        console, "sample_images", lambda pipeline, prompts, **more: np.zeros((len(prompts), 1, 1, 3), np.uint8)
    )
    (tmp_path / "p.csv").write_text("prompt,seed\n" + "".join(f"a,{k}\n" for k in range(1001)))
    given = ["--prompts", str(tmp_path / "p.csv"), "--out", str(tmp_path / "out")]
    assert main(["sample", "--model", str(folder), *given]) == 0
    index = check_index(tmp_path / "out")
    assert [index[file.name]["seed"] for file in picture_files(tmp_path / "out")] == [str(k) for k in range(1001)]


def test_an_image_and_its_row_are_written_together(tmp_path, monkeypatch):
    """Of two that replace the same image the second waits until the first has written its row as well."""
    saved, written, honest = threading.Event(), threading.Event(), console.write_index

    def late(folder, rows):
        if threading.current_thread() is not second:
            saved.set()
            written.wait(0.3)
        honest(folder, rows)

    def write(seed):
        rows = [dict.fromkeys(COLUMNS, "") | {"file": "a.png", "seed": seed}]
        console._write(tmp_path, np.full((1, 8, 8, 3), seed, np.uint8), rows, overwrite=True)

    def write_second():
        saved.wait()
        write(2)
        written.set()

    monkeypatch.setattr(console, "write_index", late)
    second = threading.Thread(target=write_second)
    second.start()
    write(1)
    second.join()
    assert check_index(tmp_path)["a.png"]["seed"] == "2" and np.all(np.asarray(Image.open(tmp_path / "a.png")) == 2)


def test_what_was_written_before_a_failure_has_its_rows(tmp_path):
    (tmp_path / "1.png").write_text("another's")
    rows = [dict.fromkeys(COLUMNS, "") | {"file": f"{k}.png"} for k in range(3)]
    with pytest.raises(FileExistsError):
        console._write(tmp_path, np.zeros((3, 8, 8, 3), np.uint8), rows, overwrite=False)
    assert check_index(tmp_path).keys() == {"0.png"}
