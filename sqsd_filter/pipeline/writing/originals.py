"""The cards of the datasets that a run read: the header fields that also hold for its output, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from sqsd_filter.corpus.repositories import MARKER
from sqsd_filter.pipeline.writing.markdown import code, demoted
from sqsd_filter.wording import printable

# Header fields that hold for a part of a source's rows, too; configs, sizes and access hold for its own files only.
AGREED = (
    "pretty_name",
    "language",
    "multilinguality",
    "task_categories",
    "task_ids",
    "annotations_creators",
    "license_name",
    "license_link",
)
NULL = ("", "~", "null")
SINGLE = ("license", "license_name", "license_link", "pretty_name")  # one value is written as a string, not as a list


@dataclass(frozen=True)
class Original:
    """One source: the `fields` of its card's header, each a list of strings, and the card's `text`; both are empty
    where it has no card. If `ours`, this tool wrote the card, and `text` is its part with its own sources' cards.
    """

    name: str
    fields: dict[str, list[str]]
    text: str
    ours: bool

    @classmethod
    def of(cls, name: str, card: str) -> Original:
        """Parses a README.md; a header that is not YAML is ignored."""
        card = card.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        header, text = "", card
        if block := REGEX_YAML_BLOCK.match(card):
            header, text = block[2], card[block.end() :]
        ours = MARKER in text
        text = text.partition(MARKER)[2] if ours else text
        text = printable(text.replace(MARKER, ""), keep="\n\t")
        return cls(name, _fields(header), text.strip("\n"), ours)

    @property
    def licences(self) -> list[str]:
        return [licence for licence in self.fields.get("license", []) if licence != "unknown"]

    def section(self) -> str:
        """The card's text under a heading of its own; empty where there is none."""
        if self.ours or not self.text.strip():
            return self.text
        return f"## The original card of {code(self.name)}\n\n{demoted(self.text)}"


def carried_over(originals: Sequence[Original]) -> dict[str, Any]:
    """The header fields of a card whose rows come from all these sources: all licences and tags, and other fields where
    every source has the same value. No licence is given where one source's is not known."""
    if not originals:
        return {"tags": []}
    fields: dict[str, list[str]] = {}
    if all(original.licences for original in originals):
        fields["license"] = _union([original.licences for original in originals])
    first, *others = originals
    for name in AGREED:
        value = first.fields.get(name)
        if value and all(set(value) == set(other.fields.get(name, [])) for other in others):
            fields[name] = list(value)
    if not fields.get("license_link", ["https:"])[0].startswith(("https:", "http:")):
        del fields["license_link"]  # a file beside the source's card
    single = {name: value[0] for name, value in fields.items() if name in SINGLE and len(value) == 1}
    return {**fields, **single, "tags": _union([original.fields.get("tags", []) for original in originals])}


def _union(lists: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(value for values in lists for value in values))


def _fields(header: str) -> dict[str, list[str]]:
    """The header's fields that are a string or a list of strings. Scalars are read as strings: `no` is Norwegian."""
    try:
        fields = yaml.load(header, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(fields, dict):
        return {}
    lists = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    return {name: values for name, values in lists.items() if all(map(_is_word, values))}


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and value not in NULL
