"""What a risk means: how it compares with the risks of reference rows, which a pack carries in its `pack.json`.

    "reference": {"settings": {"pack": "<fingerprint>", "max_length": 1024, "dtype": "float32", ...},
                  "corpora": [{"name": "dolly", "kind": "benign", "rows": 640, "sha256": "...", "licence": "...",
                               "quantiles": {"risk": {"0%": -9.1, ...}, "danger": {...}}, "risks": [-9.1, ...]}]}

A quantile is the lowest value of a row that at least this share of the rows does not exceed. `risks`, ascending, are
those of all rows if these are at most `HIGHEST` + `SPREAD`; of more rows the highest and some that are spread evenly
over the others. So the number of rows below a risk is exact among the `HIGHEST` riskiest rows. Elsewhere it may be too
small, by less than a `SPREAD`-th of the rows.

Each row of a kind counts once, whatever its corpus. A share of the benign reference is thus a share of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NotRequired, TypedDict, cast

import numpy as np

from sqsd_filter.errors import PackError, UsageError
from sqsd_filter.scoring.pack import PACK_FILE, REFERENCE, Pack
from sqsd_filter.scoring.scorer import SCORING, SQSD, Scorer
from sqsd_filter.wording import many

BENIGN, UNSAFE = "benign", "unsafe"
HIGHEST, SPREAD = 200, 300  # risks that are kept of a corpus
LEVELS = ("0%", "1%", "5%", "25%", "50%", "75%", "90%", "95%", "99%", "99.5%", "99.9%", "100%")


class ReferenceSettings(TypedDict):
    """What the reference was scored by."""

    pack: str  # its fingerprint, at the shared state if there is one
    base_model: str
    base_content: str | None
    shared_state: str | None
    scorer: str
    scoring: int
    dtype: str
    max_length: int


class ReferenceRows(TypedDict):
    """The scores of one reference corpus; `sha256` is the digest of the conversations that were scored."""

    name: str
    kind: str
    rows: int
    sha256: str
    licence: NotRequired[str]
    data: NotRequired[dict[str, object]]
    quantiles: dict[str, dict[str, float]]
    risks: list[float]


class ReferenceRecord(TypedDict):
    """The content of `pack.json` under `REFERENCE`."""

    settings: ReferenceSettings
    corpora: list[ReferenceRows]


def settings_of(scorer: Scorer) -> ReferenceSettings:
    """What a scorer scores by."""
    return settings_from(scorer.settings(), scorer.pack.shared_state)


def settings_from(known: Mapping[str, object], shared_state: str | None) -> ReferenceSettings:
    """The same from a scorer's settings, which a run keeps, and the state that its pack's directions share."""
    names = ("pack", "base_model", "base_content", "scoring", "dtype", "max_length")
    settings = {name: known[name] for name in names}
    settings |= {"scorer": known.get("scorer", SQSD), "shared_state": shared_state}
    return cast("ReferenceSettings", settings)


def summarise_rows(name: str, kind: str, sha256: str, values: Mapping[str, np.ndarray]) -> ReferenceRows:
    """The scores of n reference rows in short: `values` has (n,) floats as "risk" and for each probe."""
    risk = np.sort(values["risk"])
    return {
        "name": name,
        "kind": kind,
        "rows": len(risk),
        "sha256": sha256,
        "quantiles": {value: _quantiles(np.sort(column)) for value, column in values.items()},
        "risks": risk[kept_ranks(len(risk))].tolist(),
    }


def _quantiles(ascending: np.ndarray) -> dict[str, float]:
    return {level: float(ascending[rank_of(share_of(level), len(ascending)) - 1]) for level in LEVELS}


def share_of(level: str) -> Fraction:
    """One of the levels as a share."""
    return Fraction(level.removesuffix("%")) / 100


def rank_of(share: Fraction, rows: int) -> int:
    """The rank of the quantile at a share, from 1 for the lowest value."""
    return max(1, math.ceil(share * rows))


def kept_ranks(rows: int) -> np.ndarray:
    """The ranks, from 0 for the lowest, of the risks that are kept of so many rows."""
    if rows <= HIGHEST + SPREAD:
        return np.arange(rows)
    others = np.linspace(0, rows - HIGHEST - 1, SPREAD).round().astype(np.int64)
    return np.concatenate([others, np.arange(rows - HIGHEST, rows)])


@dataclass(frozen=True)
class Pool:
    """Reference rows of one kind: the number of rows of each corpus, the kept `risks` (m,), ascending, and how many
    rows lie at or below each (m,)."""

    corpora: Mapping[str, int]
    risks: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, corpora: Sequence[ReferenceRows]) -> Pool:
        risks = np.concatenate([np.array(each["risks"], np.float64) for each in corpora])
        ranks = [kept_ranks(each["rows"]) for each in corpora]
        rows = np.concatenate([np.diff(kept, prepend=-1) for kept in ranks])
        order = np.argsort(risks, kind="stable")
        return cls({each["name"]: each["rows"] for each in corpora}, risks[order], np.cumsum(rows[order]))

    @property
    def rows(self) -> int:
        return sum(self.corpora.values())

    def below(self, risk: np.ndarray) -> np.ndarray:
        """The number of rows with a lower risk (n,) than each of these (n,)."""
        return np.concatenate([[0], self.counts])[np.searchsorted(self.risks, risk, side="left")]

    def above(self, risk: float, *, including: bool) -> int:
        """The number of rows with a higher risk, or `including` those with the same."""
        at = int(np.searchsorted(self.risks, risk, side="left" if including else "right"))
        return self.rows - (int(self.counts[at - 1]) if at else 0)

    def shows(self, share: Fraction) -> bool:
        """Do the rows show the quantile at a share below 1: is any of them above it?"""
        return (1 - share) * self.rows >= 1

    def quantile(self, share: Fraction) -> float:
        """The lowest risk of a row that at least this share of the rows does not exceed."""
        return float(self.risks[np.searchsorted(self.counts, rank_of(share, self.rows))])

    def quantiles(self) -> dict[str, float]:
        """Those of the levels that the rows show."""
        ends = ("0%", "100%")
        return {name: self.quantile(share_of(name)) for name in LEVELS if name in ends or self.shows(share_of(name))}


@dataclass(frozen=True)
class Reference:
    """The reference of the pack with this name."""

    pack: str
    record: ReferenceRecord

    @classmethod
    def of(cls, pack: Pack) -> Reference | None:
        """The reference that a pack carries, if any. Raises `PackError` where it is damaged."""
        record = pack.notes.get(REFERENCE)
        if record is None:
            return None
        if why := _damage(record):
            raise PackError(
                f"{pack.path / PACK_FILE} has a damaged '{REFERENCE}' ({why}): run 'sqsd-filter pack calibrate' again."
            )
        return cls(pack.name, cast("ReferenceRecord", record))

    @cached_property
    def benign(self) -> Pool:
        return Pool.of([each for each in self.record["corpora"] if each["kind"] == BENIGN])

    @cached_property
    def unsafe(self) -> Pool | None:
        """None where the reference has no known unsafe answers."""
        corpora = [each for each in self.record["corpora"] if each["kind"] == UNSAFE]
        return Pool.of(corpora) if corpora else None

    def identity(self) -> list[list[str]]:
        """Different for another reference."""
        corpora = self.record["corpora"]
        return [[each["name"], each["kind"], each["sha256"], str(sum(each["risks"]))] for each in corpora]

    def mismatch(self, settings: ReferenceSettings) -> str | None:
        """Why the reference says nothing of rows that were scored by these settings, as a sentence with the fix; None
        where it applies. Number formats may differ."""
        own = self.record["settings"]

        def same_base() -> bool:
            contents = own["base_content"], settings["base_content"]
            return own["base_model"] == settings["base_model"] if None in contents else contents[0] == contents[1]

        differences = {
            "the scorer {scorer}": own["scorer"] == settings["scorer"],
            "the shared state {shared_state}": own["shared_state"] == settings["shared_state"],
            "the base model {base_model}": same_base(),
            "the pack's fingerprint {pack}": own["pack"] == settings["pack"],
            "version {scoring} of the scoring": own["scoring"] == settings["scoring"],
            "max_length {max_length}": own["max_length"] == settings["max_length"],
        }
        for what, same in differences.items():
            if not same:
                return (
                    f"The reference of the pack {self.pack} does not apply: it was scored by {what.format_map(own)}, "
                    f"these rows by {what.format_map(settings)}; score them alike, or run 'sqsd-filter pack calibrate'."
                )
        return None

    def outdated(self, pack: Pack) -> str | None:
        """Why the reference says nothing of this pack's scores with its own settings, as far as its files tell."""
        own = self.record["settings"]
        state = own["shared_state"]
        if state is not None and state in {p.state for p in pack.probes}:
            pack = pack.at_one_state(state)
        return self.mismatch({**own, "pack": pack.fingerprint, "scoring": SCORING})

    def threshold(self, share: Fraction) -> float:
        """The risk that this share of the benign reference does not exceed. Raises `UsageError` for a share that the
        rows can't show: at least one of them has to lie above it."""
        if share == 1:
            raise UsageError("No risk is above 100% of all benign rows: name a smaller share, such as 99%.")
        if not self.benign.shows(share):
            needed = math.ceil(1 / (1 - share))
            raise UsageError(
                f"The pack {self.pack} has {many(self.benign.rows, 'benign reference row')}, which can't show "
                f"{float(share * 100):.10g}%: that needs at least {needed:,}; name a smaller share, or calibrate the "
                "pack with more rows."
            )
        return self.benign.quantile(share)


def _damage(record: object) -> str | None:
    """What is wrong with the value of the key in pack.json, if anything is."""
    try:
        corpora = cast("ReferenceRecord", record)["corpora"]
        missing = ReferenceSettings.__required_keys__ - set(cast("ReferenceRecord", record)["settings"])
        if missing:
            return f"its settings lack {', '.join(sorted(missing))}"
        if not any(each["kind"] == BENIGN for each in corpora):
            return "it has no benign corpus"
        for each in corpora:
            risks = np.array(each["risks"], np.float64)
            whole = len(risks) == len(kept_ranks(each["rows"])) > 0
            if not whole or not np.isfinite(risks).all() or (np.diff(risks) < 0).any():
                return f"the risks of {each['name']} are not those of {each['rows']} rows"
            if each["kind"] not in (BENIGN, UNSAFE) or not each["sha256"]:
                return f"{each['name']} is neither benign nor unsafe, or has no sha256"
    except (KeyError, TypeError, ValueError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return None
