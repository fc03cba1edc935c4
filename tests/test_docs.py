"""The README and docs/ have every command and option, and what they show is what the code does."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path
from typing import Any

import click
import datasets
import pytest

from sqsd_filter import SQSDScorer, select
from sqsd_filter.cli.main import cli
from sqsd_filter.corpus.conversation import (
    BAD_JSON,
    BAD_ROW,
    NO_ANSWER,
    NONFINITE,
    PROMPT_TOO_LONG,
    ROLES,
    SCORED,
    TEMPLATE_ERROR,
)
from sqsd_filter.corpus.row_formats import FORMATS
from sqsd_filter.scoring.scorer import TRANSIENT
from tests.commands import parse
from tests.corpora import make_rows, write_jsonl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
EVERYTHING = "\n".join(DOCS.values())


def commands(group: click.Group, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    found = {}
    for name, command in group.commands.items():
        inner = commands(command, (*path, name)) if isinstance(command, click.Group) else {(*path, name): command}
        found.update(inner)
    return found


COMMANDS = commands(cli)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_docs_have_every_command_and_option(path: tuple[str, ...]) -> None:
    if path != ("filter",):  # goes without its name
        assert f"sqsd-filter {' '.join(path)} " in EVERYTHING
    options = [p for p in COMMANDS[path].params if isinstance(p, click.Option)]
    longest = [max(p.opts, key=len) for p in options]
    assert [o for o in longest if not re.search(rf"{o}\b", EVERYTHING)] == []


def test_the_page_on_rows_has_every_row_format_and_role_and_status() -> None:
    reasons = (SCORED, NO_ANSWER, PROMPT_TOO_LONG, NONFINITE, BAD_JSON, BAD_ROW, TEMPLATE_ERROR, *TRANSIENT)
    assert [name for name in (*FORMATS, *ROLES, *reasons) if f"`{name}`" not in DOCS["docs/rows.md"]] == []
    formats = next(p for p in COMMANDS[("score",)].params if p.name == "row_format")
    assert [name for name in FORMATS if name not in formats.help] == []


def test_every_option_explains_itself() -> None:
    options = [p for c in COMMANDS.values() for p in c.params if isinstance(p, click.Option)]
    assert options
    assert [p.name for p in options if not p.help] == []


def shown() -> list[list[str]]:
    """Every command line of README and docs that can be run as it is: no alternatives, no ellipsis."""
    lines = re.findall(r"^    (?:.*&& )?(?:\S*/)?(sqsd-filter .*?)(?:\s+#.*)?$", EVERYTHING, re.MULTILINE)
    return [shlex.split(line) for line in dict.fromkeys(lines) if not re.search(r"\.\.\.|[(|]", line)]


@pytest.mark.parametrize("line", shown(), ids=" ".join)
def test_the_command_lines_of_the_docs_parse(line: list[str]) -> None:
    assert parse(line[1:]).params


def test_the_test_command_of_the_readme_is_what_ci_calls() -> None:
    assert "\n    tests/run\n" in README
    assert "\ntests/run " in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def tiny_embedded(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in pack's name stands for a pack on a tiny model, and nothing is left elsewhere."""
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "smollm2-135m").symlink_to(tiny_pack)
    monkeypatch.setattr("sqsd_filter.scoring.pack.PACKS_DIR", tmp_path / "packs")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def test_the_script_of_the_readme_runs(tiny_embedded: None) -> None:
    section = README[README.index("### From Python") : README.index("## How it works")]
    write_jsonl(Path("in.jsonl"), [*make_rows(39), {"id": 39, "instruction": "?", "output": ""}])
    names: dict[str, Any] = {}
    for script in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(script, names)
    assert [part["id"][:] for part in (names["dropped"], names["errors"])] == [
        part["id"][:] for part in (datasets.load_dataset("out", name, split="train") for name in ("dropped", "errors"))
    ]
    assert [names["report"]["rows"][part] for part in ("kept", "dropped", "errors")] == [37, 2, 1]
    assert len(names["kept"]) == 37


@pytest.mark.parametrize("public", [SQSDScorer, select], ids=lambda public: public.__name__)
def test_the_examples_in_docstrings_are_true(public: Any, tiny_embedded: None) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(public, globs={public.__name__: public})
    result = doctest.DocTestRunner().run(example)
    assert result.attempted
    assert not result.failed
