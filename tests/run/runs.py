"""A short run of the stand-in step (conftest's `cheap_step`), and what it leaves behind."""

import json

import aegis_jax

KEYS = {"steps": 7, "checkpoint.every": 3, "picture.images": 0, "trainable": "kv"}


def erase(folder, out, resume=False, **more):
    keys = {**KEYS, **more.pop("keys", {})}
    overrides = [(key, str(value)) for key, value in keys.items()]
    return aegis_jax.erase(folder, "star", overrides=overrides, out=out, resume=resume, **more)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def metrics(path):
    """The lines of metrics.jsonl without the rate, the one value that a clock has a say in."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("steps_per_s") > 0 for line in lines)
    return lines
