"""The scripts that make and judge the built-in pack's linear probe, on tiny models and made-up, harmless rows."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.statistics import auc
from tests.compass import QUESTIONS
from tests.corpora import write_jsonl
from tests.recipes.scripts import OPEN_DATA, load_script

RECIPE = "packs/smollm2-135m"
WORDS = "the quick brown fox jumps over the lazy dog and the user asks the assistant again about it"


def compressed(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The open data with a few more kinds of rows, and answers as answers.py writes them."""
    folder = tmp_path / "open"
    folder.mkdir()
    for row in (rows := [dict(row) for row in OPEN_DATA["judged-completions"]]):
        row["model"] = "fox"
    dolly = OPEN_DATA["dolly-15k"]
    long = [{"instruction": f"Describe {k}", "context": "", "response": f"{WORDS}\u2028{k}"} for k in range(200)]
    completions = [dict(row) for row in OPEN_DATA["xstest-completions"]]
    agreed = [
        {"prompt": f"contrast {k}?", "type": "contrast_a", "label": "1_full_compliance", "response": f"Yes {k}, do."}
        for k in range(20)
    ]
    prompts = [{"prompt": f"Write {k}.", "source": "AdvBench", "harmful": True} for k in range(150)]
    chats = [
        {"context": f"\n\nHuman: May I ask about number {k}?\n\nAssistant:", "chosen": f"No {k}", "rejected": "y" * 20}
        for k in range(20)
    ]
    pairs = [{"prompt": f"Pair of {k}?", "response": f"Answer {k}."} for k in range(20)]
    files = {
        **OPEN_DATA,
        "judged-completions": rows,
        "dolly-15k": [*dolly[:400], *long],
        "xstest-completions": [*completions, *agreed],
        "harmful-prompts": [*OPEN_DATA["harmful-prompts"], *prompts],
        "hh-harmless-pairs": chats,
        "pure-bad-100": pairs,
        "safety-answers": pairs,
    }
    for name, content in files.items():
        compressed(folder / f"{name}.jsonl.gz", content)
    inner = archive(
        {
            f"hutto_ICWSM_2014/{name}_GroundTruth.txt": "".join(f"{k}\t{k - 9.5}\t{WORDS} {k}\n" for k in range(20))
            for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
        }
    )
    resource = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    (folder / "vaderSentiment-3.3.2.tar.gz").write_bytes(archive({resource: inner}))
    (tmp_path / "data").mkdir()
    kinds = [("unsafe", "short"), ("unsafe", "long"), ("benign", "short"), ("safe", "refusal")]
    answers = [
        {
            "kind": kind,
            "source": "smollm2",
            "form": form,
            "prompt": f"Ask {kind} {form} {k}",
            "response": f"{WORDS} {k}",
        }
        for kind, form in kinds
        for k in range(8)
    ]
    answers += [{**row, "source": "asked", "prompt": f"May I {row['prompt']}"} for row in answers[:8]]
    write_jsonl(tmp_path / "data" / "answers.jsonl", answers)
    return folder


def archive(files: dict[str, str | bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            raw = content.encode() if isinstance(content, str) else content
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return packed.getvalue()


def script(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> ModuleType:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    module = load_script(f"{RECIPE}/{name}.py", monkeypatch)
    for imported in ("prepare", "study"):
        if imported in sys.modules:
            monkeypatch.delitem(sys.modules, imported)
    return module


def made(data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """What prepare.py and known_rows.py write, with a few rows of each kind."""
    out = data.with_name("data")
    prepared = script("prepare", monkeypatch, data, out)
    module = script("known_rows", monkeypatch, data, out)
    small = {"INITIAL_ROWS": 40, "DOLLY_TO_ALIGN": 5, "ADVBENCH_TO_ALIGN": 20, "SPLITS": {"val": 6, "test": 10}}
    for name, value in small.items():
        for each in (prepared, module.prepare, module.study.prepare):
            monkeypatch.setattr(each, name, value)
    monkeypatch.setattr(module.study, "CORPORA", {"dolly": 100, "gsm8k": 50})
    monkeypatch.setattr(module, "COUNTS", dict.fromkeys(module.COUNTS, 6))
    monkeypatch.setattr(module, "OWN", {"short": 5, "long": 3})
    prepared.main()
    module.main()
    return {path.stem: [json.loads(line) for line in path.open(encoding="utf-8")] for path in out.glob("*.jsonl")}


def test_known_rows_are_of_many_sources_and_none_is_judged_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = made(data, monkeypatch)
    rows = files["known"]
    assert {(row["kind"], row["source"]) for row in rows if row["use"] == "fit"} == {
        *(("unsafe", name) for name in ("judged", "xstest", "smollm2", "asked", "hh", "bare")),
        *(("safe", name) for name in ("judged", "xstest", "smollm2", "hh")),
        *(("benign", name) for name in ("dolly", "gsm8k", "labels", "smollm2", "xstest", "bare")),
    }
    assert {row["source"] for row in rows if row["use"] == "judge"} == {"pure-bad", "safety-answers", "vader", "dolly"}
    assert sum((row["kind"], row["source"]) == ("unsafe", "smollm2") for row in rows) == 8
    judged_on = {row["prompt"] for name in ("val", "test") for row in files[name]}
    assert not judged_on & {row["prompt"] for row in rows if row["use"] == "fit"}
    assert any(row["prompt"].startswith("Below is an instruction") for row in rows)
    references = [row for name in ("dolly", "gsm8k", "labels") for row in files[f"reference-{name}"]]
    assert len(references) >= 12
    used = {row["prompt"] for name, each in files.items() if "reference" not in name for row in each if "prompt" in row}
    assert not used & {row["prompt"] for row in references}
    labels = {row["response"] for row in files["reference-labels"]}
    assert all(" " not in label for label in labels)


def test_the_same_data_give_the_same_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(data, monkeypatch)
    assert made(data, monkeypatch) == first


def test_a_model_answers_what_it_refuses_or_not(compass: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("answers", monkeypatch)
    monkeypatch.setattr(module, "TOKENS", {"short": 8, "long": 8, "refusal": 12})
    rows = module.answers(load_pack(compass), QUESTIONS * 200, QUESTIONS * 60, QUESTIONS * 100)
    kinds = {(row["kind"], row["source"], row["form"]) for row in rows}
    assert kinds == {
        *(("benign", "smollm2", form) for form in ("short", "long")),
        *(("unsafe", source, form) for source in ("smollm2", "asked") for form in ("short", "long")),
        ("safe", "smollm2", "refusal"),
    }
    for row in rows:
        assert row["prompt"] in QUESTIONS  # without what was asked for besides
        assert row["response"].strip()
        if row["kind"] != "benign":
            assert module.is_refusal(row["response"]) == (row["kind"] == "safe")


def test_prompts_that_models_are_judged_on_get_no_answer(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(data, monkeypatch)
    module = script("answers", monkeypatch)
    monkeypatch.setattr(module.study, "CORPORA", {"dolly": 100, "gsm8k": 50})
    harmful, harmless = module.prompts(data)
    studied = module.study.study_rows(data)["harmful"][:100]
    apart = {row["prompt"] for row in studied} | {row["prompt"] for row in OPEN_DATA["judged-completions"]}
    assert len(apart) > 100
    assert harmful
    assert harmless
    assert not apart & set(harmful)
    assert len(set(harmful)) == len(harmful)


def test_harmful_questions_of_chats_are_found(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("answers", monkeypatch)
    chats = [
        {"context": f"\n\nHuman: {question} {k}, please, now!\n\nAssistant:", "chosen": "No", "rejected": "Yes"}
        for question in ("Bad", "Say")
        for k in range(60)
    ]
    chats.append({"context": "\n\nHuman: Bad one!\n\nAssistant: No.\n\nHuman: Bad two, please!\n\nAssistant:"})
    compressed(data / "hh-harmless-pairs.jsonl.gz", chats)
    found = module.chats(data)
    assert found
    assert all(question.startswith("Bad ") for question in found)
    assert "Bad two, please!" not in found  # it has turns before
    assert len(set(found)) == len(found)


def test_risks_are_compared_on_the_same_rows(
    data: Path, tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(data, monkeypatch)
    out, work = tmp_path / "beyond.json", tmp_path / "work"
    arguments = (data.with_name("data"), work, "--pack", tiny_pack, "--rows", 3, "--out", out)
    module = script("beyond", monkeypatch, *arguments, "--risks", "own,length,bi-anchor")
    module.main()
    result = json.loads(out.read_text())
    assert set(result) == {"own", "length", "bi-anchor"}
    risks = module.scored(work, "length", "", str(tiny_pack), "float32")
    for found in result.values():
        assert found["rows"] == {name: len(values) for name, values in risks.items()}
        assert set(found["rows"]) == set(module.GROUPS)
    length = result["length"]
    assert length["auc"]["pure-bad"]["dolly"] == round(auc(risks["pure-bad"], risks["dolly"]), 4)
    benign = np.concatenate([risks[n] for n in ("dolly", "gsm8k", "labels", "reviews", "news")])
    above = {name: (risks[name] > np.sort(benign)[-1]).mean() for name in risks}
    assert length["above"]["99 %"] == pytest.approx(above, abs=1e-4)
    scores = {name: path.stat().st_mtime_ns for name in result if (path := work / f"{name}.parquet")}
    module.main()  # nothing is scored again
    assert scores == {name: (work / f"{name}.parquet").stat().st_mtime_ns for name in result}
    assert json.loads(out.read_text()) == result


def test_precision_is_that_of_a_corpus_with_planted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("beyond", monkeypatch)
    rng = np.random.default_rng(0)
    unsafe, benign = rng.normal(2, 1, 50_000), rng.normal(0, 1, 950_000)
    above = [risks > 2 for risks in (unsafe, benign)]
    by_counting = above[0].sum() / (above[0].sum() + above[1].sum())
    assert module.precision(above[0].mean(), above[1].mean()) == pytest.approx(by_counting, abs=1e-9)
    assert module.precision(0.0, 0.0) == 0.0


def test_a_trial_scores_sources_that_it_has_not_seen(
    data: Path, tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = made(data, monkeypatch)
    out = tmp_path / "trials.json"
    module = script("trials", monkeypatch, data.with_name("data"), tmp_path / "w", "--pack", tiny_pack, "--out", out)
    monkeypatch.setattr(module, "LAYERS", (1, 2))
    others = {"dolly": 1.0, "gsm8k": 1.0}
    few = {
        "as built": module.Trial(layers=(1, 2)),
        "fewer": module.Trial(others=others, layers=(2,), read=(module.START,)),
    }
    monkeypatch.setattr(module, "TRIALS", few)
    module.main()
    result = json.loads(out.read_text())
    assert list(result) == list(few)
    groups = {module.group(row) for row in files["known"]}
    assert {*module.OTHERS, *module.EASY} <= groups
    for found in result.values():
        assert {each["source"] for each in found["sources"]} >= {"judged", "xstest", "smollm2", "asked", "pure-bad"}
        for each in found["sources"]:
            assert set(each["auc"]) <= groups
            assert 0 <= each["above"] <= 1
        assert {"looks unsafe", "safety-answers"} <= set(found["others"]) <= groups
    counts = {each["source"]: each["rows"] for each in result["as built"]["sources"]}
    assert counts["pure-bad"] == sum(row["source"] == "pure-bad" for row in files["known"])
    assert module.plan(few["fewer"], files["known"]).weight[[r["use"] == "judge" for r in files["known"]]].sum() == 0


def test_a_template_does_not_make_another_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, known = script("trials", monkeypatch), script("known_rows", monkeypatch)
    for template in (known.ALPACA, known.QUESTION, "{}"):
        assert trials.bare(template.format("What is\n\nred?")) == "What is\n\nred?"
