"""The report's charts: SVG by matplotlib, whose colours are the page's own so that both turn dark together."""

import hashlib
import html
import io
import re
import warnings

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Stand-ins that no chart uses otherwise; the page says what they are (page.html).
INK, FAINT = "#010203", "#010204"
SERIES = tuple(f"#0102{k:02x}" for k in range(0x10, 0x18))
_CSS = {INK: "var(--ink)", FAINT: "var(--faint)"} | {colour: f"var(--s{k})" for k, colour in enumerate(SERIES)}
_STYLE = {
    "svg.fonttype": "none", "font.family": ["sans-serif"], "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT, "grid.alpha": 0.4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "lines.linewidth": 1.4,
    "legend.frameon": False,
}  # fmt: skip
MARKERS = "osD^vPX*"
NAME = 40  # letters of a name in a legend, at most
# What a run's metrics are called, and in which picture they stand.
CURVES = {
    "losses": ("L_e", "L_adv", "L_aet", "L_p"),
    "norm of the drift": ("drift_norm",),
    "omega (mean)": ("omega",),
    "cosine and flips": ("mean_cosine", "conflict_share", "flip_share"),
}


def pareto(points: list[dict], kept_of: str) -> str:
    """Retention (to the right is better) against what the worst attack brings back (lower is better), with intervals.

    points: {"name", "kept", "worst"} each with shares as pooled.py pools them. kept_of: the axis' title.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "pareto"}):
        # Narrow, so that its text can be read on a phone; the legend has a line a point below axes of one height.
        figure = Figure(figsize=(4.8, 3.3 + 0.22 * len(points)), layout="constrained")
        axes = figure.add_subplot()
        handles = []
        for k, point in enumerate(points):
            kept, worst = point["kept"], point["worst"]
            around = [[abs(share["share"] - end)] for share in (kept, worst) for end in share["interval"]]
            marker, colour = _look(k)
            drawn = axes.errorbar(
                kept["share"], worst["share"], xerr=around[:2], yerr=around[2:], fmt=marker, color=colour,
                markersize=7, capsize=2, elinewidth=0.9,
            )  # fmt: skip
            handles.append(drawn.lines[0])
        axes.set(xlabel=kept_of, ylabel="shown under the worst attack", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # no 82.5 %, which would be shown as 82 %
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend(handles, [_math_off(_short(point["name"])) for point in points], loc="outside lower center")
        return _svg(figure, "Robustness against retention")


def curves(name: str, metrics: list[dict]) -> str:
    """What a run's metrics.jsonl says of every step; "" where there is nothing to draw."""
    # What never changes, as omega does where a preset has none, is no curve.
    known = {
        title: [key for key in keys if len({step[key] for step in metrics if step.get(key) is not None}) > 1]
        for title, keys in CURVES.items()
    }
    known = {title: keys for title, keys in known.items() if keys}
    if len(metrics) < 2 or not known:
        return ""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name, "font.size": 8.5}):
        figure = Figure(figsize=(6.4, 2.1 * -(-len(known) // 2)), layout="constrained")
        for place, (title, keys) in enumerate(known.items(), 1):
            axes = figure.add_subplot(-(-len(known) // 2), 2, place)
            for k, key in enumerate(keys):
                rows = [(step["step"], step[key]) for step in metrics if step.get(key) is not None]
                rows = rows[:: max(1, len(rows) // 300)]  # a chart of a few inches shows no more
                axes.plot(*zip(*rows, strict=True), color=SERIES[k], linewidth=0.9, label=_math_off(key))
            if title == "losses" and all(step.get(key) is None or step[key] > 0 for step in metrics for key in keys):
                axes.set_yscale("log")
            axes.set_title(title, fontsize=9)
            if len(keys) > 1:
                axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, columnspacing=1)
        return _svg(figure, f"Training of {name}")


def _look(k: int) -> tuple[str, str]:
    """The marker and the colour of point k: each pair once before one comes again."""
    return MARKERS[(k + k // len(SERIES)) % len(MARKERS)], SERIES[k % len(SERIES)]


def _short(name: str) -> str:
    """A name less its middle, where it is long: those of runs often differ at their ends alone."""
    return name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[1 - NAME // 2 :]}"


def _math_off(text: str) -> str:
    """Dollars and a first "_" mean something to matplotlib."""
    text = text.replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def _svg(figure: Figure, title: str) -> str:
    """The <svg> element alone: no prolog, no metadata, colours by the page's names, as wide as its place.

    Its ids are of its title, as a page has several charts and each id must be there once.
    """
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of its own font; the browser draws the text
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()
    text = text.replace(
        f'width="{width}pt" height="{height}pt"', f'role="img" aria-label="{html.escape(title)}" class="chart"', 1
    )
    own = f"c{hashlib.sha256(title.encode()).hexdigest()[:8]}-"
    text = re.sub(r"<[^<>]*>", lambda tag: re.sub(r'(\sid="|href="#|url\(#)', rf"\1{own}", tag[0]), text)
    for colour, name in _CSS.items():
        text = text.replace(colour, name)
    return text
