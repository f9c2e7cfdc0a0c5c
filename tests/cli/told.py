"""What the command tells of bad input, and pictures for it to attack with."""

from PIL import Image

from aegis_jax.cli import main


def refused(capsys, *argv):
    """The one line that a refused command prints."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("aegis: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def picture_of(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir(exist_ok=True)
    for k in range(3):
        Image.new("RGB", (40 + k, 30), (90 * k, 9, 9)).save(folder / f"{k}.png")
    return folder
