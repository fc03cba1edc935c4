"""Every script in recipes/ is run by a test. A new script needs a test, and its line here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recipes.scripts import RECIPES

TESTED_IN = {
    "benchmarks/random_pack.py": "test_benchmarks.py",
    "benchmarks/scale.py": "test_benchmarks.py",
    "benchmarks/speed.py": "test_benchmarks.py",
    "conformance/compare.py": "test_conformance.py",
    "conformance/trainers.py": "test_conformance.py",
    "drift/dolly.py": "test_drift.py",
    "judge/train.py": "test_judge.py",
    "packs/smollm2-135m/answers.py": "test_known_rows.py",
    "packs/smollm2-135m/beyond.py": "test_known_rows.py",
    "packs/smollm2-135m/known_rows.py": "test_known_rows.py",
    "packs/smollm2-135m/prepare.py": "test_packs.py",
    "packs/smollm2-135m/refusals.py": "test_packs.py",
    "packs/smollm2-135m/sweep.py": "test_packs.py",
    "packs/smollm2-135m/trials.py": "test_known_rows.py",
    "paper/small/contaminated.py": "test_contaminated.py",
    "paper/small/obedient.py": "test_contaminated.py",
    "paper/small/study.py": "test_paper.py",
    "paper/small/tables.py": "test_paper.py",
    "robustness/kills.py": "test_robustness.py",
    "robustness/million.py": "test_robustness.py",
    "robustness/mutate.py": "test_robustness.py",
    "robustness/mutations.py": "test_robustness.py",
    "robustness/nightly.py": "test_robustness.py",
    "robustness/second_parser.py": "test_robustness.py",
    "robustness/table.py": "test_robustness.py",
    "robustness/workbench.py": "test_robustness.py",
    "slurm/filter.sbatch": "test_slurm.py",
}


def test_every_script_has_a_test() -> None:
    scripts = [path for ending in ("py", "sh", "sbatch") for path in RECIPES.rglob(f"*.{ending}")]
    assert sorted(path.relative_to(RECIPES).as_posix() for path in scripts) == sorted(TESTED_IN)


@pytest.mark.parametrize("script", TESTED_IN)
def test_a_script_is_loaded_in_the_file_that_runs_it(script: str) -> None:
    text = (Path(__file__).with_name(TESTED_IN[script])).read_text(encoding="utf-8")
    assert re.search(rf'["/]{Path(script).stem}(\.\w+)?"', text)  # a word of a sentence would not do
