"""The emoji sets and their names, brought from npm by its own client; nothing of them is committed.

`packages(folder)` packs and unpacks each at a fixed version, once. What npm is told of its registry it is told as for
any other package, by its own configuration.
"""

import json
import pathlib
import re
import shutil
import subprocess
import tarfile

from aegis_jax.errors import AegisError

# {hand: package at a version}: the six hands in which every thing is drawn (aegis_jax/canvas/NOTICE), and the names.
HANDS = {
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "relief": "@lobehub/fluent-emoji-3d@1.1.0",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
}
NAMES = "emojibase-data@17.0.0"
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")


def packages(folder: pathlib.Path, log=print) -> dict[str, pathlib.Path]:
    """{package at a version: its unpacked folder}, fetched where `folder` has it not yet.

    Raises `AegisError` where npm is missing or does not bring one.
    """
    found = {}
    for spec in (*HANDS.values(), NAMES):
        target = folder / re.sub(r"[^\w.-]+", "-", spec).strip("-")
        if not target.is_dir():
            log(f"fetching {spec}")
            _fetch(spec, folder, target)
        found[spec] = target / "package"
    return found


def _fetch(spec: str, folder: pathlib.Path, target: pathlib.Path) -> None:
    if shutil.which("npm") is None:
        raise AegisError("npm is missing: it brings the emoji sets (Debian: apt-get install npm)")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), spec]
    packed = subprocess.run(command, capture_output=True, text=True)
    if packed.returncode:
        raise AegisError(f"npm did not bring {spec}: {(packed.stderr or packed.stdout).strip()[-300:]}")
    archive = folder / packed.stdout.split()[-1]
    part = target.with_name(f"{target.name}.part")  # renamed when whole, so that what is cut off is fetched again
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(part, filter="data")
    part.rename(target)
    archive.unlink()


def names(package: pathlib.Path) -> list[dict]:
    """What emojibase has of every emoji of `GROUPS`, in Unicode's order.

    Each {"code" (such as "1f98a"), "label", "tags", "group", "subgroup"}.
    """
    meta = json.loads((package / "meta" / "groups.json").read_text())
    found = []
    for entry in sorted(json.loads((package / "en" / "data.json").read_text()), key=lambda e: e.get("order", 0)):
        group = meta["groups"].get(str(entry.get("group")))
        if group in GROUPS:
            code = entry["hexcode"].lower().replace("-fe0f", "")
            subgroup = meta["subgroups"][str(entry["subgroup"])]
            found.append(
                {"code": code, "label": entry["label"], "tags": entry.get("tags", []), "group": group,
                 "subgroup": subgroup}
            )  # fmt: skip
    return found


class Sets:
    """The unpacked sets, asked by an emoji's code point: the drawing of each hand, SVG text or the bytes of a WebP."""

    def __init__(self, found: dict[str, pathlib.Path]):
        self._icons, self._slugs = {}, {}
        for hand, spec in HANDS.items():
            if hand == "relief":
                files = (found[spec] / "assets").glob("*.webp")
                self._relief = {path.stem.replace("-fe0f", ""): path for path in files}
            else:
                self._icons[hand] = json.loads((found[spec] / "icons.json").read_text())
        # Names are CLDR's as words with hyphens in all sets; the older ones say no code points and add "-face" to some.
        for hand in ("fluent", "noto", "twemoji"):
            chars = json.loads((found[HANDS[hand]] / "chars.json").read_text())
            self._slugs |= {code.replace("-fe0f", ""): slug for code, slug in chars.items()}

    def has(self, code: str) -> bool:
        """Whether all six hands drew it."""
        return code in self._relief and all(self._icon(hand, code) for hand in self._icons)

    def drawing(self, hand: str, code: str) -> str | bytes:
        """SVG text, or the bytes of a WebP. KeyError if the hand did not draw it."""
        if hand == "relief":
            return self._relief[code].read_bytes()
        icons, icon = self._icons[hand], self._icon(hand, code)
        if icon is None:
            raise KeyError(f"{hand} has no {code}")
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}"'
        return f'{head} height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'

    def _icon(self, hand: str, code: str) -> dict | None:
        icons, slug = self._icons[hand]["icons"], self._slugs.get(code)
        return icons.get(slug) or icons.get(f"{slug}-face")
