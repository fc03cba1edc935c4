"""The page of a run: readable everywhere, light, without requests, and nothing in a row is markup."""

from __future__ import annotations

import html
import json
import logging
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sqsd_filter import Cut, Scoring, SQSDScorer, filter_dataset, score_dataset, select_dataset
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.errors import DestinationExists, InputError, SQSDError
from sqsd_filter.pipeline.meaning import by_length
from sqsd_filter.pipeline.page.notes import ModuleMeans
from sqsd_filter.pipeline.page.page import remake_page, write_page
from sqsd_filter.pipeline.publishing.hub import PushTo
from sqsd_filter.pipeline.report import FinishedReport, PieceFigures
from sqsd_filter.pipeline.writing.destination import lock_run
from tests.corpora import make_rows, read_report, write_jsonl
from tests.disks import small_disk
from tests.hub import Hub
from tests.pages import Seen, noted, page_of

HOSTILE = "<script>alert(1)</script></div></article><img src=x onerror='a()'>\"&amp;{{ 7 * 7 }}{% raw %}"


def row(prompt: str, answer: str) -> dict[str, str]:
    return {"instruction": prompt, "output": answer}


# ---------------------------------------------------------------------------------------------- what is in a row


def test_nothing_in_a_row_is_markup(tmp_path: Path) -> None:
    rows = [row("plain", "plain"), row(HOSTILE, HOSTILE[::-1])]
    seen = Seen(page_of(tmp_path, rows))
    assert seen.texts == [HOSTILE, HOSTILE[::-1], "plain", "plain"]
    assert {"script", "img", "iframe", "object", "link", "form"}.isdisjoint(tag for tag, _ in seen.elements)
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]


def test_nothing_in_the_words_of_an_explained_row_is_markup(tmp_path: Path) -> None:
    part = {"risk": 1.0, "probes": {"danger": 1.0}}
    tokens = [{"text": text, **part} for text in re.split("(?= )", HOSTILE)]
    explained = {"row": 0, "risk": 1.0, "layers": [{"layer": 3, **part}], "tokens": [*tokens, {"text": "</s>", **part}]}
    (tmp_path / "explained.json").write_text(json.dumps({"rows": [explained]}))
    seen = Seen(page_of(tmp_path, [row("plain", HOSTILE)]))
    assert seen.texts == ["plain", HOSTILE]
    assert [tag for tag, _ in seen.elements].count("mark") == len(tokens)
    assert {"script", "img", "iframe", "object", "link", "form"}.isdisjoint(tag for tag, _ in seen.elements)


def test_control_characters_are_seen_and_do_no_harm(tmp_path: Path) -> None:
    seen = Seen(page_of(tmp_path, [row("a\0b\x1b[31mc\x7f\x85", "one\r\ntwo\tthree\rfour")]))
    assert seen.texts == ["a␀b␛[31mc␡\ufffd", "one\ntwo\tthree\nfour"]


def test_text_from_right_to_left_stays_isolated(tmp_path: Path) -> None:
    arabic = "\u0645\u0631\u062d\u0628\u0627 \u202e override"
    seen = Seen(page_of(tmp_path, [row(arabic, arabic)]))
    assert seen.texts == [arabic, arabic]
    assert [a["dir"] for _, a in seen.elements if a.get("class") == "text"] == ["auto", "auto"]
    assert "unicode-bidi: isolate" in seen.page


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(min_size=1, max_size=40).filter(str.strip))
def test_any_text_leaves_the_page_with_the_same_elements(tmp_path: Path, text: str) -> None:
    report, notes = noted(tmp_path, [row("a", "b")])
    plain = [tag for tag, _ in Seen(write_page(tmp_path, report, notes).read_text(encoding="utf-8")).elements]
    notes["riskiest"][0]["prompt"]["text"] = notes["riskiest"][0]["file"] = text
    seen = Seen(write_page(tmp_path, report, notes).read_text(encoding="utf-8"))
    assert [tag for tag, _ in seen.elements] == plain


# ---------------------------------------------------------------------------------------------- the page


@pytest.mark.pictures
def test_the_page_asks_for_nothing_and_names_no_address(tmp_path: Path) -> None:
    seen = Seen(page_of(tmp_path, make_rows(30)))
    assert seen.requests == []
    assert "//" not in seen.page
    policies = [a["content"] for _, a in seen.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.pictures
def test_pictures_take_the_colour_of_the_text_and_say_what_they_show(tmp_path: Path) -> None:
    seen = Seen(page_of(tmp_path, make_rows(30)))
    pictures = [a for tag, a in seen.elements if tag == "svg"]
    assert len(pictures) == 2
    assert all(a["aria-label"] for a in pictures)
    assert "currentColor" in seen.page
    assert "#000000" not in seen.page.partition("<body>")[2]  # black on a dark page


LOOKED_AT = """<script>
const style = getComputedStyle(document.body), seen = document.documentElement;
const ink = getComputedStyle(document.querySelector("svg text")).fill;
const colours = [style.backgroundColor, style.color, ink].map(c => c.match(/\\d+/g).map(Number));
const clipped = [...document.querySelectorAll(".wide")].filter(each => each.scrollWidth > each.clientWidth).length;
const sizes = {asked: innerWidth, room: seen.clientWidth, wide: seen.scrollWidth, clipped};
parent.postMessage(JSON.stringify({...sizes, colours}), "*");
</script>"""
PHONE = """<!doctype html><meta name="color-scheme" content="light dark">
<body><iframe src="copy.html" width="360" height="800" style="border: 0"></iframe>
<script>onmessage = message => document.body.replaceChildren(message.data)</script>"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_a_phone_and_a_dark_screen(tmp_path: Path, dark: bool) -> None:
    report, notes = noted(tmp_path, [row("x" * 500, "word " * 200) for _ in range(30)])
    group = PieceFigures(split="s" * 99, value="v" * 99, scored=10**9, dropped=10**6, threshold=0.123456789)
    report["groups"] = {"column": "kind", "spared": 0, "groups": [group]}
    report["command"] = ["sqsd-filter", "/" + "a" * 300]
    page = write_page(tmp_path, report, notes).read_text(encoding="utf-8")
    assert page.count('<meta http-equiv="Content-Security-Policy"') == 1
    open_page = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", LOOKED_AT)
    open_page = open_page.replace("<details", "<details open")
    (tmp_path / "copy.html").write_text(open_page, encoding="utf-8")
    (tmp_path / "phone.html").write_text(PHONE)  # a window itself can't be so narrow
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=3000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    address = (tmp_path / "phone.html").as_uri()
    done = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, check=True, timeout=120)
    seen = json.loads(re.findall(r"<body>(.*)</body>", done.stdout, re.DOTALL)[0])
    assert seen["wide"] <= seen["room"] <= seen["asked"] == 360
    assert seen["clipped"] == 0
    ground, *inks = (sum(colour[:3]) for colour in seen["colours"])
    assert all(ink - ground > 300 if dark else ground - ink > 300 for ink in inks)


@pytest.mark.pictures
def test_the_worst_rows_make_no_heavy_page(tmp_path: Path) -> None:
    rows = [row("<&'\"" * 500, "\U0001f469" * 2000) for _ in range(50)]
    report, notes = noted(tmp_path, rows)
    group = PieceFigures(value="<" * 1000, scored=10, dropped=1, threshold=0.123456789)
    report["groups"] = {"column": "kind", "spared": 3, "groups": [group] * 10_000}
    report["inputs"] *= 1000
    report["command"] = ["sqsd-filter", *(f"in-{k}.jsonl" for k in range(10_000))]
    assert write_page(tmp_path, report, notes).stat().st_size < 1_000_000


def test_dropped_rows_come_first_and_those_next_to_the_cut_are_among_them(tmp_path: Path) -> None:
    rows = [row(f"prompt {k}", "answer") for k in range(200)]
    seen = Seen(page_of(tmp_path, rows, drop_count=100))
    shown = [int(text.split()[1]) for text in seen.texts[::2]]
    assert shown == [*range(199, 169, -1), *range(109, 99, -1), *range(99, 89, -1)]
    few = Seen(page_of(tmp_path, rows, drop_count=3))
    assert [int(text.split()[1]) for text in few.texts[::2]] == list(range(199, 149, -1))
    groups = [a["class"] for tag, a in few.elements if tag == "article"]
    assert groups == ["dropped"] * 3 + ["kept"] * 47


def test_everything_but_the_answer_and_some_rows_is_folded(tmp_path: Path) -> None:
    page = page_of(tmp_path, [row(f"prompt {k}", "answer") for k in range(200)], drop_count=100)
    answer, _, rest = page.partition('<section id="dropped">')
    assert "100 of 200 rows dropped" in answer
    assert "sqsd-filter select OUT OTHER" in answer
    opened = re.sub("<details.*?</details>", "", rest, flags=re.DOTALL)
    assert opened.count("<article") == 10 + 3
    assert opened.count("<table") == 0
    assert rest.count("<table") > 1


def test_fifty_rows_are_shown_at_most_the_riskiest_first(tmp_path: Path) -> None:
    seen = Seen(page_of(tmp_path, [row(f"prompt {k}", "answer") for k in range(60)]))
    assert seen.texts[::2] == [f"prompt {k}" for k in range(59, 9, -1)]
    assert len([tag for tag, _ in seen.elements if tag == "article"]) == 50


@pytest.mark.pictures
def test_the_same_run_gives_the_same_bytes_whenever_it_was(tmp_path: Path) -> None:
    report, notes = noted(tmp_path, make_rows(30))

    def page_after(seconds: float) -> bytes:
        finished = cast("FinishedReport", {**report, "status": "ok", "timing": {"seconds": seconds}})
        return write_page(tmp_path, finished, notes).read_bytes()

    assert page_after(1) == page_after(2)


@pytest.mark.pictures
def test_cosines_by_module_are_drawn_in_a_picture_per_probe(tmp_path: Path) -> None:
    report, notes = noted(tmp_path, make_rows(9))
    places = [(layer, kind) for layer in (None, *range(80)) for kind in ("mlp.up_proj", "self_attn.q_proj")]
    cosines = ModuleMeans(places=places, all=[0.0] * 162, riskiest=[k / 100 for k in range(162)])
    notes["modules"] = {"danger": cosines, "$safety": cosines}
    seen = Seen(write_page(tmp_path, report, notes).read_text(encoding="utf-8"))
    names = [str(a["aria-label"]) for tag, a in seen.elements if tag == "svg"]
    assert [name.split(" by layer")[0] for name in names[2:]] == [
        "Mean cosine with the direction danger",
        "Mean cosine with the direction $safety",
    ]
    assert seen.requests == []
    assert "image" not in [tag for tag, _ in seen.elements]


@pytest.mark.pictures
def test_modules_are_called_by_their_last_name_where_that_is_theirs_alone(tmp_path: Path) -> None:
    report, notes = noted(tmp_path, make_rows(9))
    places: list[tuple[int | None, str]] = [(0, kind) for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    notes["modules"] = {"danger": {"places": places, "all": [0.1] * 3, "riskiest": [0.2] * 3}}
    page = write_page(tmp_path, report, notes).read_text(encoding="utf-8")
    assert all(f">{name}</text>" in page for name in ("c_attn", "attn.c_proj", "mlp.c_proj"))
    assert ">c_proj</text>" not in page


@pytest.mark.parametrize(
    ("sign", "word"), [(1, "longer"), (-1, "shorter"), (0, "")], ids=["longer", "shorter", "neither"]
)
def test_a_risk_that_goes_with_length_is_pointed_at(tmp_path: Path, sign: int, word: str) -> None:
    random = np.random.default_rng(0)
    lengths = random.permutation(200) + 1
    risk = sign * lengths + random.normal(size=200)
    page = page_of(tmp_path, [row("a", "x" * n) for n in lengths], risk=risk)
    assert ('<p class="warning">' in page) == bool(sign)
    assert (f"Risk depends on length: {word} answers tend to be riskier" in page) == bool(sign)
    assert ("Risk is hardly related to the length of answers" in page) != bool(sign)


@pytest.mark.parametrize("sign", [1, -1, 0], ids=["longer", "shorter", "neither"])
def test_card_and_page_say_the_same_about_length(folder: Path, tiny_pack: Path, sign: int) -> None:
    lengths = [7 * k % 20 + 1 for k in range(20)]
    write_jsonl(folder / "in.jsonl", [row("a", "x" * n) for n in lengths])
    risk = [sign * n if sign else k % 2 for k, n in enumerate(lengths)]
    scored = [
        {**row("a", "x" * n), "sqsd_risk": r, "sqsd_status": "scored"} for n, r in zip(lengths, risk, strict=True)
    ]
    write_jsonl(folder / "scored.jsonl", scored)
    report = select_dataset("scored.jsonl", "out", Cut.of(drop_count=3))
    said = by_length(report["length"])
    assert said.startswith("Risk depends on length: " if sign else "Risk is hardly related to the length")
    assert said in " ".join(Path("out/README.md").read_text().split())
    assert said in html.unescape(read("out/_sqsd"))


@pytest.mark.pictures
@pytest.mark.parametrize(
    "risk", [[1e300, -1e300, 5e-324, 0.0], [0.5] * 4, [np.nan] * 4], ids=["extreme", "equal", "none"]
)
def test_any_risks_make_a_page(tmp_path: Path, risk: list[float]) -> None:
    seen = Seen(page_of(tmp_path, [row("a", "b" * k) for k in range(1, 5)], risk=risk))
    assert len(seen.texts) == 2 * int(np.isfinite(risk).sum())


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [*make_rows(20), {"id": 20, "instruction": HOSTILE, "output": ""}])
    return tmp_path


def read(home: str) -> str:
    return Path(home, "report.html").read_text(encoding="utf-8")


def test_every_kind_of_run_leaves_its_page(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, explain=2)
    score_dataset("in.jsonl", "all.parquet", Scoring(scorer=scorer))
    select_dataset("all.parquet", "cut", Cut.of(drop_count=4, per_group="id"))
    filtered, scored, selected = map(read, ("out/_sqsd", "all.parquet.sqsd", "cut/_sqsd"))
    assert "<h1>3 of 21 rows dropped</h1>" in filtered
    assert "tiny (" in filtered
    assert filtered.count("these words carry most") == 2
    assert "<h1>21 rows with their risk</h1>" in scored
    assert '<article class="riskiest">' in scored
    assert "Kept" not in scored
    assert "21 rows were read: 20 have a risk, 1 could not be scored." in scored
    assert "The risk was in the input." in selected
    assert "group of rows with the same id" in selected
    for page in (filtered, scored, selected):
        assert "in.jsonl, line 21: column" in page or "all.parquet" in page
        assert len(Seen(page).texts) == 40
        assert "Measured on 20 rows" in page


def test_rows_that_are_kept_without_a_risk_are_counted_as_such(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer, on_error="keep")
    counts = "21 rows were read: 18 were kept, 3 dropped, 1 could not be scored (kept anyway: 1)."
    assert counts in read("out/_sqsd")


def test_a_cut_of_scored_files_reads_rows_as_they_were_scored(folder: Path, tiny_pack: Path) -> None:
    write_jsonl(folder / "in.jsonl", [{"q": f"Question {k}?", "a": f"Answer {k}."} for k in range(8)])
    scorer = SQSDScorer(tiny_pack, columns=Columns(prompt="q", answer="a"))
    score_dataset("in.jsonl", "all.parquet", Scoring(scorer=scorer))
    select_dataset("all.parquet", "known", Cut.of(drop_count=2))
    Path("all.parquet").rename("alone.parquet")
    select_dataset("alone.parquet", "guessed", Cut.of(drop_count=2))
    assert "Measured on 8 rows" in read("known/_sqsd")
    assert "No answer could be measured" in read("guessed/_sqsd")


def test_the_page_is_made_again_only_from_files_of_the_run(folder: Path, scorer: SQSDScorer) -> None:
    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    before = read("out/_sqsd")
    (folder / "in.jsonl").unlink()
    Path("out/_sqsd/report.html").unlink()
    Path("out/_sqsd/plots").mkdir()
    Path("out/_sqsd/plots/old.png").write_bytes(b"")
    page, *plots = remake_page(Path("out"))
    assert page.read_text(encoding="utf-8") == before
    assert {path.name for path in plots} == {path.name for path in page.parent.glob("plots/*")}
    assert [Image.open(path).format for path in plots] == ["PNG"] * 2


def test_what_is_no_finished_run_is_one_sentence(folder: Path, scorer: SQSDScorer) -> None:
    with pytest.raises(InputError, match="out holds no finished run"):
        remake_page(Path("out"))


def test_a_run_at_work_is_waited_for(folder: Path) -> None:
    Path("out/_sqsd").mkdir(parents=True)
    with (
        lock_run(Path("out/_sqsd/lock"), "out"),
        pytest.raises(DestinationExists, match="Another run is writing to out right now: wait for it"),
    ):
        remake_page(Path("out"))


@pytest.mark.parametrize("left", [None, "{", "[]", "[1]", '{"riskiest": 3}'], ids=str)
def test_a_run_without_sound_notes_makes_them_again_as_the_error_says(
    folder: Path, scorer: SQSDScorer, left: str | None
) -> None:
    def run() -> FinishedReport:
        return filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)

    run()
    before, notes = read("out/_sqsd"), Path("out/_sqsd/notes.json")
    remake_page(Path("out"))
    notes.unlink() if left is None else notes.write_text(left)
    with pytest.raises(InputError, match="start the same run again; its scores are kept") as refused:
        remake_page(Path("out"))
    if "delete notes.json" in str(refused.value):
        notes.unlink()
    report = run()
    assert "already_done" not in report
    assert report["rows"]["scored"] == 20
    assert not Path("out/_sqsd/plots").exists()
    assert remake_page(Path("out"))[0].read_text(encoding="utf-8") == before
    assert run()["already_done"]


def test_a_full_disk_costs_the_page_and_not_the_run(
    folder: Path, scorer: SQSDScorer, caplog: pytest.LogCaptureFixture
) -> None:
    filter_dataset("in.jsonl", "whole", drop_count=3, scorer=scorer)
    sizes = {path.name: path.stat().st_size for path in Path("whole").rglob("*") if path.is_file()}
    room = sizes.pop("report.html") - 1
    assert max(sizes.values()) < room
    with caplog.at_level(logging.WARNING, "sqsd_filter"), small_disk(room):
        report = filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    assert report["status"] == "ok"
    assert read_report(Path("out"))["rows"]["kept"] == 17
    assert not list(Path("out/_sqsd").glob("*report.html*"))
    (said,) = [record.message for record in caplog.records if record.name.startswith("sqsd_filter")]
    assert said.startswith("The page can't be written (")
    assert "Make room and start the same command again." in said
    with (
        pytest.raises(SQSDError, match=r"No page can be written to out/_sqsd .*check the free"),
        small_disk(room),
    ):
        remake_page(Path("out"))
    assert remake_page(Path("out"))[0].read_text(encoding="utf-8") == read("whole/_sqsd")


@pytest.mark.parametrize("private", [True, False])
def test_no_push_takes_the_page_or_its_texts_along(folder: Path, scorer: SQSDScorer, hub: Hub, private: bool) -> None:
    secret = "a text that only a dropped row has"
    write_jsonl(folder / "in.jsonl", [*make_rows(9), {"id": 9, "instruction": "?", "output": secret}])
    push = PushTo("org/out", private=private, rows=["kept"])
    filter_dataset("in.jsonl", "out", drop_count=10, scorer=scorer, push=push)
    assert "this page is never pushed to a dataset of the Hub" in read("out/_sqsd")
    assert secret in read("out/_sqsd")
    assert secret in Path("out/_sqsd/notes.json").read_text()
    files = hub.files("org/out")
    assert "_sqsd/report.json" in files
    assert {"_sqsd/report.html", "_sqsd/notes.json"}.isdisjoint(files)
    assert not [name for name, content in files.items() if secret.encode() in content]


def test_a_bucket_that_has_all_rows_has_the_page_too(folder: Path, scorer: SQSDScorer) -> None:
    import fsspec

    filter_dataset("in.jsonl", "out", drop_count=3, scorer=scorer)
    filter_dataset("in.jsonl", "memory://pages/out", drop_count=3, scorer=scorer)
    there: Any = fsspec.filesystem("memory")
    assert there.cat("/pages/out/_sqsd/report.html").decode() == read("out/_sqsd")
    assert json.loads(there.cat("/pages/out/_sqsd/notes.json"))
    there.rm("/pages", recursive=True)
