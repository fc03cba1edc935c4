"""The rows for steering: harmful prompts, optionally with a safe and an unsafe answer to each."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqsd_filter.corpus.addresses import Opener, expand
from sqsd_filter.corpus.conversation import RowError
from sqsd_filter.corpus.sources import Corpus, Row
from sqsd_filter.errors import InputError
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded


@dataclass(frozen=True)
class TrialColumns:
    """Names of the columns. None means the usual name, which for answers may be absent."""

    prompt: str | None = None
    safe: str | None = None
    unsafe: str | None = None


@dataclass(frozen=True)
class Pair:
    """The two answers to a prompt, and its file and line for messages."""

    prompt: str
    safe: str
    unsafe: str
    origin: str


@dataclass(frozen=True)
class Trials:
    """All prompts, in order, and the pairs of those with both answers. `source` identifies the rows."""

    prompts: list[str]
    pairs: list[Pair]
    source: dict[str, Any]

    def encoded(self, encoder: ChatEncoder) -> tuple[list[Encoded], list[Encoded]]:
        """The safe and the unsafe answers as tokens. Raises `InputError` for an answer without tokens."""
        both = []
        for answers in ([p.safe for p in self.pairs], [p.unsafe for p in self.pairs]):
            turns = [
                [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": answer}]
                for pair, answer in zip(self.pairs, answers, strict=True)
            ]
            rows = []
            for pair, row in zip(self.pairs, encoder.encode(turns), strict=True):
                if isinstance(row, RowError):
                    raise InputError(f"{pair.origin}: {row.detail or row.status}. Leave the row out.")
                rows.append(row)
            both.append(rows)
        return both[0], both[1]


def read_trials(source: str | Path, columns: TrialColumns, limit: int | None = None) -> Trials:
    """Read the first `limit` rows of any source that scoring reads.

    A row that lacks an answer counts as a prompt only. Raises `InputError`, also for a single row that can't be read:
    these files are small and made by hand.
    """
    rows: list[Row] = []
    with closing(Opener()) as opener:
        corpus = Corpus.scan(opener.open(expand([source])), limit=limit, visit=rows.append)
    if not rows:
        raise InputError(f"{source} has no rows: name a file with prompts.")
    names = {name for row in rows for name in row.value or ()}
    prompt, safe, unsafe = (_column(columns, kind, default, names) for kind, default in _USUAL.items())
    prompts, pairs = [], []
    for row in rows:
        origin = f"{row.file}, line {row.line}"
        if row.value is None:
            raise InputError(f"{origin}: {row.problem}. Fix the row or leave it out.")
        texts = [_text(row.value, column, origin) for column in (prompt, safe, unsafe)]
        if texts[0] is None:
            raise InputError(f"{origin}: the column '{prompt}' is empty. Leave the row out.")
        prompts.append(texts[0])
        if texts[1] and texts[2]:
            pairs.append(Pair(texts[0], texts[1], texts[2], origin))
    files = [{"file": Path(i["path"]).name, "rows": i["rows"], "blake2b": i["blake2b"]} for i in corpus.inputs]
    used = {"prompt": prompt, "safe": safe, "unsafe": unsafe}
    return Trials(prompts, pairs, {"files": files, "columns": used, "prompts": len(prompts), "pairs": len(pairs)})


_USUAL = {"prompt": "prompt", "safe": "chosen", "unsafe": "rejected"}


def _column(columns: TrialColumns, kind: str, default: str, names: set[str]) -> str | None:
    """The name of the column of this kind, None for absent answers. Raises `InputError`."""
    named: str | None = getattr(columns, kind)
    column = named or default
    if column in names:
        return column
    if named is None and kind != "prompt":
        return None
    seen = ", ".join(f"'{name}'" for name in sorted(names)) or "none"
    raise InputError(f"The rows have no column '{column}' (they have {seen}): name the right one with --{kind}-column.")


def _text(value: Mapping[str, Any], column: str | None, origin: str) -> str | None:
    """The text in a column, None if it is empty or absent."""
    text = value.get(column) if column is not None else None
    if text is not None and not isinstance(text, str):
        raise InputError(f"{origin}: the column '{column}' holds {type(text).__name__}, not text.")
    return text if text and text.strip() else None
