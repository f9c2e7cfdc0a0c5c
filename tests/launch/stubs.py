"""Programs of clouds and schedulers, played by scripts that stand first in PATH and write down what they were asked."""

import os
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parent.parent.parent / "launch"


def write(folder: Path, **scripts: str) -> None:
    """Bash scripts by name in `folder`/bin; each first writes its name and arguments as a line of `folder`/calls."""
    (folder / "bin").mkdir()
    for name, script in scripts.items():
        path = folder / "bin" / name
        path.write_text(
            f'#!/usr/bin/env bash\n{{ printf "%s" {name}; printf " %q" "$@"; echo; }} >>"$FAKE/calls"\n{script}\n'
        )
        path.chmod(0o755)


def run(folder: Path, *argv, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "AEGIS_", "JAX_"))}
    env = kept | {"FAKE": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | environment
    return subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=60, env=env, cwd=folder)


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []
