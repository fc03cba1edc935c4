"""The cards of the datasets that a run read: what of them holds for its output too, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from sqsd_filter.pipeline.writing.markdown import code, demoted

# Below it a card of ours holds those of its sources, so that filtering twice nests nothing.
MARKER = "<!-- sqsd-filter: below are the cards of the sources -->"

# Of a source's header, what says the same of some of its rows; configs, sizes and access are of its own files.
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
SINGLE = ("license", "license_name", "license_link", "pretty_name")  # a string where there is one value


@dataclass(frozen=True)
class Original:
    """One source: `fields` of its card's header, each a list of strings, and the card's `text`, both empty where it
    has no card. `ours` says that this tool wrote it, and `text` is then what it kept of its own sources' cards."""

    name: str
    fields: dict[str, list[str]]
    text: str
    ours: bool

    @classmethod
    def of(cls, name: str, card: str) -> Original:
        """Reads a README.md; of a header that is no YAML nothing is taken."""
        card = card.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        header, text = "", card
        if block := REGEX_YAML_BLOCK.match(card):
            header, text = block[2], card[block.end() :]
        ours = MARKER in text
        text = text.partition(MARKER)[2] if ours else text
        return cls(name, _fields(header), text.replace(MARKER, "").strip("\n"), ours)

    @property
    def licences(self) -> list[str]:
        return [licence for licence in self.fields.get("license", []) if licence != "unknown"]

    def section(self) -> str:
        """The card's text under a heading of its own; empty where there is none."""
        if self.ours or not self.text.strip():
            return self.text
        return f"## The original card of {code(self.name)}\n\n{demoted(self.text)}"


def carried_over(originals: Sequence[Original]) -> dict[str, Any]:
    """The fields for the header of a card over rows of all of these: licences and tags together, others where every
    source says the same. No licence where that of one is not known."""
    if not originals:
        return {"tags": []}
    found = {"license": _together([original.licences for original in originals])}
    if not all(original.licences for original in originals):
        del found["license"]
    first, *others = originals
    for name in AGREED:
        value = first.fields.get(name)
        if value and all(set(value) == set(other.fields.get(name, [])) for other in others):
            found[name] = list(value)
    if not found.get("license_link", ["https:"])[0].startswith(("https:", "http:")):
        del found["license_link"]  # a file beside the source's card
    single = {name: value[0] for name, value in found.items() if name in SINGLE and len(value) == 1}
    return {**found, **single, "tags": _together([original.fields.get("tags", []) for original in originals])}


def _together(lists: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(value for values in lists for value in values))


def _fields(header: str) -> dict[str, list[str]]:
    """The header's fields that are a string or a list of strings. All scalars are strings: `no` is Norwegian."""
    try:
        found = yaml.load(header, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    lists = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    return {name: values for name, values in lists.items() if all(map(_is_word, values))}


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value not in NULL
