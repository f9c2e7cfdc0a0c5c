"""What `aegis delta` does: a delta file that says what it erases, where a run tells."""

import json
from pathlib import Path

from aegis_jax.io.delta_write import write_delta
from aegis_jax.io.hub import expand
from aegis_jax.run.folder import RunFolder


def write(pipeline, base, out, *, revision, variant, overwrite) -> None:
    """Writes the delta of `pipeline`, a diffusers folder or a run's, and prints what it holds."""
    count = write_delta(
        pipeline, base, out, revision=revision, variant=variant, overwrite=overwrite, about=_about(expand(pipeline))
    )
    size = expand(out).stat().st_size
    print(f"delta    {out} ({count} tensors, {size / 1e6:.1f} MB)")


def _about(pipeline: Path) -> dict[str, str]:
    """Concepts and method of the run that a pipeline is the result of, if it is one's."""
    run = RunFolder(pipeline.resolve().parent if pipeline.resolve().name == "pipeline" else pipeline)
    story = run.read_manifest() if run.is_run() else {}
    told = {"concepts": story.get("concepts"), "method": story.get("method")}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in told.items()
        if value
    }
