"""Tables as CSV, one line a row, and for people; those of accuracies are `tabulate_accuracy`'s."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from wmdd_core.artifacts import write_csv, write_text

MISSING = "–"

SYMBOLS = {"lambda_bn": "λ"}

Row = dict[str, str]
"""A line of a table's CSV as text, empty where there is nothing."""

Shown = Sequence[Sequence[str]]
"""Lines as people read them, the head first; an empty field is missing."""


def symbol(key: str) -> str:
    """A setting as people read it."""
    return SYMBOLS.get(key, key.replace("_", " "))


def write_table(
    output: Mapping[str, str],
    rows: Sequence[Mapping[str, str]],
    shown: Shown,
    title: str,
    notes: Sequence[str],
) -> None:
    """Write `rows` as CSV and `shown` as Markdown and LaTeX, with the notes under it."""
    write_csv(output["csv"], pd.DataFrame(rows))
    write_text(output["md"], as_markdown(shown, title, notes))
    write_text(output["tex"], as_latex(shown, notes))


LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "²": "$^2$",
    "λ": r"$\lambda$",
    "β": r"$\beta$",
    **{c: f"${c}$" for c in "<>|"},
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
}


def escape(text: str) -> str:
    """Text as LaTeX prints it; behind a line's end it would take a first [ or * for the line's own."""
    guard = "{}" if text.startswith(("[", "*")) else ""
    return guard + re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)


def read_rows(path: str | Path) -> list[Row]:
    """The lines of a CSV as text, nothing interpreted."""
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")


def numeric_columns(shown: Shown) -> list[bool]:
    """Which columns hold figures, by their first character, and stand to the right."""
    return [
        all(not text or text == MISSING or text[0].isdigit() for text in column)
        for column in zip(*shown[1:], strict=True)
    ]


def as_markdown(shown: Shown, title: str, notes: Sequence[str]) -> str:
    """A pipe table with its notes."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join((t or MISSING).replace("|", "\\|") for t in texts) + " |"

    rule = line("---:" if right else "---" for right in numeric_columns(shown))
    lines = [f"# {title}", "", line(shown[0]), rule, *map(line, shown[1:])]
    return "\n".join([*lines, *(part for note in notes for part in ("", note))]) + "\n"


def from_markdown(text: str) -> tuple[list[list[str]], list[str]]:
    """The lines and the notes that `as_markdown` wrote; a missing field is `MISSING`."""
    blocks = text.strip().split("\n\n")
    (table,) = (b for b in blocks if b.startswith("| "))
    head, _, *lines = (
        [field.replace("\\|", "|") for field in re.split(r" (?<!\\)\| ", line[2:-2])]
        for line in table.splitlines()
    )
    return [head, *lines], [b for b in blocks if not b.startswith(("# ", "| "))]


def as_latex(shown: Shown, notes: Sequence[str]) -> str:
    """A `tabular` to be \\input into a paper that loads booktabs."""

    def line(texts: Iterable[str]) -> str:
        return " & ".join(escape(t or MISSING) for t in texts) + r" \\"

    columns = "".join("r" if right else "l" for right in numeric_columns(shown))
    lines = [*(f"% {note}" for note in notes), "% needs \\usepackage{booktabs}"]
    lines += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", line(shown[0]), "\\midrule"]
    return "\n".join([*lines, *map(line, shown[1:]), "\\bottomrule", "\\end{tabular}"]) + "\n"
