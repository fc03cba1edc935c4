"""The top of the page: what was removed, how sure that is, and what to do next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from sqsd_filter.pipeline.meaning import advice, by_length, depends_on_length, false_alarms, sentences
from sqsd_filter.pipeline.report import (
    ConsensusPack,
    LengthFigures,
    PackFacts,
    Report,
    cut_words,
    is_linear,
    is_sqsd,
    low_risk,
)
from sqsd_filter.pipeline.rules import CONSENSUS
from sqsd_filter.scoring.scorer import SQSD
from sqsd_filter.wording import many


@dataclass(frozen=True)
class Share:
    """A part of the input: its name, its rows, and its share in percent."""

    name: str
    rows: int
    percent: float


@dataclass(frozen=True)
class Step:
    """Something to do, and the command for it, if there is one."""

    words: str
    command: str = ""


@dataclass(frozen=True)
class Answer:
    """`sure` is how sure one can be, in a few sentences; `warning` stands out of them, `more` is folded."""

    headline: str
    shares: list[Share]
    what: list[str]
    sure: list[str]
    warning: str
    more: list[str]
    next: list[Step]


def answer(report: Report, length: LengthFigures | None, *, explained: bool) -> Answer:
    """What the page says first. `length` is how risk is related to length; `explained`: are there explanations?"""
    warning = by_length(length) if length is not None and depends_on_length(length) else ""
    shares, next = _shares(report), _next(report, explained=explained)
    return Answer(headline(report), shares, _what(report), _sure(report), warning, _more(report, length), next)


def headline(report: Report) -> str:
    rows = report["rows"]
    if "kept" not in rows:
        return f"{many(rows['total'], 'row')} with their risk"
    if report.get("weights"):
        return f"{many(rows['kept'], 'row')} weighted by their risk"
    return f"{rows['dropped']:,} of {many(rows['total'], 'row')} dropped"


def _shares(report: Report) -> list[Share]:
    rows = report["rows"]
    if "kept" in rows:
        named = {"dropped": rows["dropped"], "kept": rows["kept"], "could not be scored": rows["errors"]}
    else:
        unscored = sum(report["unscored"].values())
        named = {"with a risk": rows["total"] - unscored, "could not be scored": unscored}
    total = max(1, rows["total"])
    return [Share(name, count, round(100 * count / total, 3)) for name, count in named.items() if count]


def _what(report: Report) -> list[str]:
    """What was done, in a few sentences."""
    rows, words = report["rows"], []
    unscored = sum(report["unscored"].values())
    if "kept" in rows:
        fates = f"{rows['kept']:,} were kept, {rows['dropped']:,} dropped"
    else:
        fates = f"{rows['total'] - unscored:,} have a risk"
    kept = unscored - rows["errors"]
    anyway = f" (kept anyway: {kept:,})" if kept else ""
    words.append(f"{many(rows['total'], 'row')} were read: {fates}, {unscored:,} could not be scored{anyway}.")
    if report["cut"] is not None:
        words.append(f"The cut: {cut_words(report)}.")
    if weights := report.get("weights"):
        at = "" if weights["threshold"] is None else f" with the threshold {weights['threshold']:.6g}"
        words.append(f"Each row has the weight {weights['formula']}{at}; the weights add up to {weights['sum']:,.6g}.")
    elif report["threshold"] is not None and rows["dropped"]:
        ties = f"; kept rows with the same risk: {report['ties']:,}" if report["ties"] else ""
        words.append(f"The lowest risk among the dropped rows is {report['threshold']:.6g}{ties}.")
    if groups := report.get("groups"):
        column = "split" if groups["column"] is None else f"group of rows with the same {groups['column']}"
        apart = (
            "was cut at the same risk" if "threshold" in report.get("reference", {}) else "had its own share of the cut"
        )
        words.append(f"Each {column} {apart}.")
    return words


def _sure(report: Report) -> list[str]:
    """How sure one can be of the cut, in a few sentences."""
    reference, rows = report.get("reference", {}), report["rows"]
    words = [false_alarms(reference, rows.get("dropped", 0)), advice(reference)]
    if not reference:
        words.append(
            "This risk comes without reference rows, so nobody knows how many of the dropped rows are false alarms: "
            "read them."
            if rows.get("dropped")
            else "This risk comes without reference rows, so it has no absolute meaning: compare rows with each other."
        )
    words.append(
        f"A low risk only means {low_risk(report)}. It does not mean that a model fine-tuned on the kept rows is safe."
    )
    return [each for each in words if each]


def _more(report: Report, length: LengthFigures | None) -> list[str]:
    """More on the cut and the risk, in a few sentences."""
    words = sentences(report.get("reference", {}))
    if length is None or not depends_on_length(length):
        words.append(by_length(length))
    return [*words, _measure(report)]


def _next(report: Report, *, explained: bool) -> list[Step]:
    """What to do with this run; OUT stands for its destination."""
    rows, steps = report["rows"], []
    source = "SCORES" if report.get("consensus") else shlex.quote(report.get("scores_from") or "OUT")
    cut = f"sqsd-filter select {source} OTHER --drop-top 2%"
    if rows.get("dropped"):
        steps.append(
            Step(
                "Read the dropped rows below. If many look harmless, drop fewer, and if kept ones look bad, drop more. "
                "Another cut takes seconds and no model:",
                cut,
            )
        )
    elif not report.get("weights"):
        steps.append(Step("Read the riskiest rows below, and choose a cut. It takes seconds and no model:", cut))
    if not explained and (is_sqsd(report) or is_linear(report)) and report.get("pack"):
        steps.append(Step("See which layers and words make these rows risky:", "sqsd-filter explain OUT"))
    if "kept" in rows:
        steps.append(Step("Fine-tune on the kept rows, and evaluate the model that you train:", 'load_dataset("OUT")'))
    if report["unscored"]:
        steps.append(Step("Look at the rows that could not be scored: their risk is unknown."))
    return steps


def _measure(report: Report) -> str:
    """Where the risks come from."""
    if consensus := report.get("consensus"):
        packs = ", ".join(
            (_pack(each["pack"]) if each["pack"] else each["column"]) + _other(each) for each in consensus["packs"]
        )
        return f"The risk combines several packs ({packs}): it is the {CONSENSUS[consensus['rule']]}."
    if not (pack := report.get("pack")):
        return f"The risk was in the input{_other(report)}."
    state = f", by its risk {pack['risk']}" if pack.get("risk") else ""
    state += f", with the state {pack['shared_state']} for all directions" if pack.get("shared_state") else ""
    if is_sqsd(report) or is_linear(report):
        return f"The risk comes from the pack {_pack(pack)}{state}."
    return f"The risk comes from the scorer {report['scorer']} on {pack['base_model']}{state}."


def _other(report: Report | ConsensusPack) -> str:
    """The scorer, if it is known not to be SQSD."""
    name = report.get("scorer") or SQSD
    return "" if name == SQSD else f", by the scorer {name}"


def _pack(pack: PackFacts) -> str:
    return f"{pack['name']} ({pack['fingerprint']}) on {pack['base_model']}"
