"""A folder of files, on this disk or behind a URL."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sqsd_filter.storage.folder import Folder


def test_a_file_url_is_a_folder_and_other_servers_get_files_by_renaming(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}/scores")
    assert folder.local == tmp_path / "scores"
    folder.write("a", lambda sink: sink.write(b"1"))
    assert Folder(tmp_path / "scores").names() == ["a"]

    class Server(MemoryFileSystem):  # type: ignore[misc]  # fsspec is not typed
        protocol = "server"
        moved: ClassVar[list[str]] = []

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("server://").strip("/")

        def mv(self, source: str, target: str) -> None:  # as sftp's, which takes no options
            self.moved.append(target)
            super().mv(source, target)

    fsspec.register_implementation("server", Server, clobber=True)
    plain = Folder("server://host/scores")
    plain.write("b", lambda sink: sink.write(b"2"))
    assert plain.names() == ["b"]
    assert plain.has("b")
    assert not plain.has("c")
    assert plain.read("b").to_pybytes() == b"2"
    assert [name.rsplit("/")[-1] for name in Server.moved] == ["b"]
    with pytest.raises(FileNotFoundError):
        plain.read("c")


def test_a_folder_names_its_files_and_no_others(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new")
    assert folder.names() == []
    folder.write("b", lambda sink: sink.write(b"22"))
    folder.write("a", lambda sink: sink.write(b"1"))
    (tmp_path / "new" / ".hidden").touch()
    (tmp_path / "new" / "folder").mkdir()
    assert folder.names() == ["a", "b"]
    assert folder.read("b").to_pybytes() == b"22"
    folder.delete("a")
    folder.delete("a")
    assert folder.names() == ["b"]
