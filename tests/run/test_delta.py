"""`aegis delta` of a run and `aegis apply`: the folder of the run's own export comes out."""

import json

from safetensors import safe_open

from aegis_jax.cli import main


def test_a_run_as_one_file(finished, folder, tmp_path, capsys):
    out = tmp_path / "delta.safetensors"
    for pipeline in (finished, finished / "pipeline"):
        assert main(["delta", str(pipeline), "--base", str(folder), "--out", str(out), "--overwrite"]) == 0
        assert f"delta    {out} (" in capsys.readouterr().out
        with safe_open(out, "np") as file:
            said = file.metadata()
        manifest = json.loads((finished / "manifest.json").read_text())
        assert json.loads(said["concepts"]) == manifest["concepts"] == ["star"]
        assert said["method"] == manifest["method"] and str(folder.parent) not in json.dumps(said)
    assert main(["apply", str(out), "--model", str(folder), "--out", str(tmp_path / "applied")]) == 0
    full, applied = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (finished / "pipeline", tmp_path / "applied")
    )
    assert applied == full
