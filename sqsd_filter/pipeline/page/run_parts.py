"""The sections on a run, from its report and the notes on its rows: its rows and risks, and how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from sqsd_filter.pictures import BLUE, ORANGE, plain
from sqsd_filter.pipeline.meaning import by_length, depends_on_length, origin
from sqsd_filter.pipeline.page.answer import headline
from sqsd_filter.pipeline.page.notes import MOST_ROWS, Lengths, ModuleMeans, Notes, UnscoredRow, length_figures
from sqsd_filter.pipeline.page.parts import Plot, Section, Table
from sqsd_filter.pipeline.report import Report, is_linear, is_sqsd, risk_name
from sqsd_filter.pipeline.writing.figures import number, shown
from sqsd_filter.pipeline.writing.histogram import FAR, draw_histogram
from sqsd_filter.wording import many

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_GROUPS = 50
MOST_INPUTS = 20
LONGEST = 120  # characters of a value in a table


def histogram(report: Report, notes: Notes) -> Plot:
    draw = partial(draw_histogram, bars=notes["histogram"], report=report)
    behind = " Behind it the pack's reference rows." if notes["histogram"].get("reference") else ""
    return Plot("risk", f"Histogram of the risk. {headline(report)}.{behind}", draw)


def risks(report: Report) -> Section:
    if is_sqsd(report):
        words = ["The risk has no unit. A row with a higher risk pushes the model further."]
    elif is_linear(report):
        words = ["The risk has no unit. A row with a higher risk is more like known unsafe rows."]
    else:
        words = ["A row with a higher risk is riskier by this measure."]
    reference, quantiles = report.get("reference", {}), report["risk_quantiles"]
    head, columns = ["quantile", ":these rows"], [quantiles]
    if "benign" in reference:
        words.append(origin(reference))
        head, columns = [*head, ":benign reference"], [*columns, reference["benign"]["quantiles"]]
    if "unsafe" in reference:
        head, columns = [*head, ":known unsafe"], [*columns, reference["unsafe"]["quantiles"]]
    rows = [[q, *(f"{column[q]:.3g}" if q in column else "" for column in columns)] for q in quantiles]
    tables = [Table(head, rows)] if quantiles else []
    return Section("quantiles", "Risk in numbers", words, tables=tables, folded=True)


def lengths(report: Report, notes: Notes) -> Section:
    answers, length = notes["lengths"], length_figures(notes)
    said = by_length(length)
    if answers is None or length is None:
        return Section("length", "Risk and length", [said], folded=True)
    warns = depends_on_length(length)
    words = [f"Measured on {many(answers['rows'], 'row')}; the length of an answer is in characters."]
    if warns:
        words.append("Check whether the riskiest rows are risky for what they say, and not only for how long they are.")
    else:
        words.insert(0, said)
    axis = risk_name(report) + (" (no unit)" if is_sqsd(report) or is_linear(report) else "")
    plot = Plot("length", f"Risk against the length of the answer. {said}", partial(_draw_lengths, answers, axis))
    hint = "" if answers["spearman"] is None else f"rank correlation {answers['spearman']:.2f}"
    return Section("length", "Risk and length", words, said if warns else "", [plot], folded=True, hint=hint)


def _draw_lengths(answers: Lengths, axis: str, figure: Figure) -> None:
    """Rows as points, and their quartiles of risk by length."""
    from matplotlib.ticker import StrMethodFormatter

    axes = figure.add_subplot()
    length, risk = np.array([point[:2] for point in answers["points"]], np.float64).T.clip(-FAR, FAR)
    dropped = np.array([point[2] for point in answers["points"]], bool)
    for colour, marker, name, which in ((BLUE, "o", "kept", ~dropped), (ORANGE, "^", "dropped", dropped)):
        if which.any():
            label = name if dropped.any() else "rows"
            axes.scatter(length[which], risk[which], s=28, c=colour, marker=marker, alpha=0.8, lw=0, label=label)
    at, *quartiles = np.array(answers["bands"], np.float64).T.clip(-FAR, FAR)
    if len(at) > 1:
        low, median, high = quartiles
        axes.fill_between(at, low, high, color="black", alpha=0.15, lw=0, label="quartiles")
        axes.plot(at, median, color="black", lw=1.5, label="median")
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(left=0 if length.min() <= 10 else 0.8 * length.min())
    axes.set_xlabel("length of the answer (characters)", fontsize=13)
    axes.set_ylabel(plain(axis), fontsize=13)
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=4, fontsize=13, frameon=False)


def modules(notes: Notes) -> list[Section]:
    """A heat map for each probe whose cosines at each module were kept."""
    if not notes["modules"]:
        return []
    plots: list[Plot] = []
    for name, means in notes["modules"].items():
        layers = len({layer for layer, _ in means["places"]})
        alt = f"Mean cosine with the direction {name} by layer and module type, over all rows and over the riskiest"
        plots.append(Plot(f"modules-{len(plots)}", alt, partial(_draw_modules, name, means), height=2.6 + layers / 9))
    words = [
        "The mean cosine of a row's update with each direction, by layer and type of module: over all rows with a "
        f"risk, and over the {MOST_ROWS} riskiest.",
    ]
    return [Section("modules", "Modules", words, plots=plots, folded=True)]


def _draw_modules(name: str, means: ModuleMeans, figure: Figure) -> None:
    """One panel for all rows, one for the riskiest, in the same colours: layers upwards, module types side by side."""
    import matplotlib

    layers, kinds = (list(dict.fromkeys(values)) for values in zip(*means["places"], strict=True))
    layers.sort(key=lambda layer: -1 if layer is None else layer)
    where = tuple(np.array([(layers.index(layer), kinds.index(kind)) for layer, kind in means["places"]]).T)
    sides: tuple[Literal["all", "riskiest"], ...] = ("all", "riskiest")
    most = max(1e-9, *(abs(value) for side in sides for value in means[side]))
    short = [kind.rpartition(".")[2] for kind in kinds]
    names = [plain(kind if short.count(last) > 1 else last) for kind, last in zip(kinds, short, strict=True)]
    colours = matplotlib.colormaps["RdBu_r"].resampled(41)  # with more colours, the colour bar would be an image
    both = figure.subplots(1, 2, sharey=True)
    for axes, side in zip(both, sides, strict=True):
        grid = np.full((len(layers), len(kinds)), np.nan)
        grid[where] = means[side]
        image = axes.pcolormesh(grid, cmap=colours, vmin=-most, vmax=most)
        axes.set_title(f"{side} rows", fontsize=12)
        axes.set_xticks(np.arange(len(kinds)) + 0.5, names, rotation=90)
    step = -(-len(layers) // 16)
    labels = ["none" if layer is None else str(layer) for layer in layers[::step]]
    both[0].set_yticks(np.arange(len(layers))[::step] + 0.5, labels)
    both[0].set_ylabel("layer", fontsize=12)
    figure.colorbar(image, ax=both, fraction=0.05)
    figure.suptitle(f"mean cosine with {plain(name)} (no unit)", fontsize=13)


def errors(report: Report, notes: Notes) -> list[Section]:
    rows = [
        [status, number(count), "; ".join(f"{_where(each)}: {each['why']}" for each in notes["errors"][status])]
        for status, count in report["unscored"].items()
    ]
    if not rows:
        return []
    words = ["These rows could not be scored. Their risk is unknown."]
    table = Table(["reason", ":rows", "first rows"], rows)
    hint = f"{sum(report['unscored'].values()):,}"
    return [Section("errors", "Rows without a risk", words, tables=[table], folded=True, hint=hint)]


def _where(row: UnscoredRow) -> str:
    return f"{row['file']}, line {row['line']}"


def groups(report: Report) -> list[Section]:
    """The groups that were cut on their own, the largest first."""
    if not (figures := report.get("groups")):
        return []
    largest = sorted(figures["groups"], key=lambda group: -group["scored"])
    keys: dict[Literal["split", "value"], str] = {"split": "split", "value": figures["column"] or ""}
    keys = {key: head for key, head in keys.items() if largest and key in largest[0]}
    numbers: Sequence[Literal["scored", "dropped", "threshold", "scale", "sum"]] = (
        ("scored", "threshold", "scale", "sum") if report.get("weights") else ("scored", "dropped", "threshold")
    )
    rows = [
        [*(shown(group[key], LONGEST) for key in keys), *(number(group[name]) for name in numbers)]
        for group in largest[:MOST_GROUPS]
    ]
    words = [f"Not shown: {many(len(largest) - MOST_GROUPS, 'smaller group')}."] if len(largest) > MOST_GROUPS else []
    if figures["spared"]:
        words.append(f"Kept so that no group is emptied: {many(figures['spared'], 'row')}.")
    title = "Splits" if figures["column"] is None else "Groups"
    table = Table([*keys.values(), *(f":{name}" for name in numbers)], rows)
    return [Section("groups", title, words, tables=[table], folded=True, hint=f"{len(largest):,}")]


def settings(report: Report) -> Section:
    """How the run was made: the pack, the inputs, every setting and its origin, and the versions."""
    tables = [Table(["pack", ""], _about(report))]
    inputs = report["inputs"]
    files = [
        [shown(file["path"], LONGEST), number(file["rows"]), number(file["bytes"]), file["blake2b"][:16]]
        for file in inputs[:MOST_INPUTS]
    ]
    tables.append(Table(["input", ":rows", ":bytes", "BLAKE2b"], files))
    words = [f"{many(len(inputs) - MOST_INPUTS, 'more input')} in report.json."] if len(inputs) > MOST_INPUTS else []
    if command := report.get("command"):
        words.insert(0, f"The command: {shlex.join(command)[:2000]}")
    if known := report["settings"]:
        values = {name: "" if s["value"] is None else shown(s["value"], LONGEST) for name, s in known.items()}
        rows = [[name, value, known[name]["origin"]] for name, value in values.items()]
        tables.append(Table(["setting", "value", "from"], rows))
    tables.append(Table(["version of", ""], [[name, text] for name, text in report["versions"].items()]))
    return Section("settings", "How it was made", words, tables=tables, folded=True)


def _about(report: Report) -> list[Sequence[str]]:
    packs = [each["pack"] for each in report["consensus"]["packs"]] if report.get("consensus") else [report.get("pack")]
    rows: list[Sequence[str]] = []
    for pack in packs:
        if pack:
            total = " ".join(f"{weight:+g} × {name}" for name, weight in pack["weights"].items() if weight)
            rows += [("name", pack["name"]), ("fingerprint", pack["fingerprint"]), ("base model", pack["base_model"])]
            rows += [(f"risk {pack['risk']}" if pack.get("risk") else "risk", total)]
            rows += [("shared state", pack.get("shared_state") or "none: each direction has its own")]
        else:
            rows.append(("name", "not known: the scores were in the input"))
    facts: dict[Literal["dtype", "device", "max_length", "format"], str]
    facts = {"dtype": "dtype", "device": "device", "max_length": "maximum tokens per row", "format": "rows read as"}
    return rows + [(name, shown(report[key], LONGEST)) for key, name in facts.items() if report.get(key) is not None]
