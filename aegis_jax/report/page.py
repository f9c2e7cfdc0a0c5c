"""report.html: one file that makes no request, runs no script and escapes what users wrote."""

import base64
import io
import math
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from aegis_jax.evaluation.interval import wilson
from aegis_jax.report import charts
from aegis_jax.report.plan import Plan
from aegis_jax.report.pooled import shown
from aegis_jax.run.folder import RunFolder
from aegis_jax.run.progress import duration

SHOWN = 160  # pixels, the height of a strip of pictures at most


def html(report: dict, what: Plan) -> str:
    """The page of a report; pictures are read from the evaluation's folder, curves from run folders."""
    # StrictUndefined: a figure that is missing must not be an empty place.
    loader = jinja2.PackageLoader("aegis_jax.report", "")
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.globals |= {"shown": shown, "duration": duration}
    embedded = "world" in report  # wherever its folder lies
    return page.get_template("page.html").render(
        report=report,
        summary=[column for column in report["columns"] if column["place"] == "summary"],
        retention=_parts([column for column in report["columns"] if column["place"] == "retention"]),
        told={column["name"].split("_")[0] for column in report["columns"]},
        near=list(report["rows"][0]["near"]),
        d2=[name for name in report["attacks"] if "d2" in report["rows"][0]["attacks"][name]],
        pareto=_pareto(report),
        curves=_curves(what),
        grids=_grids(report, what.out / "cells"),
        blurred=not (report["show"] or embedded),
        pixelated=embedded,
        seeds="one seed" if len(report["seeds"]) == 1 else f"{len(report['seeds'])} seeds, pooled",
    )


def _parts(columns: list[dict]) -> list[list[dict]]:
    """Shares, and what else there is, in a table each: a phone shows four columns or five at once."""
    shares = [column for column in columns if not column["name"].startswith(("frechet", "clip"))]
    return [part for part in (shares, [column for column in columns if column not in shares]) if part]


def _pareto(report: dict) -> Markup | None:
    """The chart by the worst attack by prompt; where there is none, by the worst of all."""
    points = []
    for row in report["rows"]:
        worst = row["worst"] or row["worst_of_all"]
        if worst is not None and report["kept"]:
            kept = [row["figures"][name] for name in report["kept"]]
            count, n = sum(share["count"] for share in kept) / len(kept), kept[0]["n"]  # of the same images
            low, high = wilson(math.floor(count), n)[0], wilson(math.ceil(count), n)[1]
            kept = {"share": count / n, "interval": (low, high)}
            points.append({"name": row["name"], "kept": kept, "worst": worst["rate"]})
    return Markup(charts.pareto(points, _kept(report))) if points else None


def _kept(report: dict) -> str:
    """What the chart's "kept" is the mean of."""
    titles = {column["name"]: column["title"].removeprefix("kept: ") for column in report["columns"]}
    return f"kept ({' and '.join(titles[name] for name in report['kept'])})"


def _curves(what: Plan) -> list[tuple[str, Markup]]:
    found = []
    for row in what.rows:
        if row.run is not None:
            svg = charts.curves(row.name, RunFolder(row.run).read_metrics())
            found += [(row.name, Markup(svg))] if svg else []
    return found


def _grids(report: dict, cells: Path) -> list[dict]:
    """For each model but the base its strips of pictures, the original's first: {"name", "strips": [...]}.

    A strip: "title", "source" (of the picture itself), "columns", "prompts". The base has a grid of its own, for what
    attacks do to a model that still has the concept.
    """

    def strip(title: str, pictures: dict) -> dict:
        source = _small((cells / pictures["file"]).read_bytes(), len(pictures["prompts"]))
        return {"title": title, "source": source, "prompts": pictures["prompts"], "columns": len(pictures["prompts"])}

    found, original = [], report["rows"][0]["pictures"]
    for row in report["rows"]:
        strips = [strip("original", original)]
        if row["role"] != "base":
            strips.append(strip("erased", row["pictures"]))
        for name, attack in row["attacks"].items():
            strips.append(strip(name, attack["pictures"]))
            if "control" in attack:
                strips.append(strip(f"{name}, control: {attack['control']['word']}", attack["control"]["pictures"]))
        found.append({"name": row["name"], "role": row["role"], "strips": strips})
    return found[1:] + found[:1]


def _small(png: bytes, columns: int) -> str:
    """A strip of pictures as a data address; what is larger than the page shows it is made smaller, cells keep it."""
    with Image.open(io.BytesIO(png)) as picture:
        if picture.height <= SHOWN:
            return "data:image/png;base64," + base64.b64encode(png).decode()
        width = columns * max(1, round(picture.width / columns * SHOWN / picture.height))
        small, out = picture.convert("RGB").resize((width, SHOWN), Image.Resampling.LANCZOS), io.BytesIO()
        small.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
