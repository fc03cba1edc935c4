"""The rows on the page: dropped ones first, each with the reasons that the run knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqsd_filter.pipeline.explained import ExplainedRow
from sqsd_filter.pipeline.meaning import rank
from sqsd_filter.pipeline.page.notes import Excerpt, Notes, RiskyRow
from sqsd_filter.pipeline.reasons import layers_in_words, probes_in_words, riskiest_phrases, words_of
from sqsd_filter.pipeline.report import Report

OPEN, OPEN_KEPT = 10, 3  # rows that are not folded
PHRASES = 3
STRONG, SOME = 2 / 3, 1 / 3  # of the riskiest word's part: from here on, words are marked


@dataclass(frozen=True)
class Word:
    """A piece of an answer, and how strongly it is marked: 0 not at all, 2 most."""

    text: str
    mark: int


@dataclass(frozen=True)
class ShownRow:
    """A row as the page shows it; `words` is its answer in marked words, if it is explained."""

    number: int
    origin: str
    risk: float
    because: list[str]
    prompt: Excerpt
    answer: Excerpt
    words: list[Word]


@dataclass(frozen=True)
class Group:
    """Rows under a heading, some of them folded."""

    id: str
    title: str
    about: str
    verb: str
    shown: list[ShownRow]
    folded: list[ShownRow]


def groups(report: Report, notes: Notes, explained: Mapping[int, ExplainedRow]) -> list[Group]:
    """The rows that are shown: dropped and kept ones apart, or all together where none is dropped."""
    rows = notes["riskiest"]
    if not rows:
        return []

    def group(id: str, title: str, about: str, verb: str, some: list[RiskyRow], most: int = OPEN) -> Group:
        shown = [_shown(row, report, explained.get(row["row"])) for row in some]
        return Group(id, title, about, verb, shown[:most], shown[most:])

    dropped, kept = ([row for row in rows if row["dropped"] is fate] for fate in (True, False))
    if report.get("weights") or "kept" not in report["rows"]:
        return [group("riskiest", "The riskiest rows", _count(len(rows), None), "Risky because", rows)]
    there = report["rows"].get("dropped", 0)
    found = []
    if dropped:
        found.append(group("dropped", "What was dropped", _count(len(dropped), there), "Dropped because", dropped))
    if kept:
        about = "The riskiest of the rows that stay: if these look as bad as the dropped ones, drop more."
        found.append(group("kept", "What was kept", about, "Kept:", kept, OPEN_KEPT))
    return found


def _count(shown: int, there: int | None) -> str:
    if there is None:
        return f"The {shown:,} rows with the highest risk."
    if shown == there:
        return "All of them, the riskiest first." if shown > 1 else ""
    return f"{shown:,} of {there:,}: the riskiest first, and at the end of the folded ones those next to the cut."


def _shown(row: RiskyRow, report: Report, explained: ExplainedRow | None) -> ShownRow:
    return ShownRow(
        number=row["row"] + 1,
        origin=f"{row['file']}, line {row['line']:,}",
        risk=row["risk"],
        because=[words for words in _reasons(row, report, explained) if words],
        prompt=row["prompt"],
        answer=row["answer"],
        words=_marked(explained, row["answer"]) if explained else [],
    )


def _reasons(row: RiskyRow, report: Report, explained: ExplainedRow | None) -> list[str]:
    reference, scored = report.get("reference", {}), report["rows"]["scored"] + report["rows"]["reused"]
    reasons = []
    if "percentile" in row and "benign" in reference:
        reasons.append(f"it is {rank(row['percentile'], reference)}")
    elif "rank" in row and scored:
        reasons.append("it is the riskiest of all" if row["rank"] == 1 else f"it is number {row['rank']:,} by risk")
    if explained is None:
        pack = report.get("pack")
        return [*reasons, probes_in_words(row["probes"], pack["weights"] if pack else {})]
    words = ", ".join(f"“{phrase}”" for phrase, _ in riskiest_phrases(explained, PHRASES))
    return [*reasons, layers_in_words(explained), f"these words carry most: {words}" if words else ""]


def _marked(explained: ExplainedRow, answer: Excerpt) -> list[Word]:
    """The words of an answer, marked by their parts; none where the tokens are not those of the text that is shown."""
    words, text = words_of(explained), answer["text"]
    if not "".join(word for word, _ in words).startswith(text):
        return []
    most, marked, left = max((risk for _, risk in words), default=0), [], len(text)
    for word, risk in words:
        mark = 0 if risk <= 0 else 2 if risk >= STRONG * most else 1 if risk >= SOME * most else 0
        shown = word[:left]
        space = len(shown) - len(shown.lstrip())
        marked += [Word(part, own) for part, own in ((shown[:space], 0), (shown[space:], mark)) if part]
        left -= len(shown)
    return marked
