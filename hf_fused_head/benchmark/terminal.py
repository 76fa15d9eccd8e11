"""Tables for terminals of any width: words wrap, wide tables continue below, nothing is cut off."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

# Of a pipe that COLUMNS does not describe: lines of a table stay lines, for grep.
_PIPE_COLUMNS = 200
# A column of words is not made narrower than its longest word, or this where that is longer.
_NARROWEST = 20
_GAP = 2


def console() -> Console:
    """A console on stdout, as wide as the terminal or as COLUMNS says."""
    piped = not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit()
    return Console(width=_PIPE_COLUMNS) if piped else Console()


@dataclass(frozen=True)
class Grid:
    """A table whose cells are taken literally; rich prints it.

    Where the columns are too many for the width, the table continues below with the others, and
    repeats its first columns.

    Attributes:
        title: Above it.
        columns: Their titles.
        rows: A cell for each column.
        words: Columns of words, which wrap; the others hold numbers, aligned on the right.
        keys: How many columns name a row and are repeated.
        styles: One for each row, or none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[str] = ()
    keys: int = 1
    styles: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = self.title
        for group in self._groups(options.max_width):
            yield Text(f"\n{title}", style="bold")
            yield self._table(self._widths(group, options.max_width))
            title = f"{self.title}, continued"

    def _groups(self, width: int) -> Iterator[list[int]]:
        """Indices of the columns that fit beside each other."""
        keys = list(range(self.keys))
        group = keys
        for index in range(self.keys, len(self.columns)):
            wider = [*group, index]
            too_wide = sum(map(self._narrowest, wider)) + _GAP * (len(wider) - 1) > width
            if too_wide and len(group) > len(keys):
                yield group
                wider = [*keys, index]
            group = wider
        yield group

    def _widths(self, group: Sequence[int], width: int) -> dict[int, int]:
        """By index of the column: as its cells are, or less for the widest ones of words."""
        widths = {index: self._widest(index) for index in group}
        narrowest = {index: self._narrowest(index) for index in group}
        excess = sum(widths.values()) + _GAP * (len(group) - 1) - width
        for _ in range(excess):
            shrinks = [index for index in group if widths[index] > narrowest[index]]
            if not shrinks:
                break
            widths[max(shrinks, key=widths.__getitem__)] -= 1
        return widths

    def _cells(self, index: int) -> list[str]:
        return [row[index] for row in self.rows]

    def _widest(self, index: int) -> int:
        cells = max(map(len, self._cells(index)), default=0)
        # Titles wrap in columns of numbers.
        title = self.columns[index]
        return max(cells, len(title) if title in self.words else _longest_word([title]))

    def _narrowest(self, index: int) -> int:
        if self.columns[index] not in self.words:
            return self._widest(index)
        inside = min(_longest_word(self._cells(index)), _NARROWEST)
        return max(_longest_word([self.columns[index]]), inside)

    def _table(self, widths: dict[int, int]) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            # Rich draws a space between columns.
            padding=(0, _GAP - 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        for index, width in widths.items():
            column = self.columns[index]
            justify = "left" if column in self.words else "right"
            table.add_column(escape(column), justify=justify, overflow="fold", width=width)
        styles = self.styles or [""] * len(self.rows)
        for row, style in zip(self.rows, styles, strict=True):
            table.add_row(*(escape(row[index]) for index in widths), style=style)
        return table


def _longest_word(texts: Iterable[str]) -> int:
    return max((len(word) for text in texts for word in text.split()), default=0)
