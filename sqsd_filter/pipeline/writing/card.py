"""The dataset card: its header makes the output loadable as a dataset, its text says what was done to the rows."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from sqsd_filter.corpus.addresses import HubDataset
from sqsd_filter.corpus.repositories import MARKER
from sqsd_filter.pipeline.meaning import advice, by_length, false_alarms, sentences
from sqsd_filter.pipeline.report import (
    GroupFigures,
    PackFacts,
    Report,
    RowWeights,
    WrittenFile,
    is_linear,
    is_one_file,
    is_sqsd,
    load_calls,
    low_risk,
    scorers,
)
from sqsd_filter.pipeline.rules import CONSENSUS
from sqsd_filter.pipeline.writing.export import PERCENTILE, REASONS_FILE, ROW
from sqsd_filter.pipeline.writing.figures import number, shown
from sqsd_filter.pipeline.writing.markdown import code, fenced, table
from sqsd_filter.pipeline.writing.originals import Original, carried_over
from sqsd_filter.pipeline.writing.writers import OF_LINES
from sqsd_filter.scoring.scorer import SQSD
from sqsd_filter.storage.folder import write_text
from sqsd_filter.storage.layout import ITSELF, REPORT_FILE, own_path
from sqsd_filter.wording import many

CARD_FILE = "README.md"
PICTURE_FILE = "risk.png"  # among a run's own files
TAGS = ("sqsd-filter", "safety", "data-filtering")
MOST_GROUPS = 50  # in the table
LONGEST = 80  # characters of a group's value

ERROR_COLUMNS = (
    ("`sqsd_reason`", "in `errors`: the reason in words"),
    ("`sqsd_file`, `sqsd_line`", "in `errors`: the row's file and line in the input"),
    ("`sqsd_raw`", "in `errors`: the bytes of a line that could not be read as a row"),
)

SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
CAVEATS = """\
## Limits

- A low risk only means {low}. It does not mean that a
  model fine-tuned on the kept rows is safe: evaluate the model that you train.
- {length} Read some of the dropped rows before you trust the cut.
- Dropped rows may be harmful, and rows without a score were not judged. Read them before you train on them."""

RULES = {
    "drop-top": "the riskiest {} of the scored rows",
    "drop-count": "the {} riskiest of the scored rows",
    "max-risk": "the scored rows with a risk above {}",
    "keep-lowest": "all scored rows but the {} with the lowest risk",
    "above-reference": "the scored rows that are riskier than {} of the benign reference rows of the pack",
}


def write_card(folder: Path, report: Report, originals: Sequence[tuple[str, str]] = ()) -> None:
    """Write the card to the output folder, or to the one beside an output file. For the arguments, see `card_text`."""
    write_text(folder / CARD_FILE, card_text(report, originals))


def card_text(report: Report, originals: Sequence[tuple[str, str]] = (), name: str | None = None) -> str:
    """The card for the files that the report names. `name` is the name to load the dataset by, if it is known.

    `originals` are pairs of a source's name and the text of its README.md, which is empty where it has none.
    """
    ids = _ids(report)
    local = {name for name, _ in originals if os.path.isabs(name)} - {*ids, "/"}
    named = [(os.path.basename(name) if name in local else name, text) for name, text in originals]
    of_ids = [pair for id in ids for pair in ([p for p in named if p[0] == id] or [(id, "")])]
    sources = [Original.of(name, text) for name, text in dict.fromkeys([*of_ids, *named])]
    header = yaml.safe_dump(_header(report, sources), sort_keys=False, allow_unicode=True)
    where = "path" if name is None else json.dumps(name)
    parts = [_opening(report), _removed(report), _contents(report, where), _origin(report, sources), _licence(sources)]
    parts += [
        _caveats(report),
        MARKER,
        *(source.section() for source in sources),
    ]
    text = f"---\n{header}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    return text.encode(errors="backslashreplace").decode()  # an argument of the command may be no UTF-8


def _caveats(report: Report) -> str:
    return CAVEATS.format(low=low_risk(report), length=by_length(report.get("length")))


def _header(report: Report, sources: Sequence[Original]) -> dict[str, Any]:
    header = carried_over(sources)
    header["tags"] = list(dict.fromkeys([*header["tags"], *TAGS]))
    header["size_categories"] = [_size(report["rows"]["kept"])]
    earlier = [name for source in sources if source.ours for name in source.fields.get("source_datasets", [])]
    if ids := list(dict.fromkeys([*_ids(report), *earlier])):
        header["source_datasets"] = ids
    in_folder = [file for file in report["files"] if file["path"] != ITSELF]
    header["configs"] = [_config(name, files) for name, files in _by(in_folder, "config").items()]
    return header


def _size(rows: int) -> str:
    """The Hub's name for the order of magnitude of a number of rows."""
    k = bisect([1000 * 10**k for k in range(len(SIZES))], rows)
    if k == len(SIZES):
        return f"n>{SIZES[-1]}"
    return f"{SIZES[k - 1]}<n<{SIZES[k]}" if k else f"n<{SIZES[0]}"


def _config(name: str, files: Sequence[WrittenFile]) -> dict[str, Any]:
    """A config for `load_dataset`.

    `datasets` caches by the folder's last name and the card's header alone, so the headers of two runs must differ if
    their rows do: a hash of the files' content sees to that.
    """
    content = hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()
    rows = sum(file["rows"] for file in files)
    data_files = []
    filled = [file for file in files if file["rows"]] or files[:1]  # `datasets` refuses a split without rows
    for split, part in _by(filled, "split").items():
        [path] = {re.sub("[0-9]{5}-of-[0-9]{5}", "*", file["path"]) for file in part}
        data_files.append({"split": split, "path": path})
    return {
        "config_name": "default" if name == "kept" else name,
        "data_files": data_files,
        "description": f"{many(rows, 'row')}, content hash {content}",
    }


def _opening(report: Report) -> str:
    rows, pack = report["rows"], report.get("pack")
    if report.get("weights"):
        title, alt = f"{rows['kept']:,} rows, weighted by their risk", f"{rows['kept']:,} rows are weighted"
    else:
        what = "the riskiest removed" if rows["dropped"] else "with their risk"
        title = f"{rows['kept']:,} of {rows['total']:,} rows, {what}"
        alt = f"{rows['kept']:,} rows are kept, {rows['dropped']:,} dropped"
    if consensus := report.get("consensus"):
        packs = ", ".join(_pack(each["pack"]) if each["pack"] else code(each["column"]) for each in consensus["packs"])
        measured = f"It combines the risks of several packs ({packs}): it is the {CONSENSUS[consensus['rule']]}."
    else:
        measured = f"The pack is {_pack(pack)}." if pack else "The scores were already in the input."
    if pack and (named := pack.get("risk")):
        measured += f" Of its risks this is {code(named)}."
    if pack and (state := pack.get("shared_state")):
        measured += (
            f" Shared state: {code(state)}. All directions use this one state. In the paper each direction has its "
            "own; a shared state is faster and gives other scores."
        )
    paper = "[arXiv 2605.04572](https://arxiv.org/abs/2605.04572)"
    if is_linear(report):
        risk = """\
Each row has a risk that a linear probe of the model's hidden states gives it: how much the row is
like known unsafe rows."""
    elif (names := scorers(report)) == [SQSD]:
        risk = f"""\
Each row has an SQSD risk ({paper}): how much more the parameter
update that this row alone would cause points along a danger direction than along a safety direction."""
    else:
        by = f"the scorer{'s' * (len(names) > 1)} {' and '.join(map(code, names))}"
        risk = f"Each row has a risk from {by}{'' if SQSD in names else f', with which SQSD ({paper}) is compared'}."
    return f"""\
# {title}

{risk} {measured}

![Histogram of the risk: {alt}]({_own_path(report, PICTURE_FILE)})"""


def _pack(pack: PackFacts) -> str:
    return f"{code(pack['name'])} ({pack['fingerprint']}) on {code(pack['base_model'])}"


def _removed(report: Report) -> str:
    """Which rows were dropped by which rule, or how rows are weighted, and where rows without a score are."""
    rows, weights = report["rows"], report.get("weights")
    if weights:
        heading, words = "How rows are weighted", _weighted(weights)
    else:
        heading, words = "What was removed, and why", _dropped(report)
    reference = report.get("reference", {})
    said = " ".join(filter(None, (*sentences(reference), false_alarms(reference, rows["dropped"]), advice(reference))))
    parts = [f"## {heading}", words, *([said] if said else [])]
    if groups := report.get("groups"):
        parts.append(_groups(groups, weighted=bool(weights)))
    if unscored := report["unscored"]:
        reasons = ", ".join(f"{count:,} {code(status)}" for status, count in unscored.items())
        errors, kept = rows["errors"], sum(unscored.values()) - rows["errors"]
        fates = [f"{errors:,} in `errors`"] * (errors > 0) + [f"{kept:,} kept"] * (kept > 0)
        parts.append(f"Rows without a score: {reasons} ({', '.join(fates)}). Their risk is unknown.")
    return "\n\n".join(parts)


def _dropped(report: Report) -> str:
    cut = report["cut"] or ""
    rule, *_ = cut.split(", ")
    if not report["rows"]["dropped"]:
        return f"No row was dropped: the rule {code(cut)} selects none."
    kind, _, value = rule.partition(" ")
    words = (
        "The riskiest rows are those that are expected to erode a model's safety most when it is fine-tuned on them. "
        f"This run dropped {RULES[kind].format(value)} ({code(cut)})."
    )
    reference = report.get("reference", {})
    if "threshold" in reference:
        words += f" These have a risk above {reference['threshold']:.6g}."
    if report["threshold"] is not None:
        words += f" The lowest risk among the dropped rows is {report['threshold']:.6g}"
        words += f"; kept rows with the same risk: {report['ties']:,}." if report["ties"] else "."
    return words


def _weighted(weights: RowWeights) -> str:
    if weights["threshold"] is None:
        values = "the threshold and scale below"
    else:
        values = f"the threshold {weights['threshold']:.6g} and the scale {weights['scale']:.6g}"
    return (
        "No row was dropped. Each row with a score has a weight for its loss in fine-tuning, so that the riskiest rows "
        f"count least: {code(weights['formula'])} with {values}. The weights add up to {weights['sum']:.6g}."
    )


def _groups(figures: GroupFigures, *, weighted: bool) -> str:
    """A table of the groups that were cut on their own, the largest first."""
    column, groups = figures["column"], sorted(figures["groups"], key=lambda group: -group["scored"])
    keys: dict[Literal["split", "value"], str] = {"split": "split", "value": "" if column is None else code(column)}
    keys = {key: head for key, head in keys.items() if all(key in group for group in groups)}
    numbers: Sequence[Literal["scored", "dropped", "threshold", "scale", "sum"]] = (
        ("scored", "threshold", "scale", "sum") if weighted else ("scored", "dropped", "threshold")
    )
    lines = [
        [*(code(shown(group[key], LONGEST)) for key in keys), *(number(group[name]) for name in numbers)]
        for group in groups[:MOST_GROUPS]
    ]
    if rest := groups[MOST_GROUPS:]:
        sums = [
            None if name == "threshold" or name == "scale" else sum(group[name] for group in rest) for name in numbers
        ]
        lines.append([f"others: {len(rest):,}", *[""] * (len(keys) - 1), *map(number, sums)])
    words = "Each split" if column is None else f"Each group of rows with the same {code(column)}"
    words += " in each split" if len(keys) == 2 else ""
    parts = [
        f"{words} was {'weighted' if weighted else 'cut'} on its own:",
        table([*keys.values(), *(f":{name}" for name in numbers)], lines),
    ]
    if figures["spared"]:
        parts.append(f"Kept so that no group is emptied: {many(figures['spared'], 'row')}.")
    return "\n\n".join(parts)


def _contents(report: Report, where: str) -> str:
    """The rows, how to load them, and what the columns mean."""
    rows, to = report["rows"], report["to"]
    there, calls = _by(report["files"], "config"), load_calls(report, where)
    lines = []
    for name, call in calls.items():
        if name not in there:
            call = "not in this dataset"
        elif rows[name]:
            call = code(call)
        else:
            call = code(
                f"{call[:-1]}, streaming=True)"
            )  # without streaming, `datasets` raises for a split without rows
        if name in there or rows[name]:
            lines.append([name, f"{rows[name]:,}", call])
    lines.append(["total", f"{rows['total']:,}", ""])
    parts = ["## What is here", table(["", ":rows", "load with"], lines)]
    if is_one_file(report):
        parts.append("The kept rows are the file beside this folder. Here `path` is that file's.")
    if to in OF_LINES:
        parts.append(_lines(report))
    if to == "arrow" and where == "path" and not is_one_file(report):
        parts.append("`load_from_disk(path)` maps the kept rows into memory without a copy.")
    if to not in OF_LINES or report["with_scores"]:
        parts.append(_columns(report))
    if stored := ", ".join(code(name) for name in report["json_columns"]):
        parts.append(
            f"The values of {stored} have no common type, so they are stored as JSON. `datasets` decodes them where it "
            "can; where it gives text, decode it with `json.loads`."
        )
    if features := ", ".join(code(name) for name in report.get("json_features", [])):
        parts.append(
            f"Because of {features}, it takes `datasets` 4.7 or later to open these files. With `--json-as text` every "
            "version opens them."
        )
    return "\n\n".join(parts)


def _lines(report: Report) -> str:
    """What lines of JSON hold, and what can go wrong with them."""
    in_array = report["to"] == "json"
    words = f"Each line{' of the arrays' if in_array else ''} is the line of the input, byte for byte"
    added = (
        ["its scores"] * report["with_scores"]
        + ["its percentile"] * report.get("percentile", False)
        + ["its weight"] * bool(report.get("weights"))
    )
    words += f", with {' and '.join(added)} added at the end." if added else "."
    if named := _named(report):
        words += f" {named} also `{ROW}` is added: the row's file and line in the input."
    words += " `load_dataset` reads dates in text as timestamps."
    if in_array:
        words += " Its version 4.7 can't load an array whose rows have different keys; earlier and later ones can."
    if _has_errors(report):
        if in_array:
            words += " A line in `errors` that is not JSON is text in `sqsd_raw`."
        else:
            words += " It fails if a line in `errors` is not JSON."
        words += f" `{_own_path(report, REASONS_FILE)}` has the file, line, status and reason of each line in `errors`."
    return words


def _named(report: Report) -> str:
    """Where rows say where they come from, in words; "" where none do."""
    there = {file["config"] for file in report["files"]}
    where = [f"`{config}`" for config in ("dropped", "errors") if config in there]
    if report.get("rows_column"):
        return "Everywhere"
    return f"In {' and '.join(where)}" if where else ""


def _has_errors(report: Report) -> bool:
    return any(file["config"] == "errors" for file in report["files"])


def _columns(report: Report) -> str:
    pack = report.get("pack")
    probes = pack["weights"] if pack else {}
    total = " ".join(f"{weight:+g} × {code(f'sqsd_{name}')}" for name, weight in probes.items() if weight)
    lines = [("`sqsd_risk`", f"the risk: no unit, higher is riskier{f'; {total}' if total else ''}")]
    for name in probes:
        if pack and name in pack.get("linear", []):
            what = f"the pack's risk {code(name)}, a linear probe of hidden states"
        elif not (is_sqsd(report) or is_linear(report)):
            what = f"{code(name)}, as the scorer computes it"
        else:
            what = f"cosine of the row's update with the direction {code(name)}, summed over the layers"
        lines.append((code(f"sqsd_{name}"), what))
    for each in report["consensus"]["packs"] if report.get("consensus") else ():
        whose = _pack(each["pack"]) if each["pack"] else "one of the packs"
        lines.append((code(each["column"]), f"the risk by {whose}"))
    if report.get("percentile"):
        lines.append((code(PERCENTILE), "percent of the pack's benign reference rows with a lower risk"))
    if report.get("weights"):
        lines.append(("`sqsd_weight`", "the row's weight"))
    lines.append(("`sqsd_status`", "`scored`, or why there is no score"))
    if named := _named(report):
        lines.append((f"`{ROW}`", f"{named.lower()}: the row's file and line in the input"))
    if report["to"] not in OF_LINES and _has_errors(report):
        lines += ERROR_COLUMNS
    return f"The columns of the input are unchanged. These are added:\n\n{table(['column', 'what it holds'], lines)}"


def _origin(report: Report, sources: Sequence[Original]) -> str:
    parts = ["## How it was made"]
    if datasets := report.get("datasets"):
        parts += ["The rows come from the Hub:", "\n".join(f"- {_dataset(dataset)}" for dataset in datasets)]
    if ours := ", ".join(code(source.name) for source in sources if source.ours):
        parts.append(f"Filtered before by this tool: {ours}. Of its card, only the cards of its own sources are below.")
    if command := report.get("command"):
        parts += ["The command:", fenced(shlex.join(command), "sh")]
    own = f"`{_own_path(report, REPORT_FILE)}`"
    parts.append(f"{own} holds the settings, the inputs with their hashes, and the versions of the run.")
    return "\n\n".join(parts)


def _own_path(report: Report, name: str) -> str:
    return own_path(name, in_file=is_one_file(report))


def _dataset(dataset: HubDataset) -> str:
    parts: dict[Literal["config", "split", "revision"], str] = {
        "config": "config",
        "split": "split",
        "revision": "commit",
    }
    named = [f"{shown} {code(value)}" for name, shown in parts.items() if (value := dataset.get(name))]
    return ", ".join([code(dataset["id"]), *named])


def _licence(sources: Sequence[Original]) -> str:
    look = "Look it up before you use or share these rows."
    if not sources:
        return f"## Licence\n\nThe licence of the source is not known here. {look}"
    lines = []
    for source in sources:
        more = [code(v) for name in ("license_name", "license_link") for v in source.fields.get(name, [])]
        licences = ", ".join([*(code(licence) for licence in source.licences), *more])
        lines.append(f"- {code(source.name)}: {licences or f'not known here. {look}'}")
    return "\n\n".join(["## Licence", "The rows have the licence of their source:", "\n".join(lines)])


def _ids(report: Report) -> list[str]:
    return list(dict.fromkeys(dataset["id"] for dataset in report.get("datasets") or []))


def _by(files: Sequence[WrittenFile], what: Literal["config", "split"]) -> dict[str, list[WrittenFile]]:
    files_by: dict[str, list[WrittenFile]] = {}
    for file in files:
        files_by.setdefault(file[what], []).append(file)
    return files_by
