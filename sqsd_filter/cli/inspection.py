"""The tables that `pack inspect` and `pack convert` print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqsd_filter.cli import output
from sqsd_filter.scoring.reference_rows import BENIGN, Pool, Reference, ReferenceRecord

Row = Sequence[str]
_SHOWN_LEVELS = ("50%", "95%", "99%", "99.9%", "100%")


def inspection(report: Mapping[str, Any], *, modules: bool) -> str:
    """A pack as tables; with `modules` the norm of every module."""
    base, linear = report["base"], report["linear"]
    lines = [f"{report['name']}   {report['fingerprint']}   {report['path']}"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    aligned = f", with the adapter '{base['adapter']}' merged in" if base["adapter"] else ""
    lines.append(f"base      {base['model']}{revision}{aligned}")
    template = report["chat_template_kwargs"]
    lines.append(f"rows      up to {report['max_length']:,} tokens" + (f", {json.dumps(template)}" if template else ""))
    shared = "; shared state" if report["shared_state"] else ""
    if linear is None:
        states = "; ".join(_pass(state) for state in report["states"])
        lines.append(f"passes    {len(report['states'])} per row{shared}: {states}")
        shown = ("probe", "weight", "direction", "state", "modules", "cos to state", "steers")
        lines += ["", *_table(shown, _probes(report))]
    else:
        lines += ["passes    forward only, 1 per row", "", *_linear(linear)]
    others = {name: risk for name, risk in report["risks"].items() if name != report["risk"]}
    lines += [_risk(name, risk, beside=name in report["beside"]) for name, risk in others.items()]
    adapters = report["adapters"]
    shape = ("adapter", "role", "rank", "α/r", "modules", "layers", "size", "‖V‖")
    lines += ["", *_table(shape, (_adapter(name, a) for name, a in adapters.items()))]
    lines += ["", *_table(("adapter", "trained on", "licence"), (_origin(name, a) for name, a in adapters.items()))]
    if linear is None:
        lines += ["", *_norms("type", adapters), "", *_norms("layer", adapters)]
    if modules:
        lines += ["", *_modules(adapters)]
    if report["cosines"]:
        columns = ("directions", "modules", "cos", "mean of cos_m", "sum of cos_m")
        lines += ["", *_table(columns, (_cosine(pair) for pair in report["cosines"]))]
    lines += ["", *_validation(report["validation"]), "", *_reference(report), ""]
    lines += [f"! {flag['code']}: {flag['message']}" for flag in report["flags"]] or ["no flags"]
    return "\n".join(lines)


def reference(record: ReferenceRecord) -> list[str]:
    """The reference rows of a pack as a table of risks, one line per corpus and one for all benign rows."""

    def line(name: str, kind: str, pool: Pool, licence: str = "-") -> Row:
        quantiles = pool.quantiles()
        risks = (f"{quantiles[level]:.2f}" if level in quantiles else "-" for level in _SHOWN_LEVELS)
        return name, kind, f"{pool.rows:,}", *risks, licence

    corpora = record["corpora"]
    lines = [line(each["name"], each["kind"], Pool.of([each]), each.get("licence", "-")) for each in corpora]
    lines.append(line("all benign", BENIGN, Reference("", record).benign))
    return _table(("reference", "kind", "rows", *(f"risk {level}" for level in _SHOWN_LEVELS), "licence"), lines)


def _reference(report: Mapping[str, Any]) -> list[str]:
    """The pack's reference, or how to add one."""
    known = report["reference"]
    if known["record"] is None:
        return [
            "reference none: run sqsd-filter pack calibrate on the pack, so that runs say what a risk means and "
            "--above-reference can cut"
        ]
    return [*reference(known["record"]), *([known["mismatch"]] if known["mismatch"] else [])]


def conversion(report: Mapping[str, Any]) -> str:
    """The share of a checkpoint's change that was kept, and the kinds of tensors that an adapter can't hold."""
    rank, modules = report["rank"], report["modules"]
    ranks = f"rank {rank['min']}" if rank["min"] == rank["max"] else f"ranks {rank['min']} to {rank['max']}"
    lines = [
        f"{report['path']}: {report['checkpoint']} minus {report['base']} in {len(modules):,} modules, {ranks}",
        f"  energy kept  {report['energy']:.1%} of ‖D‖² in them, {min(m['energy'] for m in modules.values()):.1%} to "
        f"{max(m['energy'] for m in modules.values()):.1%} per module; --json lists each",
        f"  they are     {report['linear_share']:.1%} of ‖θ - θ0‖², whose root is {report['norm']:.4g}",
    ]
    for kind, lost in report["not_held"].items():
        count, share = len(lost["tensors"]), lost["share"]
        lines.append(f"  not held     {share:.2%} in {kind} ({count:,} tensor{'s' * (count != 1)})")
    if report["unchanged"]:
        lines.append(f"  unchanged    {len(report['unchanged']):,} modules, left out")
    if report["unmatched"]:
        lines.append(
            f"  not compared, because they are in one model only or differ in shape: {', '.join(report['unmatched'])}"
        )
    return "\n".join(lines)


def _pass(state: Mapping[str, Any]) -> str:
    scaling = "its own scaling" if state["scaling"] is None else f"scaling {state['scaling']:g}"
    return f"{', '.join(state['probes'])} at '{state['adapter']}' ({scaling})"


def _probes(report: Mapping[str, Any]) -> Iterator[Row]:
    for p in report["probes"]:
        n = p["modules"]
        cover = f"{n['common']:,} of {n['direction']:,} and {n['state']:,}"
        steers = {None: "outdated" if p["steering_outdated"] else "not tried", True: "yes", False: "no"}[p["steers"]]
        cosine = _number(p["cosine_to_state"]["global"], "+.3f")
        yield p["name"], f"{p['weight']:+g}", p["direction"], p["state"], cover, cosine, steers


def _risk(name: str, risk: Mapping[str, Any], *, beside: bool) -> str:
    if "layers" in risk:
        read = f", read beside the pack's own as sqsd_{name}; alone with" if beside else ":"
        return f"risk '{name}' is a linear probe of {_layers(risk['layers'])}{read} --risk {name}"
    total = " ".join(f"{p['weight']:+g} {p['name']} ('{p['direction']}' at '{p['state']}')" for p in risk["probes"])
    return f"risk '{name}' is {total}: --risk {name}"


def _layers(layers: Sequence[int]) -> str:
    return f"hidden states in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def _linear(linear: Mapping[str, Any]) -> list[str]:
    """A linear probe, and how it scores unsafe sources that it was not fitted on: each source against each other."""
    norms = ", ".join(f"{norm:.4g}" for norm in linear["norms"])
    lines = [
        f"'{linear['name']}' is a linear probe of {_layers(linear['layers'])}: {linear['weights']:,} weights of norm "
        f"{norms} per layer, bias {linear['bias']:.4g}."
    ]
    if (record := linear["record"]) is None:
        return lines
    settings, found = record["settings"], record["held_out"]
    origin = "; ".join([", ".join(_data(record["data"])), *([record["licence"]] if record["licence"] else [])])
    lines.append(
        f"It is fitted on {record['rows']:,} rows of up to {settings['max_length']:,} tokens, ridge "
        f"{settings['ridge']:g} ({origin}). Each unsafe source as scored by fits without it:"
    )
    others = list(dict.fromkeys(other for each in found for other in each["auc"]))
    rows = [
        (other, *(f"{each['auc'][other]:.3f}" if other in each["auc"] else "-" for each in found)) for other in others
    ]
    rows.append(("above 99 % of all", *(f"{each['above']:.1%}" for each in found)))
    return [*lines, *_table(("AUC against", *(f"{each['source']} ({each['rows']:,})" for each in found)), rows)]


def _adapter(name: str, a: Mapping[str, Any]) -> Row:
    ranks, scalings = a["rank"], [f"{s:g}" for s in a["scaling"]]
    return (
        name,
        ", ".join(a["roles"]),
        str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        scalings[0] if len(scalings) == 1 else f"{scalings[0]} to {scalings[-1]}",
        f"{a['modules']:,}",
        f"{a['layers']:,}",
        f"{a['bytes'] / 1e6:,.1f} MB",
        _number(a["norm"], ".4g"),
    )


def _origin(name: str, a: Mapping[str, Any]) -> Row:
    origin = a["provenance"] or {}
    counts = (f"{origin[what]:,} {what}" for what in ("rows", "steps") if isinstance(origin.get(what), int))
    return name, ", ".join([*_data(origin.get("data")), *counts]) or "-", str(origin.get("licence") or "-")


def _data(data: object) -> list[str]:
    """The data of an adapter: a text, a dataset of the Hub, files, or the list that a linear probe has."""
    if isinstance(data, list):
        names = dict.fromkeys(name for each in data for name in _data(each.get("data")))
        return [*names, f"{sum(len(each.get('sources', ())) for each in data)} sources"]
    if not isinstance(data, dict):
        return [str(data)] if data else []
    match data:
        case {"dataset": {"id": name, "revision": str(revision)}}:
            return [f"{name}@{revision[:12]}"]
        case {"dataset": {"id": name}} | {"file": name}:
            return [str(name)]
        case {"files": [{"path": first}, *others]}:
            return [f"{first} and {len(others)} more" if others else str(first)]
    return []


def _norms(what: str, adapters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Minimum, median and maximum of ‖V_m‖: one row per kind of module, one column per adapter."""
    summaries = [a[f"by_{what}"] for a in adapters.values()]
    kinds = list(dict.fromkeys(kind for norms in summaries for kind in norms))
    rows = [[str(kind), *(_spread(norms.get(kind)) for norms in summaries)] for kind in kinds]
    return _table((f"‖V_m‖ by {what}", *(f"{name}: min, median, max" for name in adapters)), rows)


def _spread(norms: Mapping[str, Any] | None) -> str:
    return " ".join(f"{_number(norms[k], '.4f'):>7}" for k in ("min", "median", "max")) if norms else "-"


def _modules(adapters: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(m for a in adapters.values() for m in a["norms"]))
    rows = [[m, *(_number(a["norms"].get(m), ".6f") for a in adapters.values())] for m in names]
    return _table(("module", *adapters), rows)


def _cosine(pair: Mapping[str, Any]) -> Row:
    numbers = (_number(pair["global"], "+.4f"), _number(pair["mean"], "+.4f"), _number(pair["sum"], "+.3f"))
    return ", ".join(pair["directions"]), f"{pair['modules']:,}", *numbers


def _validation(validation: object) -> list[str]:
    done = ", ".join(validation) if isinstance(validation, dict) else ""
    return [f"validated {done} (figures with --json)" if done else "validated nothing yet"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(head: Row, rows: Iterable[Row]) -> list[str]:
    """Lines with aligned columns: numbers to the right, texts to the left."""
    body = list(rows)
    texts = [k for k in range(len(head)) if not all(_numeric(row[k]) for row in body)]
    return output.aligned([head, *body], left=texts)


def _numeric(cell: str) -> bool:
    return cell.replace(" MB", "").replace(" ", "").replace(",", "").replace(".", "").strip("+-e").isdigit()
