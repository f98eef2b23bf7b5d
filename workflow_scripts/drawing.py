"""One look for all figures: colours by method, readable fonts, equal bytes for equal input."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from wmdd_core.artifacts import replacing
from wmdd_core.terms import tell_apart

if TYPE_CHECKING:
    import pandas as pd

FALLBACKS = (
    *(f"Noto Sans CJK {region}" for region in ("SC", "TC", "JP", "KR")),
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "PingFang SC",
    "Arial Unicode MS",
)
"""Fonts that have Chinese, Japanese or Korean characters, which DejaVu has not."""


def font_families() -> list[str]:
    """Where to look for a character: DejaVu, then what of `FALLBACKS` is installed.

    DejaVu comes with Matplotlib and has Latin, Greek, Cyrillic and Arabic letters: figures with these alone
    look the same everywhere.
    """
    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(family for family in FALLBACKS if family in installed)]


matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "font.family": font_families(),
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#555555",
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.8,
        "xtick.color": "#333333",
        "ytick.color": "#333333",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "pdf.fonttype": 42,  # text stays text
        "image.interpolation": "none",
    }
)

DPI = 200

# Okabe and Ito's palette, without its yellow, which is too pale for lines on white.
COLOURS = {
    "wmdd": "#d55e00",
    "sre2l": "#0072b2",
    "random": "#7f7f7f",
    "cda": "#e69f00",
    "dm": "#009e73",
    "kmeans_real": "#56b4e9",
    "dc": "#cc79a7",
    "all_real": "#000000",
}
OTHERS = ("#332288", "#882255", "#999933", "#44aa99", "#aa4499", "#661100", "#117733", "#6699cc")
MIXES = ((255, 0.3), (255, 0.5), (0, 0.3), (0, 0.5))
"""(white or black, share of it) in the colours of a method's variants."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)), (0, (4, 1.5, 1, 1.5)))


def base_name(method: str) -> str:
    """The method with a colour of its own that `method` is, or is a variant or sweep member of.

    >>> base_name("wmdd_lambda100"), base_name("sre2l"), base_name("dmx")
    ('wmdd', 'sre2l', 'dmx')
    """
    found = [n for n in COLOURS if re.fullmatch(re.escape(n) + r"([^A-Za-z].*)?", method)]
    return max(found, key=len, default=method)


def names_of(methods: Sequence[str], labels: Mapping[str, str]) -> dict[str, str]:
    """What the legend calls each method, as the table does."""
    return tell_apart({m: labels.get(m, m) for m in methods})


def colour_of(method: str) -> str:
    """The method's colour in every figure, from its name alone; variants have tints of their base's."""
    base = base_name(method)
    number = int.from_bytes(hashlib.sha256(method.encode()).digest()[:4], "big")
    if base not in COLOURS:
        return OTHERS[number % len(OTHERS)]
    if base == method:
        return COLOURS[base]
    towards, share = MIXES[number % len(MIXES)]
    mixed = [round((1 - share) * int(COLOURS[base][i : i + 2], 16) + share * towards) for i in (1, 3, 5)]
    return "#" + "".join(f"{v:02x}" for v in mixed)


def line_styles(methods: Iterable[str]) -> dict[str, dict]:
    """Method → colour, marker and dashes; methods that share a base differ in the last two."""
    counts: dict[str, int] = {}
    known, styles = list(COLOURS), {}
    for method in dict.fromkeys(methods):
        base = base_name(method)
        # Unknown methods may share a colour by chance, so they count as one family.
        family = base if base in COLOURS else ""
        number = counts[family] = counts.get(family, -1) + 1
        first = known.index(base) if family else 0
        styles[method] = {
            "color": colour_of(method),
            "marker": MARKERS[(first + number) % len(MARKERS)],
            "linestyle": DASHES[number % len(DASHES)],
        }
    return styles


def arranged(table: pd.DataFrame, **orders: Sequence) -> pd.DataFrame:
    """The rows in the given order of each column's values, the first column before the others."""
    for column, order in reversed(orders.items()):
        places = {value: place for place, value in enumerate(order)}
        table = table.sort_values(column, key=lambda values, p=places: values.map(p), kind="stable")
    return table


def shortened(title: str, length: int = 22) -> str:
    """A title of at most `length` characters, cut between words, or within a word that is longer."""
    title = " ".join(title.replace("_", " ").split())
    if len(title) <= length:
        return title
    return (title[:length].rpartition(" ")[0] or title[: length - 1]) + "…"


def class_titles(description: Mapping, classes: Iterable[int]) -> list[str]:
    """Names of classes as Matplotlib shall print them, `shortened`: a $ would begin a formula."""
    titles = description.get("titles", description["classes"])
    return [shortened(titles[c]).replace("$", r"\$") for c in classes]


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure of `width` × `height` inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def save(figure: Figure, outputs: Mapping[str, str]) -> None:
    """Write `figure` to `outputs["png"]` and `outputs["pdf"]`, whole or not at all, without dates."""
    if figure.get_layout_engine() is not None:
        # Each drawing would adjust the layout anew; both files shall have the same.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        with replacing(outputs[kind]) as temporary:
            figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
