"""`sqsd-filter explain`: what makes rows of a finished run risky, from the scores that it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sqsd_filter.cli import options, output
from sqsd_filter.cli.base import Command, complete_files, examples

if TYPE_CHECKING:
    from sqsd_filter.pipeline.explained import ExplainedRow

ROWS = 10
PHRASES = 4


@click.command(
    cls=Command,
    short_help="Say what makes rows of a finished run risky.",
    epilog=examples(
        ("Explain the ten riskiest rows of a run, and show it on its page", "sqsd-filter explain out/"),
        ("Explain the 17th and the 40th row of the input", "sqsd-filter explain out/ --row 17 --row 40"),
    ),
)
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT", shell_complete=complete_files)
@options.plain(
    options.ROWS,
    "--riskiest",
    type=click.IntRange(1, 1000),
    default=ROWS,
    show_default=True,
    metavar="N",
    help="Explain the N riskiest rows (at most 1,000).",
)
@options.plain(
    options.ROWS,
    "--row",
    "rows",
    type=int,
    multiple=True,
    metavar="K",
    help="Explain the K-th row of the input instead. Repeat it for several rows.",
)
@options.scored_by
@options.device
@options.trust_remote_code
@options.common
@click.pass_context
def explain(context: click.Context, /, out: Path, **_: object) -> None:
    """Say which layers and words make rows of the run in OUT risky, and show it on the run's page.

    OUT is the folder that `sqsd-filter` or `sqsd-filter select` wrote, or the file that `sqsd-filter score` wrote. The
    run's scores are reused: only the explained rows go through the model.
    """
    from sqsd_filter.pipeline.explained import ModelChoice, explain_run
    from sqsd_filter.pipeline.page.page import remake_page, was_extended

    params, display = context.params, output.begin(context)
    model = ModelChoice(params["pack"], params["device"], params["trust_remote_code"])
    explained = explain_run(out, params["riskiest"], params["rows"], model, display)
    if was_extended(out):
        display.note("The page is written without what 'sqsd-filter report' had added to it: run that again.")
    page, *_plots = remake_page(out)
    report = {"page": str(page), "rows": explained}
    output.show(report, as_json=params["json_output"], quiet=params["quiet"], text=_text)


def _text(report: Mapping[str, Any]) -> str:
    return "\n\n".join([*map(_row, report["rows"]), f"On the page: {report['page']}"])


def _row(row: ExplainedRow) -> str:
    """A row's risk, the layers and the words that carry it."""
    from sqsd_filter.pipeline.reasons import layers_in_words, riskiest_phrases

    lines = [f"row {row['row'] + 1:,} ({row['file']}, line {row['line']:,})   risk {row['risk']:.4f}"]
    lines += [f"  where    {words}" for words in [layers_in_words(row)] if words]
    lines += ["  words    " + ", ".join(f"“{phrase}” {risk:+.2f}" for phrase, risk in riskiest_phrases(row, PHRASES))]
    return "\n".join(lines)
