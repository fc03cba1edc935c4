"""Rows in groups, by their value in a column or by their split, and how many rows each group drops in a shared cut."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sqsd_filter.errors import InputError, option

if TYPE_CHECKING:
    from sqsd_filter.corpus.parts import Part
    from sqsd_filter.corpus.sources import Row

MOST_GROUPS = 10_000


@dataclass(frozen=True)
class Groups:
    """n rows in groups: `codes` (n,) int32 into `values`."""

    codes: np.ndarray
    values: Sequence[object]

    def within(self, rows: np.ndarray) -> Iterator[tuple[object, np.ndarray]]:
        """The groups among these `rows` (r,), ascending: value and rows of each, in the order of their first rows."""
        codes = self.codes[rows]
        by_code = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[by_code], prepend=-1))
        members = np.split(rows[by_code], starts[1:])
        for rank in np.argsort(by_code[starts]).tolist():
            yield self.values[codes[by_code[starts[rank]]]], members[rank]


class GroupIndex:
    """Visits a corpus and notes each row's value in a column, null where it has none; without a column, nothing.

    `columns` are those that it needs to read.
    """

    def __init__(self, column: str | None) -> None:
        self.column = column
        self.columns = [] if column is None else [column]
        self._codes = array("i")
        self._known: dict[str, int] = {}  # code by canonical JSON

    def visit(self, row: Row) -> None:
        """Raises `InputError` for more than `MOST_GROUPS` groups."""
        if self.column is None:
            return
        key = canonical((row.value or {}).get(self.column))
        code = self._known.setdefault(key, len(self._known))
        if code == MOST_GROUPS:
            raise InputError(
                f"Column '{self.column}' has more than {MOST_GROUPS:,} different values ({row.file}, line {row.line}), "
                f"too many for groups: give {option('per_group')} a column of categories."
            )
        self._codes.append(code)

    def groups(self, columns: Sequence[str]) -> Groups | None:
        """The groups of the rows, visited in a corpus with these columns. Raises `InputError` where the groups' column
        is not among them."""
        if self.column is None:
            return None
        if self.column not in columns:
            names = ", ".join(f"'{name}'" for name in columns)
            raise InputError(
                f"No row has the column '{self.column}' that {option('per_group')} names; the columns are {names}."
            )
        values = [json.loads(key, parse_constant=str) for key in self._known]
        return Groups(np.array(self._codes, dtype=np.int32), values)


def by_split(parts: Sequence[Part]) -> Groups:
    """The rows of a corpus by their split."""
    names = list(dict.fromkeys(part.split for part in parts))
    codes = np.array([names.index(part.split) for part in parts], dtype=np.int32)
    return Groups(np.repeat(codes, [part.rows for part in parts]), names)


def canonical(value: object) -> str:
    """JSON that is the same for equal values: keys sorted, 1.0 as 1, and a value that JSON lacks (a date) as text."""
    return json.dumps(_plain(value), sort_keys=True, default=str)


def _plain(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return value


def apportion(k: int, risks: Sequence[np.ndarray], leave: int) -> list[int]:
    """How many of the k rows to drop each group drops; `risks` holds the risks (n_g,) of each group's n_g rows.

    Each group drops k·n_g/n rows, by largest remainders, but keeps at least `leave`. A group whose share is above
    n_g - leave drops just these, and the other groups share the rest as if it were not there. If all groups drop as
    many as they can and that is still too few, the sum is less than k. Between equal remainders, the group whose next
    row is riskier comes first, then the group that comes first in `risks`. All of it is counted in integers.
    """
    if not k:
        return [0] * len(risks)
    sizes = [len(risk) for risk in risks]
    given = [size - leave for size in sizes]
    left, among = k, sum(sizes)  # rows still to drop, and the number of rows in the groups that still share them
    sharing = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    while sharing and left * sizes[sharing[-1]] > given[sharing[-1]] * among:  # else no larger group's share is too big
        smallest = sharing.pop()
        left, among = left - given[smallest], among - sizes[smallest]
    quotas = {g: divmod(left * sizes[g], among) for g in sharing}
    for g, (whole, _) in quotas.items():
        given[g] = whole
    # fewer rows are over than groups have a remainder, and these groups can drop one more: no quota is > n_g - leave
    if over := left - sum(whole for whole, _ in quotas.values()):
        ranked = sorted(quotas, key=lambda g: (-quotas[g][1], -nth_riskiest(risks[g], given[g]), g))
        for g in ranked[:over]:
            given[g] += 1
    return given


def nth_riskiest(risk: np.ndarray, n: int) -> float:
    """The n-th highest, from 0, of these risks (m,)."""
    at = len(risk) - 1 - n
    return float(np.partition(risk, at)[at])
