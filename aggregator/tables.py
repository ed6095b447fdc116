"""Tables for a terminal, and texts of strangers in them."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text


def make_table(headings: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """A table without the columns in which nothing stands: a terminal is narrow."""
    filled = [column for column in range(len(headings)) if not rows or any(str(row[column]) for row in rows)]
    table = Table(*(headings[column] for column in filled), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(row[column] for column in filled))
    return table


def number_text(value: float | None, form: str) -> str:
    """A number in that format; nothing for None."""
    return "" if value is None else format(value, form)


def foreign(text: str) -> Text:
    """What a device wrote, without the markup and the terminal commands that it may hold."""
    return Text("".join(sign if sign.isprintable() else "?" for sign in text))
