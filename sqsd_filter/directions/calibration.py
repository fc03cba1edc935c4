"""Give a pack its reference: score rows that nothing in it was trained or chosen on, and write what they score."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sqsd_filter.corpus.conversation import SCORED, RowError, conversation_key
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.directions.data import licence_of, source_of
from sqsd_filter.directions.state_rows import Conversations, read_sample
from sqsd_filter.directions.validation import recordable
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.pipeline.stage.engines import ProgressCallbacks
from sqsd_filter.progress import Progress, Silent
from sqsd_filter.scoring.pack import PACK_FILE, REFERENCE
from sqsd_filter.scoring.reference_rows import (
    BENIGN,
    UNSAFE,
    ReferenceRecord,
    ReferenceRows,
    settings_of,
    summarise_rows,
)
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.storage.folder import sweep, write_json

FEWEST_ROWS = 20  # scored ones of a corpus
MOST_ROWS = 1000  # of a corpus, unless another number is asked for
_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)")  # NAME=SRC


@dataclass(frozen=True)
class ReferenceCorpus:
    """Rows to score: `kind` is benign or unsafe, `data` is where they come from, for the record."""

    name: str
    kind: str
    conversations: Conversations
    data: dict[str, object]
    licence: str | None


def calibrate(
    where: str | Path,
    benign: Sequence[str],
    unsafe: Sequence[str] = (),
    *,
    scorer: Callable[[], SQSDScorer] | None = None,
    columns: Columns | None = None,
    sample: int = MOST_ROWS,
    limit: int | None = None,
    streaming: bool = False,
    progress: Progress | None = None,
) -> ReferenceRecord:
    """Score reference rows with the pack in the folder `where`, and write them into its `pack.json`, in place of an
    earlier reference. The pack's fingerprint, and with it all scores, stay the same.

    Each of `benign` and `unsafe` is a source, or NAME=SRC; of each at most `sample` rows are scored, spread evenly.
    `scorer` makes the scorer, by default the pack's own. Raises `UsageError` for a pack that can't be written to or
    names that clash, `InputError` for sources that can't be read or have too few rows.
    """
    folder = recordable(where)
    named = [(kind, *_named(source)) for kind, each in ((BENIGN, benign), (UNSAFE, unsafe)) for source in each]
    if not benign:
        raise UsageError("A reference needs benign rows: name some with --benign.")
    counts = Counter(name for _, name, _ in named)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UsageError(f"Several corpora are called '{twice[0]}': name each as --benign NAME=SRC.")
    chosen = scorer() if scorer is not None else SQSDScorer(folder)
    chosen = chosen.with_pack(chosen.pack.alone)
    meter = progress or Silent()
    corpora = []
    for kind, name, source in named:
        meter.start(f"reading {name}", None)
        read = read_sample(source, sample, columns, limit=limit, streaming=streaming)
        licence = licence_of(read.sources)
        corpora.append(ReferenceCorpus(name, kind, read.conversations, source_of(read.corpus, read.sources), licence))
    record = score_reference(chosen, corpora, meter)
    path = folder / PACK_FILE
    page = json.loads(path.read_text(encoding="utf-8"))
    sweep(folder)
    named_risk = chosen.pack.risk
    (page if named_risk is None else page["risks"][named_risk])[REFERENCE] = record
    write_json(path, page)
    return record


def score_reference(scorer: SQSDScorer, corpora: Sequence[ReferenceCorpus], progress: Progress) -> ReferenceRecord:
    """The content of `pack.json` under "reference". Raises `InputError` for a corpus with too few rows."""
    scorer.check_device()
    return {"settings": settings_of(scorer), "corpora": [_scored(scorer, corpus, progress) for corpus in corpora]}


def _scored(scorer: SQSDScorer, corpus: ReferenceCorpus, progress: Progress) -> ReferenceRows:
    """The scores of a corpus, in which equal conversations count once."""
    reasons = Counter(row.status for row in corpus.conversations if isinstance(row, RowError))
    distinct = {conversation_key(row): row for row in corpus.conversations if not isinstance(row, RowError)}
    progress.start(f"scoring {corpus.name}", len(distinct))
    scores = scorer.score(list(distinct.values()), ProgressCallbacks(progress))
    progress.finish()
    reasons.update(status for status in scores.status if status != SCORED)
    good = np.array([status == SCORED for status in scores.status], bool)
    if good.sum() < FEWEST_ROWS:
        why = ", ".join(f"{count} {status}" for status, count in sorted(reasons.items()))
        raise InputError(
            f"Only {good.sum()} of {len(corpus.conversations)} rows of {corpus.name} can be scored"
            f"{f' ({why})' if why else ''}, equal ones counted once: give at least {FEWEST_ROWS}, better 1,000."
        )
    keys = b"".join(key for key, fine in zip(distinct, good.tolist(), strict=True) if fine)
    values = {"risk": scores.risk[good], **{name: column[good] for name, column in scores.probes.items()}}
    rows = summarise_rows(corpus.name, corpus.kind, hashlib.sha256(keys).hexdigest(), values)
    if corpus.licence is not None:
        rows["licence"] = corpus.licence
    return {**rows, "data": corpus.data}


def _named(given: str) -> tuple[str, str]:
    """The name and the source of NAME=SRC; without a name, the one of the file or dataset."""
    if not Path(given).exists() and (match := _NAMED.fullmatch(given)):
        return match[1], match[2]
    name = re.split(r"[@:?*]", given.rstrip("/").rpartition("://")[2])[0].rstrip("/").rpartition("/")[2]
    return name.partition(".")[0] or name or given, given
