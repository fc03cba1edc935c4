"""What a run says of itself: report.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selecting.selection import FORMULA, Cut, Selection
from sqsd_filter.pipeline.writing.export import CONFIGS
from sqsd_filter.scoring.scorer import SQSD
from sqsd_filter.storage.folder import write_text

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


def versions(*more: str) -> dict[str, str]:
    """Versions of everything that can change a score or a byte, and of these packages."""
    names = ("sqsd-filter", "torch", "transformers", "datasets", "pyarrow", "numpy", *more)
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def summarise(scored: Scored, selection: Selection | None, cut: Cut | None) -> dict[str, Any]:
    """The figures of a finished run: rows by fate, why rows have no score, the cut, and how risk is spread."""
    risk = scored.risk[scored.scored]
    quantiles = np.quantile(risk, [q / 100 for q in QUANTILES]) if len(risk) else []
    rows: dict[str, int] = {"total": scored.corpus.n_rows}
    if selection is not None:
        rows |= {config: selection.count(fate) for config, fate in CONFIGS.items()}
    else:
        rows |= {"errors": int((~scored.scored).sum())}
    found: dict[str, Any] = {
        "rows": rows | scored.counts,
        "unscored": scored.reasons(),
        "format": str(scored.form) if scored.form else None,
        "cut": str(cut) if cut else None,
        "threshold": selection.threshold if selection else None,
        "ties": selection.ties if selection else 0,
        "tokens": int(scored.tokens.sum()),
        "risk_quantiles": {f"{q}%": float(v) for q, v in zip(QUANTILES, quantiles, strict=False)},
        "inputs": scored.corpus.inputs,
    }
    if scored.modules:
        found["modules"] = {name: list(each.names) for name, each in scored.modules.items()}
    if selection is not None and cut is not None:
        found |= _pieces(selection, cut)
    return found


def _pieces(selection: Selection, cut: Cut) -> dict[str, Any]:
    """The figures of groups and splits where they were cut apart, and of weights where there are any."""
    found: dict[str, Any] = {}
    figures: list[dict[str, Any]] = [
        {**piece.key, "scored": piece.scored, "dropped": piece.dropped, "threshold": piece.threshold}
        | ({"scale": piece.scale, "sum": piece.total} if cut.weights else {})
        for piece in selection.pieces
    ]
    apart = cut.per_group is not None or cut.per_split
    if apart:
        found["groups"] = {"column": cut.per_group, "spared": selection.spared, "groups": figures}
    if cut.weights:
        level = {name: None if apart else figures[0][name] for name in ("threshold", "scale")}
        found["weights"] = {"formula": FORMULA, **level, "sum": sum(piece.total for piece in selection.pieces)}
    return found


def scorers(report: Mapping[str, Any]) -> list[str]:
    """What gave the risks, or those of which ranks were combined; SQSD where it is not known."""
    each = report["consensus"]["packs"] if report.get("consensus") else [report]
    return list(dict.fromkeys(one.get("scorer") or SQSD for one in each))


def is_sqsd(report: Mapping[str, Any]) -> bool:
    """Is the risk SQSD's own: no other scorer's, and no rank?"""
    return not report.get("consensus") and scorers(report) == [SQSD]


def risk_name(report: Mapping[str, Any]) -> str:
    """What an axis calls the risk."""
    if is_sqsd(report):
        return "SQSD risk"
    return f"risk by {report['consensus']['rule'] if report.get('consensus') else report['scorer']}"


def low_risk(report: Mapping[str, Any]) -> str:
    """What a low risk says."""
    if is_sqsd(report):
        return "that a row pushes little along the directions of this pack"
    return "how a row stands by this measure"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=2) + "\n")


def load_calls(report: Mapping[str, Any], where: str) -> dict[str, str]:
    """The Python expression that loads the rows of each config from the destination; `where` is one for its path."""
    calls = {}
    for config in CONFIGS:
        if report["to"] == "arrow":
            keys = dict.fromkeys(file["path"].split("/")[0] for file in report["files"] if file["config"] == config)
            calls[config] = ", ".join(f'load_from_disk({where})["{key}"]' for key in keys)
        else:
            calls[config] = f"load_dataset({where})" if config == "kept" else f'load_dataset({where}, "{config}")'
    return calls
