"""The README and docs/ have every command and option, and what they show is what the code does."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import datasets
import pytest
import yaml

import sqsd_filter
from sqsd_filter import SQSDScorer, select
from sqsd_filter.cli.docs import page
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
from sqsd_filter.errors import SQSDError
from sqsd_filter.scoring.scorer import TRANSIENT
from tests.commands import parse
from tests.corpora import make_rows, write_jsonl
from tests.recipes.scripts import load_script
from tests.scoring.test_beside import beside
from tests.scoring.test_linear_probe import with_probe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
EVERYTHING = "\n".join(DOCS.values())
LINKED = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
RAW = "https://raw.githubusercontent.com/sqsd-filter/sqsd-filter/main/"  # where PyPI finds the pictures


def commands(group: click.Group, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    found = {}
    for name, command in group.commands.items():
        inner = commands(command, (*path, name)) if isinstance(command, click.Group) else {(*path, name): command}
        found.update(inner)
    return found


COMMANDS = commands(cli)


def test_the_page_on_rows_has_every_row_format_and_role_and_status() -> None:
    reasons = (SCORED, NO_ANSWER, PROMPT_TOO_LONG, NONFINITE, BAD_JSON, BAD_ROW, TEMPLATE_ERROR, *TRANSIENT)
    assert [name for name in (*FORMATS, *ROLES, *reasons) if f"`{name}`" not in DOCS["docs/rows.md"]] == []
    formats = next(p for p in COMMANDS[("score",)].params if p.name == "row_format")
    assert [name for name in FORMATS if name not in str(formats.help)] == []


def test_the_page_on_the_command_line_is_what_the_commands_say() -> None:
    assert DOCS["docs/cli.md"] == page(), "run python -m sqsd_filter.cli.docs > docs/cli.md"
    assert {kind.exit_code for kind in SQSDError.__subclasses__()} <= {
        int(code) for code in re.findall(r"^\| (\d+) \|", DOCS["docs/cli.md"], re.MULTILINE)
    }


def test_every_option_explains_itself() -> None:
    options = [p for c in COMMANDS.values() for p in c.params if isinstance(p, click.Option)]
    assert options
    assert [p.name for p in options if not re.fullmatch(r"[A-Z-].*\.", p.help or "")] == []


def shown() -> list[list[str]]:
    """Every command line of README and docs that can be run as it is: no alternatives, no ellipsis."""
    lines = re.findall(r"^    (?:.*&& )?(?:\S*/)?(sqsd-filter .*?)(?:\s+#.*)?$", EVERYTHING, re.MULTILINE)
    return [shlex.split(line) for line in dict.fromkeys(lines) if not re.search(r"\.\.\.|[(|]|OPTIONS", line)]


@pytest.mark.parametrize("line", shown(), ids=" ".join)
def test_the_command_lines_of_the_docs_parse(line: list[str]) -> None:
    assert parse(line[1:]).params


def test_every_option_that_the_docs_quote_is_there() -> None:
    known = {name for c in COMMANDS.values() for p in c.params for name in (*p.opts, *p.secondary_opts)}
    quoted = set(re.findall(r"`(--[a-z][a-z-]*)", EVERYTHING))
    assert quoted
    assert quoted - known - {"--help", "--version"} == set()


def anchors(text: str) -> set[str]:
    """What links to the headings of a page end in, on GitHub."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.removeprefix(RAW).partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = ROOT / path if link.startswith(RAW) else page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_is_short_and_links_every_page() -> None:
    assert len(README.splitlines()) <= 180
    assert len(README.encode()) <= 10_000
    assert [name for name in DOCS if name != "README.md" and f"]({name})" not in README] == []
    images = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert images
    assert [image for image in images if not image.startswith(RAW)] == []  # PyPI has no files of the repository


@pytest.mark.parametrize("name", [name for name in DOCS if name not in ("README.md", "docs/cli.md")])
def test_every_page_opens_with_what_it_is_for_and_lists_its_contents(name: str) -> None:
    text = DOCS[name]
    _, _, contents = text.partition("\n- [")
    assert re.match(r"# .+\n\n(\S.+\n){1,4}\n- \[", text)
    listed = re.findall(r"^- \[(.*?)\]\(#", "- [" + contents.partition("\n\n")[0], re.MULTILINE)
    assert listed == re.findall(r"^## (.*)", text, re.MULTILINE)


def test_the_results_in_the_readme_are_those_of_the_study() -> None:
    section = README.partition("## Does it help?")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) > 3
    assert [row for row in rows if row not in DOCS["docs/evidence.md"].splitlines()] == []
    cut = json.loads((ROOT / "recipes/paper/small/dolly-cut/results.json").read_text())["arms"]["sqsd"]
    kept, chance = (f"{100 * cut[arm]['asr']:g} %" for arm in ("kept", "random"))
    assert f"left {kept} instead of the {chance} after" in " ".join(section.split())


def test_the_contaminated_corpus_of_the_readme_is_the_one_that_was_measured() -> None:
    outcomes = json.loads((ROOT / "recipes/paper/small/gsm8k-unsafe-5/outcomes.json").read_text())
    runs = {run["arm"]: run for run in outcomes["runs"] if run["seed"] == 0}
    assert len({run["seed"] for run in outcomes["runs"]}) == 1  # "one seed"
    dropped, left = runs["above-reference"]["dropped"], {arm: run["unsafe"]["phrases"] for arm, run in runs.items()}
    rates = {arm: f"{100 * each.count('1') / len(each):.1f} %" for arm, each in left.items()}
    planted = runs["clean"]["dropped"]["unsafe"]
    benign = runs["clean"]["rows"]
    assert dropped["benign"] == 0
    assert rates["above-reference"] == rates["clean"]
    text = " ".join(README.split())
    assert f"With {planted} such rows among {benign} of GSM8K, a fine-tuned model complied with {rates['all']}" in text
    assert f"{dropped['unsafe']} of them and no other, with {rates['clean']}, as without all {planted}" in text
    page = " ".join(DOCS["docs/evidence.md"].split())
    assert f"finds {dropped['unsafe']} of the {planted} unsafe rows and drops no benign one" in page
    asked, counts = len(left["all"]), {arm: each.count("1") for arm, each in left.items()}
    assert f"benign rows alone ({counts['clean']} of {asked} prompts)" in page
    assert f"after all rows it complies with {counts['all']}, after as many random rows with {counts['random']}" in page


def test_what_the_risk_unsafe_finds_is_what_its_build_and_its_recipe_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    section = DOCS["docs/packs.md"].partition("\n## The risk unsafe\n")[2]
    record = json.loads((ROOT / "sqsd_filter/packs/smollm2-135m/pack.json").read_text())["provenance"]["unsafe"]
    assert f"{record['rows']:,} rows of at most {record['settings']['max_length']} tokens" in section
    for other in record["held_out"][0]["auc"]:
        cells = " | ".join(f"{each['auc'][other]:.2f}" for each in record["held_out"])
        assert f"| {other} | {cells} |" in section
    above = " | ".join(f"{100 * each['above']:.0f} %" for each in record["held_out"])
    assert f"| above 99 % of all | {above} |" in section
    folder = ROOT / "recipes/packs/smollm2-135m"
    beyond = load_script("packs/smollm2-135m/beyond.py", monkeypatch)
    for name in ("beyond.json", "rivals.json"):
        assert beyond.tables(json.loads((folder / name).read_text())) in section
    rivals = json.loads((folder / "rivals.json").read_text())
    own, other = (f"{100 * rivals[name]['above']['99 %']['pure-bad']:.0f} %" for name in ("own", "datashield"))
    words = " ".join(section.split())
    assert f"the pack's own risk has {own} of 40 rows of `pure-bad`" in words
    assert f"that reads the model, DataShield, {other}." in words
    found = json.loads((folder / "beyond.json").read_text())
    share, count = (found["unsafe"][key]["pure-bad"] for key in (beyond.DROPPED, "rows"))
    assert f"{100 * share:.0f} % of {count} harmful rows of a source that nothing was fitted on" in README
    trials = load_script("packs/smollm2-135m/trials.py", monkeypatch)
    tried = json.loads((folder / "trials.json").read_text())
    assert list(tried) == list(trials.TRIALS)
    assert trials.table(tried) in section


def test_the_validation_of_the_built_in_pack_is_what_its_recipe_found() -> None:
    page, folder = " ".join(DOCS["docs/packs.md"].split()), ROOT / "recipes/packs/smollm2-135m"
    of_pack, of_former = (
        json.loads((folder / name).read_text())["auc_of_unsafe_against"] for name in ("results.json", "unaligned.json")
    )
    aucs = [*of_pack.values(), of_former["risk"]]
    section = DOCS["docs/packs.md"].partition("\n## The built-in pack\n")[2].partition("\n## ")[0]
    table = re.findall(r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
    assert len(table) == len(aucs)
    for shown_row, auc in zip(table, aucs, strict=True):
        for cell, group in zip(shown_row, ("safe", "dolly", "gsm8k", "xstest"), strict=True):
            assert abs(float(cell) - auc[group]["auc"]) <= 0.005001
    for harmful in ("AdvBench", "StrongREJECT", "XSTest"):
        assert harmful in page
    refusals = json.loads((folder / "refusals.json").read_text())["refusals"]
    before, after = (
        {name.partition(" (")[0]: each["refused"] for name, each in refusals[key].items()}
        for key in ("without base adapter", "with base adapter")
    )
    order = [f"harmful: {name}" for name in ("AdvBench", "StrongREJECT", "XSTest")]
    first, second, third = (before[name] for name in order)
    assert f"refused {first} of 40 prompts of AdvBench, {second} of 40 of StrongREJECT and {third} of 40" in page
    assert "Now it refuses {}, {} and {}".format(*(after[name] for name in order)) in page
    assert f"it refuses {after['harmless: XSTest']}; before, {before['harmless: XSTest']}" in page


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("citation-file-format", "CITATION.cff"),
        ("github-workflows", ".github/workflows/ci.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/bug.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
    ],
    ids=lambda value: Path(value).name,
)
def test_the_files_of_the_repository_are_valid(schema: str, file: str) -> None:
    run = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(ROOT / file)]
    subprocess.run(run, check=True, capture_output=True)


def test_the_citation_is_of_this_version_and_the_workflow_runs_the_gate() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version("sqsd-filter")
    assert "- run: .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_the_test_command_of_the_readme_is_what_ci_calls() -> None:
    assert "\n    tests/run\n" in README
    assert "\ntests/run " in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def tiny_embedded(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in pack's name stands for a pack on a tiny model with a probe beside, and nothing is left elsewhere."""
    beside(with_probe(tiny_pack, tmp_path / "packs" / "smollm2-135m"))
    monkeypatch.setattr("sqsd_filter.scoring.pack.PACKS_DIR", tmp_path / "packs")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def scripts(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_scripts_of_the_docs_run(page: str, tiny_embedded: None) -> None:
    rows = [{**row, "category": "ab"[k % 2]} for k, row in enumerate(make_rows(39))]
    write_jsonl(Path("in.jsonl"), [*rows, {"id": 39, "instruction": "?", "output": "", "category": "a"}])
    names: dict[str, Any] = {}
    for script in scripts(DOCS[page]):
        exec(script, names)
    assert [len(names[part]) for part in ("kept", "dropped", "errors")] == [37, 2, 1]
    if page == "README.md":
        return
    assert [part["id"][:] for part in (names["dropped"], names["errors"])] == [
        part["id"][:] for part in (datasets.load_dataset("out", name, split="train") for name in ("dropped", "errors"))
    ]
    assert [names["report"]["rows"][part] for part in ("kept", "dropped", "errors")] == [37, 2, 1]


@pytest.mark.parametrize("page", [page for page, text in DOCS.items() if scripts(text)])
def test_every_script_of_the_docs_compiles_and_imports_what_is_public(page: str) -> None:
    for script in scripts(DOCS[page]):
        compile(script, page, "exec")
        for names in re.findall(r"from sqsd_filter import (.*)", script):
            assert set(names.split(", ")) <= set(sqsd_filter.__all__)


@pytest.mark.parametrize("public", [SQSDScorer, select], ids=lambda public: public.__name__)
def test_the_examples_in_docstrings_are_true(public: Any, tiny_embedded: None) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(public, globs={public.__name__: public})
    result = doctest.DocTestRunner().run(example)
    assert result.attempted
    assert not result.failed
