"""A table for LaTeX, with the rules of booktabs."""

import re

from fewstep.evaluation.report.tables import Column, Table

_MARKUP = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{mark: f"\\{mark}" for mark in "{}$&#_%"},
    **{
        "–": "--",
        "−": "$-$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "…": r"\dots{}",
    },
    **{"<": r"\textless{}", ">": r"\textgreater{}"},
    **{"|": r"\textbar{}", '"': r"\textquotedbl{}", "Δ": r"$\Delta$", "→": r"$\to$", "…": r"\dots{}"},
}


def escape(text: str) -> str:
    """Text from outside as LaTeX that prints it literally, in one line."""
    return "".join(_MARKUP.get(letter, letter) for letter in " ".join(text.split()))


def as_latex(table: Table, caption: str, label: str) -> str:
    r"""A ``table`` with ``\toprule`` and so on; needs ``booktabs``. A model's name stands in its first line alone."""
    left = [column.words for column in table.columns]
    head = " & ".join(escape(_head(column)) for column in table.columns)
    body, previous = [], None
    for _, line in table.lines():
        name = line[0][1].text
        if previous is not None and name != previous:
            body.append(r"\midrule")
        cells = []
        for place, (column, cell) in enumerate(line):
            text = escape(cell.text) if column.words else _numeric(cell.text)
            if place == 0 and column.words and name == previous:
                text = ""
            text = f"\\textbf{{{text}}}" if cell.best else text
            small = f" {{\\scriptsize {_bracketed(cell.interval)}}}" if cell.interval else ""
            cells.append(text + small)
        body.append(" & ".join(cells) + r" \\")
        previous = name
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            r"\begin{table}",
            r"\centering\small",
            f"\\caption{{{escape(caption)}}}",
            f"\\label{{tab:{label}}}",
            f"\\begin{{tabular}}{{{''.join('l' if words else 'r' for words in left)}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _head(column: Column) -> str:
    return f"{column.group} {column.head}".strip()


def _bracketed(interval: str) -> str:
    # Braces keep a bracket at the start of a cell from being read as an option of the line before.
    return f"{{{_numeric(interval)}}}"


def _numeric(text: str) -> str:
    """Escaped, with a minus in front of numbers where text would have a hyphen."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escape(text))
