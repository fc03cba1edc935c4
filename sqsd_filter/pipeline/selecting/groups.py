"""Rows in groups, of equal values in a column or of one split, and what each group gives when a cut is shared."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sqsd_filter.errors import InputError, option

if TYPE_CHECKING:
    from sqsd_filter.corpus.sources import Part, Row

MOST_GROUPS = 10_000


@dataclass(frozen=True)
class Groups:
    """n rows in groups: `codes` (n,) int32 into `values`."""

    codes: np.ndarray
    values: list[Any]

    def within(self, rows: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
        """The groups among these `rows` (r,), ascending: value and rows of each, in the order of their first rows."""
        codes = self.codes[rows]
        by_code = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[by_code], prepend=-1))
        members = np.split(rows[by_code], starts[1:])
        for rank in np.argsort(by_code[starts]).tolist():
            yield self.values[codes[by_code[starts[rank]]]], members[rank]


class GroupIndex:
    """Visits a corpus and notes each row's value in a column, null where it has none; without a column, nothing."""

    def __init__(self, column: str | None) -> None:
        self.column = column
        self.columns = [] if column is None else [column]  # to be read
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
                f"so it names no groups: give {option('per_group')} a column of categories."
            )
        self._codes.append(code)

    def groups(self, columns: Sequence[str]) -> Groups | None:
        """What was found in a corpus with these columns. Raises `InputError` where the one asked for is not there."""
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


def canonical(value: Any) -> str:
    """JSON that equal values share: keys sorted, 1.0 as 1, what JSON has no form for (a date, say) as text."""
    return json.dumps(_plain(value), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return value


def apportion(k: int, risks: Sequence[np.ndarray], leave: int) -> list[int]:
    """How many of k rows to drop each group gives; `risks` has those of its n_g rows, (n_g,).

    Each gives k·n_g/n, by largest remainders, but `leave` of its rows stay. A group whose share is more than
    n_g - leave gives just these, and the others share what is left as if it were not there. Where all groups give as
    much as they can and it is not enough, the sum is less than k. Of equal remainders the first is that of the group
    whose next row is riskier, then that of the group that stands first. All is counted in integers.
    """
    if not k:
        return [0] * len(risks)
    sizes = [len(risk) for risk in risks]
    given = [size - leave for size in sizes]
    left, among = k, sum(sizes)  # rows still to be given, by groups that have so many
    sharing = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    while sharing and left * sizes[sharing[-1]] > given[sharing[-1]] * among:  # else no larger one gives too much
        smallest = sharing.pop()
        left, among = left - given[smallest], among - sizes[smallest]
    quotas = {g: divmod(left * sizes[g], among) for g in sharing}
    for g, (whole, _) in quotas.items():
        given[g] = whole
    # fewer are left over than groups have a remainder, and these have room: no quota is above n_g - leave
    if over := left - sum(whole for whole, _ in quotas.values()):
        ranked = sorted(quotas, key=lambda g: (-quotas[g][1], -nth_riskiest(risks[g], given[g]), g))
        for g in ranked[:over]:
            given[g] += 1
    return given


def nth_riskiest(risk: np.ndarray, n: int) -> float:
    """The risk (m,) that stands at place n, from 0, when the highest comes first."""
    at = len(risk) - 1 - n
    return float(np.partition(risk, at)[at])
