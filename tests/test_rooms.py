"""The rooms of the package: imports run one way, and no modules import each other in a circle.

All imports count, also those inside functions and those for types only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

import sqsd_filter

PACKAGE = Path(sqsd_filter.__file__).parent
FLOORS = (  # from top to bottom; a room imports from itself and from lower floors, never from a room beside it
    {"__init__", "__main__"},
    {"cli"},
    {"evaluation"},
    {"directions"},
    {"pipeline", "judges"},
    {"scoring"},
    {"corpus"},
    {"pictures"},
    {"storage"},
    {"errors", "progress", "statistics", "wording"},
)

Imports = Mapping[str, Set[str]]  # of each module, those of the package that it imports, all without the package's name


def imports_of(package: Path) -> Imports:
    """All imports between the modules of the package; a package stands for its `__init__`."""
    paths = {_name(path.relative_to(package)): path for path in sorted(package.rglob("*.py"))}
    return {name: set(_imported(package, path, paths.keys())) - {name} for name, path in paths.items()}


def _name(path: Path) -> str:
    """`scoring/scorer.py` is scoring.scorer, `scoring/__init__.py` scoring, and the root's `__init__.py` __init__."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _imported(package: Path, path: Path, modules: Set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            within = path.relative_to(package.parent).parts[: -node.level] if node.level else ()
            base = ".".join([*within, *([node.module] if node.module else [])])
            named = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            root, _, rest = name.partition(".")
            if root == package.name and rest != "__version__":  # the one name that is not from a room
                yield _module(rest, modules)


def _module(name: str, modules: Set[str]) -> str:
    """The module that `name` is, or is a member of."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or "__init__"


def forbidden(imports: Imports) -> list[str]:
    """The imports that do not run down, as sentences. Raises `KeyError` for a room that has no floor."""
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {module: module.partition(".")[0] for module in imports}
    return [
        f"{module} imports {imported}"
        for module, targets in imports.items()
        for imported in sorted(targets)
        if rooms[module] != rooms[imported] and floors[rooms[module]] >= floors[rooms[imported]]
    ]


def circles(imports: Imports) -> list[set[str]]:
    """The largest sets of modules each of which reaches all others of its set by imports (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    circles: list[set[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        path.append(module)
        for imported in sorted(imports[module]):
            if imported not in order:
                visit(imported)
            if imported in path:
                low[module] = min(low[module], low[imported])
        if low[module] == order[module]:
            circle = path[path.index(module) :]
            del path[path.index(module) :]
            if len(circle) > 1:
                circles.append(set(circle))

    for module in imports:
        if module not in order:
            visit(module)
    return circles


def test_imports_run_down() -> None:
    assert forbidden(imports_of(PACKAGE)) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(imports_of(PACKAGE)) == []


# ---------------------------------------------------------------------------------------------- the checker itself


def write_package(folder: Path, **modules: str) -> Imports:
    """The imports of a made-up package: each module's source by its name, with two underscores for a dot."""
    package = folder / "house"
    for name, source in {"__init__": "", **modules}.items():
        path = package / f"{name if name == '__init__' else name.replace('__', '/', 1)}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return imports_of(package)


@pytest.mark.parametrize(
    "source",
    [
        "from house.cli.main import run",
        "from house.cli import main",
        "import house.cli.main",
        "from ..cli.main import run",
        "from ..cli import main",
        "def late():\n    import house.cli.main",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.cli.main import Command",
    ],
    ids=["name", "module", "import", "relative name", "relative module", "in a function", "for types"],
)
def test_an_import_from_above_is_seen_however_it_is_written(tmp_path: Path, source: str) -> None:
    imports = write_package(tmp_path, cli__main="import house.scoring.engine", scoring__engine=source)
    assert forbidden(imports) == ["scoring.engine imports cli.main"]
    assert circles(imports) == [{"scoring.engine", "cli.main"}]


def test_rooms_beside_each_other_do_not_import_each_other(tmp_path: Path) -> None:
    imports = write_package(
        tmp_path, pipeline__run="from house.judges import phrases", judges__phrases="import house.errors", errors=""
    )
    assert forbidden(imports) == ["pipeline.run imports judges.phrases"]
    assert circles(imports) == []


def test_imports_within_a_room_and_from_lower_rooms_are_fine(tmp_path: Path) -> None:
    imports = write_package(
        tmp_path,
        pipeline__run="from house.pipeline.job import Job\nfrom house.scoring import engine\nimport numpy",
        pipeline__job="from house.errors import InputError",
        scoring__engine="from house import errors",
        errors="",
    )
    assert imports["pipeline.run"] == {"pipeline.job", "scoring.engine"}
    assert forbidden(imports) == []
    assert circles(imports) == []


def test_a_long_circle_is_found_whole_and_alone(tmp_path: Path) -> None:
    imports = write_package(
        tmp_path,
        corpus__a="import house.corpus.b",
        corpus__b="import house.corpus.c\nimport house.corpus.d",
        corpus__c="import house.corpus.a",
        corpus__d="",
    )
    assert circles(imports) == [{"corpus.a", "corpus.b", "corpus.c"}]


def test_the_members_of_a_package_are_those_of_its_init(tmp_path: Path) -> None:
    imports = write_package(tmp_path, judges____init__="REFUSED = 1", cli__main="from house.judges import REFUSED")
    assert imports["cli.main"] == {"judges"}
