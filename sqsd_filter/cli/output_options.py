"""Options on what is written, and where to, under the headings of --help."""

from __future__ import annotations

import click

from sqsd_filter.cli.base import together
from sqsd_filter.cli.options import HUB, OUTPUT, at_least_one, option

written = together(
    option(
        OUTPUT,
        "--to",
        type=click.Choice(["parquet", "arrow", "jsonl", "json"]),
        show_default="what the name of DEST says, parquet in a folder",
        help="Format of the rows in DEST. load_from_disk maps arrow; jsonl and json keep the input's own lines.",
    ),
    option(
        OUTPUT,
        "--shard-size",
        default="500MB",
        show_default=True,
        metavar="SIZE",
        help="Size at which a new file begins, for example 100MB or 1GB.",
    ),
    option(
        OUTPUT, "--with-scores", is_flag=True, help="Add the scores to lines of JSON. Other formats always have them."
    ),
    option(
        OUTPUT,
        "--rows-column",
        is_flag=True,
        help="Add the column sqsd_row (file and line in SRC) to kept rows, too. Dropped rows and errors always have "
        "it.",
    ),
    option(
        OUTPUT,
        "--json-as",
        type=click.Choice(["json", "text"]),
        default="json",
        show_default=True,
        help="Columns of parquet and arrow whose values have no common type: JSON that datasets decodes from version "
        "4.7 on, or text.",
    ),
)
percentile = option(
    OUTPUT,
    "--percentile",
    is_flag=True,
    help="Add the column sqsd_percentile: percent of the pack's benign reference rows with a lower risk.",
)
explain = option(
    OUTPUT,
    "--explain",
    type=at_least_one,
    metavar="N",
    help="Write which layers, module types and tokens make the N riskiest rows (at most 1,000) risky. This file is "
    "never pushed.",
)
per_module = option(
    OUTPUT, "--per-module", is_flag=True, help="Add a column of lists for each probe, with its value at each module."
)
overwrite = option(OUTPUT, "--overwrite", is_flag=True, help="Replace what DEST holds, once the new run is complete.")

pushed = together(
    option(
        HUB,
        "--push-to",
        metavar="ORG/NAME",
        help="Push the result to this dataset repository of the Hub, in one commit.",
    ),
    option(
        HUB,
        "--private/--public",
        default=None,
        show_default="private",
        help="Visibility of a repository that the push creates.",
    ),
    option(HUB, "--revision", show_default="the main branch", metavar="BRANCH", help="Branch to push to."),
    option(HUB, "--create-pr", is_flag=True, help="Push as a pull request."),
    option(
        HUB,
        "--push-rows",
        show_default="kept,dropped,errors; for a public repository kept",
        metavar="NAMES",
        help="Rows to push.",
    ),
)
