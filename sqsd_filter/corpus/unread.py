"""What is not read although it looks as if it changed what is learned: named once, with the first row that has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from sqsd_filter.corpus.row_reading import PREFERENCES, SHOWN_BY_TAG, RowFormat
from sqsd_filter.corpus.values import is_missing, parse_text
from sqsd_filter.errors import InputError

# Names to which a trainer gives a meaning
_COLUMNS = """
    messages conversations conversation contents dialogue turns prompt prompts instruction input query question
    context contexts document documents passage passages history system system_prompt systemInstruction
    system_instruction tools functions completion response output answer chosen rejected rejected_response
    rejected_messages preferred_output non_preferred_output reasoning reasoning_content thinking image images audio
    audios video videos objects label labels kto_tag weight weights sample_weight train train_detail train_on_turn
    train_on_input roles_to_train loss loss_mask loss_scale loss_weight mask masks completion_mask assistant_masks
    prompt_mask input_ids attention_mask segments prefix suffix margin chat_template chat_template_kwargs
    template_kwargs template
"""
_TURN_KEYS = """
    tools functions documents context system prefix channel recipient end_turn eot objects mask label labels
    chat_template_kwargs token_ids loss_masks segments
"""
COLUMNS, TURN_KEYS = frozenset(_COLUMNS.split()), frozenset(_TURN_KEYS.split())


class UnreadName(TypedDict):
    """A column, or a key of a turn, that is not read, and the first row that has a value there."""

    name: str
    kind: str  # column or key
    file: str
    line: int


@dataclass
class Unread:
    """Sees rows that are read by a format and finds the names that are not. With `strict` the first one is an error."""

    form: RowFormat
    strict: bool = False
    found: list[UnreadName] = field(default_factory=list)

    def __post_init__(self) -> None:
        read = {*self.form.columns, *PREFERENCES.get(self.form.name, ())}.difference(SHOWN_BY_TAG)
        self._columns, self._keys = set(COLUMNS - read), set(TURN_KEYS)
        self._turns = self.form.messages or self.form.answer

    def see(self, row: Mapping[str, Any], file: str, line: int) -> None:
        """Look at a row. Raises `InputError` where the format is `strict`."""
        for name in sorted(self._columns.intersection(row)):
            if not is_missing(row[name]) and row[name] != "[]":
                self._columns.discard(name)
                self._note({"name": name, "kind": "column", "file": file, "line": line})
        for key in sorted(self._of_turns(row.get(self._turns or ""))):
            self._keys.discard(key)
            self._note({"name": key, "kind": "key", "file": file, "line": line})

    def _of_turns(self, turns: object) -> Iterable[str]:
        if isinstance(turns, str) and turns.lstrip()[:1] == "[":
            named = any(f"{key}{quote}" in turns for key in self._keys for quote in "'\"")
            turns = parse_text(turns) if named else None
        if not isinstance(turns, list | tuple):
            return []
        given = [turn for turn in turns if isinstance(turn, Mapping) and not self._keys.isdisjoint(turn)]
        return {key for turn in given for key in self._keys.intersection(turn) if not is_missing(turn[key])}

    def _note(self, name: UnreadName) -> None:
        if self.strict:
            raise InputError(
                f"{_words(name)} may change what is learned and is not read: remove it, name the column that it is, "
                "or leave out strict (--strict)."
            )
        self.found.append(name)

    def notes(self) -> list[str]:
        """A sentence for each name."""
        return [
            f"not read: {_words(name)}; if a trainer reads it, these scores are not of what it learns"
            for name in self.found
        ]


def _words(name: UnreadName) -> str:
    what = f"column '{name['name']}'" if name["kind"] == "column" else f"the key '{name['name']}' of a turn"
    return f"{what} ({name['file']}, line {name['line']})"
