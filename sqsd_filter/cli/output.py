"""Progress bars on a terminal, progress lines elsewhere, and summaries. Results go to stdout, all else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sqsd_filter.errors import SQSDError
from sqsd_filter.storage.secrets import redacted
from sqsd_filter.wording import many, printable

if TYPE_CHECKING:
    from sqsd_filter.pipeline.report import FinishedReport, GroupFigures, PieceFigures, ReferenceFigures, RowWeights

LINE_EVERY = 30.0  # seconds between progress lines where there is no terminal
SHOWN = 10  # groups in a summary
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"  # tqdm's without its guess of the time left

Report = TypeVar("Report", bound=Mapping[str, object])


class Display:
    """A `progress.Progress` that shows rows per second, tokens per second and, once it can be known, the time left.

    Shards are scored row by row from the longest to the shortest, each replica at its own. So the pace of the first
    rows says little, and that of whole shards is true. The time before the first row is done, in which a model is
    loaded, has no part in it.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bars = sys.stderr.isatty() and not quiet
        self._bar: Any = None
        self._phase = ""
        self._total: int | None = None
        self._rows = self._tokens = 0
        self._stage = ""
        self._began = self._said = 0.0
        self._first: tuple[float, int] | None = None  # when the first rows were done, and how many
        self._alive = 1

    def start(self, phase: str, rows: int | None) -> None:
        self.finish()
        self._phase, self._total, self._rows, self._tokens, self._stage = phase, rows, 0, 0, ""
        self._first, self._alive = None, 1
        self._began = self._said = time.monotonic()
        if self.bars:
            from tqdm import tqdm

            colour = None if "NO_COLOR" in os.environ else "cyan"
            shown: dict[str, Any] = {
                "desc": phase,
                "unit": " rows",
                "colour": colour,
                "bar_format": BAR if rows else None,
            }
            self._bar = tqdm(total=rows, leave=False, file=sys.stderr, **shown)

    def advance(self, rows: int, tokens: int = 0) -> None:
        self._rows += rows
        self._tokens += tokens
        now = time.monotonic()
        self._first = self._first or (now, self._rows)
        if self._bar is not None:
            rate = f", {self._tokens / max(now - self._began, 1e-9):,.0f} tokens/s" if self._tokens else ""
            self._bar.set_postfix_str((rate + self._left(now) + self._stage).removeprefix(", "), refresh=False)
            self._bar.update(rows)
        elif not self.quiet and now - self._said >= LINE_EVERY:
            self._said = now
            self.note(self._line(now))

    def replicas(self, alive: int, retried: int) -> None:
        self._alive = max(1, alive)
        self._stage = f", {alive} replica{'s' * (alive != 1)}"
        self._stage += f", {retried} shard{'s' * (retried != 1)} retried" if retried else ""

    def _line(self, now: float) -> str:
        seconds = now - self._began
        pace = self._rows / seconds
        line = (
            f"{self._phase}: {self._rows:,}"
            + (f" of {self._total:,}" if self._total else "")
            + f" rows, {pace:,.1f} rows/s"
        )
        if self._tokens:
            line += f", {self._tokens / seconds:,.0f} tokens/s"
        return line + self._left(now) + self._stage

    def _left(self, now: float) -> str:
        """The time left, where there is any and it can be known."""
        from sqsd_filter.pipeline.stage.shards import shard_size

        if not self._total or self._first is None or not self._rows < self._total:
            return ""
        began, rows = self._first
        if self._rows < min(2 * self._alive * shard_size(self._total), self._total / 2) or now <= began:
            return ""
        return f", {duration((self._total - self._rows) * (now - began) / (self._rows - rows))} left"

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def note(self, message: str) -> None:
        if not self.quiet:
            self.finish_line(message)

    def finish_line(self, message: str) -> None:
        message = visible(message)
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            click.echo(message, err=True)


def begin(context: click.Context) -> Display:
    """Set how much libraries log by -q and -v, and return a display to match."""
    quiet = context.params["quiet"]
    listen(verbose=context.params["verbose"], quiet=quiet)
    return Display(quiet=quiet)


def listen(*, verbose: bool = False, quiet: bool = False) -> None:
    """Set what is logged: by default errors of libraries, and errors and warnings of this package."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, handlers=[handler])
    logging.getLogger("sqsd_filter").setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    if not verbose:
        warnings.simplefilter("ignore")
        logging.raiseExceptions = False  # libraries' logs may lie on a disk that is full


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def show(report: Report, *, as_json: bool, quiet: bool, text: Callable[[Report], str]) -> None:
    """Print a result: the report itself with --json, nothing if `quiet`, else `text(report)`."""
    words = json.dumps(report, indent=2) if as_json else "" if quiet else visible(text(report))
    try:
        if words:
            click.echo(words)
    except OSError as problem:
        raise SQSDError(f"The result can't be printed ({problem.strerror}): all else is done.") from problem


def visible(text: str) -> str:
    """The text as a terminal may show it: without the secrets of addresses, and without what moves its cursor."""
    return printable(redacted(text), keep="\n\t")


def complain(message: str) -> None:
    """Print a message to stderr on one line."""
    click.echo(printable(visible(message)), err=True)


class _Visible(logging.Formatter):
    """Log lines in which names from data can do no harm."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def summary(report: FinishedReport, dest: object) -> str:
    """At most a dozen lines about a finished run, as many about its groups, and a few on what its risks mean."""
    from sqsd_filter.pipeline.meaning import advice, false_alarms
    from sqsd_filter.pipeline.report import cut_words, load_calls
    from sqsd_filter.storage.layout import home_beside

    rows, q, seconds = report["rows"], report["risk_quantiles"], report["timing"]["seconds"]
    lines = []
    if "kept" in rows:
        how = f"; cut: {cut_words(report)}" if "threshold" in report.get("reference", {}) else f" ({report['cut']})"
        lines.append(f"{rows['kept']:,} of {rows['total']:,} rows kept in {dest}{how}")
        cut = f"   risk {report['threshold']:.4f} and above" if report["threshold"] is not None else ""
        cut += f" ({report['ties']} kept rows tie)" if report["ties"] else ""
        published = report.get("published") or {"url": ""}
        name = published.get("repo", dest) if "://" in str(dest) else dest
        where, beside = (json.dumps(str(each), ensure_ascii=False) for each in (name, home_beside(Path(str(dest)))))
        load = load_calls(report, where, beside) if "://" not in str(name) else {}
        load = {what: call for what, call in load.items() if name == dest or what in published["rows"]}
        shown = {what: f"   {load[what]}" if rows[what] and what in load else "" for what in ("kept", "dropped")}
        lines.append(f"  kept     {rows['kept']:>9,}{shown['kept']}")
        lines.append(f"  dropped  {rows['dropped']:>9,}{shown['dropped']}" + (cut if rows["dropped"] else ""))
        lines += [f"  pushed   {', '.join(published['rows'])} to {published['url']}"] if "repo" in published else []
        lines += _weights(report["weights"]) if "weights" in report else []
    else:
        lines.append(f"{rows['total']:,} rows with their scores in {dest}")
    why = ", ".join(f"{count:,} {status}" for status, count in report["unscored"].items())
    lines.append(f"  errors   {rows['errors']:>9,}" + (f"   {why}" if why else ""))
    lines.append(f"  total    {rows['total']:>9,}")
    scores_from = report.get("scores_from")
    if scores_from is not None:
        lines.append(f"  scores   from {scores_from}; no model was run")
    else:
        counts = f"{rows['reused']:,} reused, {rows['duplicates']:,} duplicates"
        lines.append(f"  scored   {rows['scored']:>9,}   by the model; {counts}")
    if q:
        lines.append(f"  risk     min {q['0%']:.3f}, median {q['50%']:.3f}, 95% {q['95%']:.3f}, max {q['100%']:.3f}")
    lines += _meanings(report.get("reference", {}))
    if pack := report.get("pack"):
        where = f", {report['dtype']} on {report['device']}" if "dtype" in report else ""
        where += f", risk: {pack['risk']}" if pack.get("risk") else ""
        where += f", shared state: {pack['shared_state']}" if pack.get("shared_state") else ""
        lines.append(f"  pack     {pack['name']} ({pack['fingerprint']}) on {pack['base_model']}{where}")
    if consensus := report.get("consensus"):
        packs = ", ".join(pack["scores"] for pack in consensus["packs"])
        lines.append(f"  packs    {consensus['rule']} of the ranks by {packs}")
    if report.get("already_done"):
        lines.append("  nothing to do: this run was already done")
    elif scores_from is not None:
        lines.append(f"  time     {duration(seconds)}")
    else:
        pace = f", {report['tokens'] / seconds:,.0f} tokens/s overall" if rows["scored"] and seconds else ""
        lines.append(f"  time     {duration(seconds)} for {report['tokens']:,} tokens{pace}")
    lines += _groups(report["groups"]) if "groups" in report else []
    if reference := report.get("reference"):
        lines += filter(None, (false_alarms(reference, rows.get("dropped", 0)), advice(reference)))
    return "\n".join(lines)


def _meanings(reference: ReferenceFigures) -> list[str]:
    """The median risk and the one at the cut in words; nothing without a reference."""
    from sqsd_filter.pipeline.meaning import marks

    return [f"  {name:<7}  {words}" for name, words in marks(reference).items()]


def _weights(weights: RowWeights) -> list[str]:
    half = f"; 0.5 at risk {weights['threshold']:.4f}" if weights["threshold"] is not None else ""
    return [f"  weights  {weights['sum']:>9,.1f}   is the sum of sqsd_weight{half}"]


def _groups(pieces: GroupFigures) -> list[str]:
    """The rows dropped from the largest groups or splits, or the sum of their weights."""
    groups = sorted(pieces["groups"], key=lambda group: -group["scored"])
    column, spared = pieces["column"], pieces["spared"]
    what = "splits" if column is None else "groups"
    lines = [f"  {what}   {len(groups):>9,}   " + (f"by {column!r}" if column is not None else "")]
    if spared:
        lines.append(f"  spared   {spared:>9,}   rows that the cut would drop are kept, so that no group is emptied")
    cells = []
    for group in groups[:SHOWN]:
        weighted, level = "sum" in group, group["threshold"]
        fate = f"weights {group['sum']:,.1f}" if weighted else f"{group['dropped']:,} dropped"
        risk = "" if level is None else f"{'0.5 at' if weighted else 'from'} risk {level:.4f}"
        cells.append((_label(group), f"{group['scored']:,} rows", fate, risk))
    lines += [f"    {line}" for line in aligned(cells, left=(0, 3), gap="   ")]
    return [line.rstrip() for line in lines] + [f"    ... and {len(groups) - SHOWN:,} more"] * (len(groups) > SHOWN)


def _label(group: PieceFigures) -> str:
    """A group's split and value on one line of at most 40 characters."""
    names: list[object] = [group["split"]] if "split" in group else []
    names += [group["value"]] if "value" in group else []
    texts = [name if isinstance(name, str) and name else json.dumps(name, ensure_ascii=False) for name in names]
    label = ": ".join(text if text.isprintable() else json.dumps(text) for text in texts)
    return label if len(label) <= 40 else label[:39] + "…"


def forecast(guess: Mapping[str, Any]) -> str:
    """The text of --dry-run."""
    expected = duration(guess["seconds"])
    passes = {0: "no pass", 1: "one pass"}.get(guess["passes"], f"{guess['passes']} passes")
    other = ", ".join(f"{guess[kind]:,} {kind}" for kind in ("reused", "duplicates", "unreadable") if guess[kind])
    lines = [
        f"{many(guess['rows'], 'row')} of {many(len(guess['inputs']), 'file')}, read as {guess['format']}",
        f"  to score  {guess['to_score']:>12,}   {other}".rstrip(),
        f"  tokens    {guess['tokens']:>12,}   estimated; {passes} through the model",
        f"  time      {expected:>12}   estimated from {guess['sampled']} rows, {guess['dtype']} on {guess['device']}",
    ]
    return "\n".join([*lines, *(f"  file      {printable(i['path'])} ({i['rows']:,} rows)" for i in guess["inputs"])])


def stored(report: Mapping[str, Any]) -> str:
    """The text of `store info`."""
    lines = [f"{report['where']}: {many(sum(s['rows'] for s in report['stores']), 'score')}"]
    for s in report["stores"]:
        lines.append(f"  {s['id']}  {many(s['rows'], 'score')} in {many(s['files'], 'file')}, {s['bytes']:,} bytes")
        settings = (f"{k} {v}" for k, v in s["settings"].items() if v is not None)
        lines.append(f"      {', '.join(settings)}")
    return "\n".join([*lines, *(f"  not a score file, never read: {name}" for name in report["foreign"])])


def compacted(report: Mapping[str, Any]) -> str:
    """The text of `store compact`."""
    lines = [f"{report['where']}: {many(report['files_before'], 'file')} joined into {report['files']:,}"]
    return "\n".join([*lines, *(f"  not a score file, left alone: {name}" for name in report["foreign"])])


def states(comparison: Mapping[str, Any]) -> str:
    """The text of `pack states`: one line per candidate."""
    columns = ("sensitivity", "reliability", "length", "stability", "directions", "auc")
    shown = [c for c in columns if any(entry[c] is not None for entry in comparison["candidates"])]
    cells = [["", *shown]]
    for entry in comparison["candidates"]:
        name = f"{'* ' if entry['state'] == comparison['chosen'] else '  '}{entry['state']}"
        cells.append([name, *("-" if entry[c] is None else f"{entry[c]:.4f}" for c in shown)])
    left_out = ", ".join(f"{count:,} {status}" for status, count in comparison["left_out"].items())
    rows = many(comparison["rows"], "row") + (f"; left out: {left_out}" if left_out else "")
    return "\n".join([*aligned(cells, left=(0,)), f"{rows}; chosen: {comparison['chosen']}"])


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (), gap: str = "  ") -> list[str]:
    """One line per row. The columns whose numbers are in `left` are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(
            text.ljust(width) if k in left else text.rjust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
