"""Official lists of images: tables in text files, read without trusting them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dist_dml.data.pack.image_files import Tree
from dist_dml.errors import UsageError


def read_lines(tree: Tree, name: str) -> list[str]:
    """The lines of a text file, without blanks at their ends and without empty last lines.

    Raises:
        UsageError: there is no such file, or it is not UTF-8 text.
    """
    if tree.size(name) < 0:
        raise UsageError(f"{tree.where(name)}: no such file; get the official archive again")
    try:
        lines = [line.strip() for line in tree.read(name).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise UsageError(f"{tree.where(name)}: is no UTF-8 text; get the official file") from None
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_table(
    tree: Tree, name: str, columns: str, header: bool = False, counted: bool = False
) -> list[tuple[str, list[str]]]:
    """The rows of a table whose columns are separated by blanks.

    Args:
        tree: where it lies.
        name: of the file.
        columns: their names, separated by blanks; the last one may hold blanks itself.
        header: whether a line with the names of the columns comes first. It must be these names: in
            a file without it, the first sample would be lost.
        counted: whether the number of rows comes before that. It must be right: a list that was cut
            short would be a smaller data set.

    Returns:
        For each row how messages call it, and its columns.

    Raises:
        UsageError: the file is missing or none of this form; names the line.
    """
    lines, skip, names = read_lines(tree, name), 0, columns.split()
    if counted:
        skip = 1
        stated = lines[0] if lines else "nothing"
        rows = max(len(lines) - 1 - header, 0)
        if stated != str(rows):
            raise UsageError(
                f"{tree.where(name)}: its first line says {stated:.20} and {rows} rows follow; it "
                "is cut short or another file, get the official one"
            )
    if header:
        found = lines[skip].split() if skip < len(lines) else []
        if found != names:
            raise UsageError(
                f"{tree.where(name)} line {skip + 1}: is {' '.join(found)[:60]!r}, expected the "
                f"header {columns!r}; get the official file"
            )
        skip += 1
    table = []
    for number, line in enumerate(lines[skip:], skip + 1):
        fields = line.split(None, len(names) - 1)
        if len(fields) != len(names):
            raise UsageError(
                f"{tree.where(name)} line {number}: has {len(fields)} columns, expected "
                f"{columns!r}; it is damaged, get the official file"
            )
        table.append((f"{tree.where(name)} line {number}", fields))
    return table


def whole_number(text: str, where: str, lowest: int = 1, highest: int = 2**31) -> int:
    """A number in `lowest`..`highest` from a table.

    Raises:
        UsageError: it is something else; names where it stands.
    """
    # isdecimal alone accepts the digits of other alphabets.
    if not (text.isascii() and text.isdecimal()) or not lowest <= int(text) <= highest:
        raise UsageError(
            f"{where}: {text[:40]!r} is no whole number in {lowest}..{highest:,}; correct the file"
        )
    return int(text)


def four_numbers(fields: Sequence[str], where: str) -> tuple[float, float, float, float]:
    """The corner and size, or the two corners, of a box.

    Raises:
        UsageError: they are not four finite numbers; names where they stand.
    """
    try:
        a, b, c, d = map(float, fields)
    except ValueError:
        a = b = c = d = math.nan
    if not all(map(math.isfinite, (a, b, c, d))):
        raise UsageError(f"{where}: {' '.join(fields)[:60]!r} is no box; correct the file")
    return a, b, c, d
