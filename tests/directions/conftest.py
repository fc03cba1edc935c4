"""A recipe, and the pack that is built from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqsd_filter.directions.build import build_pack
from sqsd_filter.directions.recipe import PackRecipe
from tests.directions.recipes import write_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_pack: Path) -> Path:
    return write_recipe(tmp_path, tiny_pack / "base")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> Path:
    folder = tmp_path_factory.mktemp("built")
    return build_pack(PackRecipe.load(write_recipe(folder, tiny_pack / "base")), folder / "pack").path
