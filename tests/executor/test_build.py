"""Compiling the kernels in C: kept where that works, done alone where not, and told apart what went wrong."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import pytest
from batchllm_kernels.cpu import build

pytestmark = pytest.mark.skipif(not build.compilers(), reason="needs a C compiler")


@pytest.fixture(autouse=True)
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One function in place of the kernels, for any CPU."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "seven.c").write_text("int seven(void) { return 7; }\n")
    monkeypatch.setattr(build, "_FOLDER", folder)
    monkeypatch.setattr(build, "_INSTRUCTIONS", [])
    monkeypatch.setattr(build, "cpu_has_bfloat16_products", lambda: True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def works(folder: Path) -> bool:
    found = build.library.__wrapped__(folder)
    assert not isinstance(found, str), found
    return bool(found.seven() == 7)


def reason(folder: Path) -> str:
    found = build.library.__wrapped__(folder)
    assert isinstance(found, str)
    return found


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The outputs of every compilation from now on."""
    found: list[str] = []
    run = build._run
    monkeypatch.setattr(build, "_run", lambda command: [found.append(command[-2]), run(command)])
    return found


def test_compiled_once_and_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = count_compilations(monkeypatch)
    assert works(tmp_path / "kernels") and works(tmp_path / "kernels")
    assert len(compilations) == 1
    (library,) = (tmp_path / "kernels").iterdir()
    assert library.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert works(tmp_path / "file" / "kernels")
    assert not list(tmp_path.glob("batchllm-*")), "nothing is left behind"


def test_a_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(tmp_path / "kernels")
    (library,) = (tmp_path / "kernels").iterdir()
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / library.name).write_bytes(b"of another machine")
    compilations = count_compilations(monkeypatch)
    assert works(folder)
    assert len(compilations) == 1
    assert [path.read_bytes() for path in folder.iterdir()] == [b"of another machine"]


def test_a_folder_that_nothing_can_be_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, folder = ctypes.CDLL, tmp_path / "kernels"

    def refuse(path: str) -> ctypes.CDLL:
        if path.startswith(str(folder)):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert works(folder)
    folder = tmp_path
    assert "could not be kept or loaded: failed to map" in reason(folder / "kernels")


@pytest.mark.parametrize("links", [True, False])
def test_what_another_process_has_compiled_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    run, theirs = build._run, []

    def slow(command: list[str]) -> None:
        run(command)
        if not theirs:
            theirs.append(None)
            assert works(tmp_path / "kernels")
            theirs[0] = next((tmp_path / "kernels").glob("kernels-*.so")).stat().st_ino

    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(build, "_run", slow)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert works(tmp_path / "kernels")
    (library,) = (tmp_path / "kernels").iterdir()
    assert (library.stat().st_ino == theirs[0]) == links


def test_the_next_compiler_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "printf 'in a function:\\nfew.h:54: error: a constant is needed\\n' >&2; exit 1"
    broken = compiler(tmp_path / "broken", complaint)
    monkeypatch.setenv("CC", broken)
    assert works(tmp_path / "kernels")
    monkeypatch.setattr(build, "compilers", lambda: [broken, compiler(tmp_path / "other", "exit 1")])
    assert reason(tmp_path / "nothing") == (
        f"{broken} could not compile them: few.h:54: error: a constant is needed"
    )
    assert not list((tmp_path / "nothing").iterdir())


def test_a_compiler_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = compiler(tmp_path / "cc", "")
    Path(garbage).write_bytes(b"\x7fELF")
    monkeypatch.setattr(build, "compilers", lambda: [garbage])
    assert f"{garbage} could not compile them: " in reason(tmp_path / "kernels")
