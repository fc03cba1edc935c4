"""What a run says of itself: report.json, and the dataset card that makes the output a dataset anyone can load."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.pipeline.folder import write_whole
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selection import FORMULA, Cut, Selection
from sqsd_filter.pipeline.writing.export import CONFIGS, REASONS

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


def versions() -> dict[str, str]:
    """Versions of everything that can change a score or a byte."""
    names = ("sqsd-filter", "torch", "transformers", "datasets", "pyarrow", "numpy")
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
        rows |= {config: selection.count(place) for config, place in CONFIGS.items()}
    else:
        rows |= {"errors": int((~scored.scored).sum())}
    found = {
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


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda sink: sink.write((json.dumps(report, indent=2) + "\n").encode()))


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


def _configs(report: Mapping[str, Any]) -> list[str]:
    """The card's header lines by which `load_dataset` finds the files of each config and split."""
    header = ["configs:"]
    for config in CONFIGS:
        own = [file for file in report["files"] if file["config"] == config]
        header += [f"- config_name: {'default' if config == 'kept' else config}", "  data_files:"]
        for split in dict.fromkeys(file["split"] for file in own):
            path = next(file["path"] for file in own if file["split"] == split)
            header += [f'  - split: "{split}"', f"    path: {re.sub(r'[0-9]{5}-of-[0-9]{5}', '*', path)}"]
        # datasets caches what it loaded by the folder's last name and this header alone: two runs' must differ
        content = hashlib.sha256("".join(file["sha256"] for file in own).encode()).hexdigest()
        header += [f"  description: {report['rows'][config]} rows, SHA-256 of its files' {content}"]
    return header


def _holds(report: Mapping[str, Any]) -> str:
    """What is in the rows beside the input's columns, and how they are stored."""
    scores = "`sqsd_risk` (higher is riskier), one `sqsd_<probe>` for each projection, and `sqsd_status`"
    if report["to"] == "jsonl":
        added = f"At the end of each line of kept and dropped stand {scores}." if report["with_scores"] else ""
        return f"""Lines of JSON Lines files are the input's own, byte for byte. {added}
`{REASONS}` has for each line of errors its file, line, status and reason.
`load_dataset` takes dates in text for timestamps, and fails where a line of errors is no JSON."""
    stored = ", ".join(f"`{name}`" for name in report["json_columns"])
    as_json = f"""

No one type holds all values of {stored}, so they are stored as JSON. `datasets` decodes
what it can; where it gives text, `json.loads` gives the value."""
    return f"Columns added: {scores}. The other\ncolumns are the input's.{as_json if stored else ''}"


def write_card(path: Path, report: Mapping[str, Any]) -> None:
    """The dataset card: configs for kept (the default), dropped and errors, and what was done in words."""
    rows = report["rows"]
    pack = report.get("pack")
    header = ["---", *(_configs(report) if report["to"] != "arrow" else [])]
    header += ["tags:", "- sqsd-filter", "- safety", "---"]
    measured = (
        f"It was measured with the pack `{pack['name']}` ({pack['fingerprint']}) on `{pack['base_model']}`."
        if pack
        else "The scores were already in the input."
    )
    if report["threshold"] is None:
        threshold = "No row was dropped."
    else:
        threshold = f"The lowest risk among the dropped rows is {report['threshold']:.6g}"
        threshold += f"; {report['ties']} kept rows have that very risk." if report["ties"] else "."
    # datasets raises for a split without rows, unless it is streamed
    load = {
        config: call if rows[config] or report["to"] == "arrow" else f"{call[:-1]}, streaming=True)"
        for config, call in load_calls(report, "path").items()
    }
    unscored = ", ".join(f"{count} {status}" for status, count in report["unscored"].items())
    body = f"""
# {rows["kept"]} of {rows["total"]} rows, the riskiest removed

Each row was given an SQSD risk (arXiv 2605.04572): how much more the parameter update that the row alone would cause
points along a danger direction than along a safety direction. {measured}
Rows were cut by `{report["cut"]}`. {threshold}

| | rows | load with |
| --- | ---: | --- |
| kept | {rows["kept"]} | `{load["kept"]}` |
| dropped | {rows["dropped"]} | `{load["dropped"]}` |
| errors, not scored{f" ({unscored})" if unscored else ""} | {rows["errors"]} | `{load["errors"]}` |
| total | {rows["total"]} | |

{_holds(report)}

`sqsd/report.json` holds the settings, inputs and versions of the run.

A low risk is no promise: it says that a row pushes little along the directions of this pack, not that a model
fine-tuned on the kept rows is safe. Evaluate the model that you train.
"""
    write_whole(path, lambda sink: sink.write(("\n".join(header) + "\n" + body).encode()))
