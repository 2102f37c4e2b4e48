"""README and docs tell the truth: names, defaults, commands and links are those of the code."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI
from pydantic import BaseModel, Field

from docs.generate import PARTS, render_page
from docs.openapi import render_openapi
from emo_serve import metrics
from emo_serve.cli.main import main
from emo_serve.cli.pools import add_pools_parser
from emo_serve.config import add_serve_flags

ROOT = Path(__file__).resolve().parents[3]
DOCS = sorted((ROOT / "docs").glob("*.md"))
READMES = [
    ROOT / name
    for name in (
        "README.md",
        "benchmarks/README.md",
        "kernels/README.md",
        "deploy/README.md",
        "emo_serve/demo/README.md",
        "CHANGELOG.md",
    )
]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*READMES, *DOCS)}
OPERATING = PAGES["docs/operating.md"]

each_page = pytest.mark.parametrize("page", PAGES)


def test_the_readme_stays_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


# -- metrics, flags, commands --


def test_it_lists_every_metric_and_no_other() -> None:
    listed = set(re.findall(r"^\| `(emo_serve_\w+)", PAGES["docs/metrics.md"], re.M))
    assert metrics.__doc__ is not None
    assert listed == set(re.findall(r"^    (emo_serve_\w+)", metrics.__doc__, re.M))


def test_no_page_names_a_metric_that_is_not_there() -> None:
    named = set(re.findall(r"`(emo_serve_\w+)", "\n".join(PAGES.values())))
    assert metrics.__doc__ is not None
    assert named - {"emo_serve_"} <= set(re.findall(r"^    (emo_serve_\w+)", metrics.__doc__, re.M))


def test_it_lists_every_flag_of_serve_with_its_default() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_serve_flags(parser)
    for action in parser._actions:
        (flag,) = action.option_strings
        lines = PAGES["docs/flags.md"].splitlines()
        rows = [row for row in lines if re.match(rf"\| `{flag}[ `]", row)]
        assert len(rows) == 1, flag
        if action.default:
            default = rows[0].rsplit("|", 2)[1]
            assert default.strip(" `") == str(action.default), rows


def pools_commands() -> dict[str, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    add_pools_parser(subparsers)
    (actions,) = (
        action
        for action in subparsers.choices["pools"]._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(actions.choices)


def test_it_shows_every_command_that_asks_a_server() -> None:
    for command in ("list", "show", "usage", "load", "evict", "pin", "add", "build", "remove"):
        assert re.search(rf"emo-serve pools {command} .*--server URL", OPERATING), command
    assert "# and unpin" in OPERATING


def test_it_shows_every_command_of_pools_and_no_other() -> None:
    named = set(re.findall(r"emo-serve pools (\w+)", "\n".join(PAGES.values())))
    assert named | {"unpin"} == set(pools_commands())


def test_every_flag_shown_of_a_pools_command_exists() -> None:
    commands = pools_commands()
    for page, text in PAGES.items():
        for command, rest in re.findall(r"emo-serve pools (\w+)([^`\n#]*)", text):
            known = {name for a in commands[command]._actions for name in a.option_strings}
            assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= known, (page, command, rest)


def test_every_command_of_emo_serve_that_a_page_names_exists(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    for command in set(re.findall(r"`emo-serve (\w+)", "\n".join(PAGES.values()))):
        assert re.search(rf"^    {command}(?: |$)", help_text, re.M), command


@each_page
def test_every_module_that_a_page_runs_is_there(page: str) -> None:
    for module in re.findall(r"python3? -m ([\w.]+)", PAGES[page]):
        name = module.replace(".", "/")
        files = (f"{name}.py", f"{name}/__main__.py", f"kernels/{name}.py")
        assert any((ROOT / file).is_file() for file in files), module
    for script in re.findall(r"python3? ([\w/]+\.py)", PAGES[page]):
        assert (ROOT / script).is_file(), script


@each_page
def test_every_flag_of_a_benchmark_that_a_page_shows_is_there(page: str) -> None:
    commands = PAGES[page].replace("\\\n", " ")
    for module, rest in re.findall(r"python -m (benchmarks[\w.]+)([^`\n#]*)", commands):
        place = ROOT / module.replace(".", "/")
        file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        source = file.read_text()
        for flag in re.findall(r"--[a-z][a-z-]*", rest):
            assert f'"{flag}"' in source or flag == "--help", (module, flag)


@each_page
def test_every_target_of_make_that_a_page_names_is_there(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    named = set(re.findall(r"(?:`|^    |\n)make ([a-z]+)", PAGES[page]))
    assert named <= targets


@each_page
def test_every_test_that_a_page_runs_is_there(page: str) -> None:
    for arguments in re.findall(r'ARGS="?([^"`\n]*)', PAGES[page]):
        for path in re.findall(r"\btests/[\w/.]*\w", arguments):
            assert (ROOT / path).exists(), path


@each_page
def test_every_path_of_the_repository_that_a_page_names_is_there(page: str) -> None:
    folders = "emo_serve|benchmarks|kernels|tests|docs|deploy|requirements"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", PAGES[page]):
        here = (ROOT / page).parent / path
        assert (ROOT / path).exists() or here.exists(), path


# -- links --


def slugs_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs both make them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@each_page
def test_every_relative_link_leads_somewhere(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in slugs_of(path.read_text()), target


def test_the_navigation_holds_every_page() -> None:
    # mkdocs.yml names no Python objects, so the safe loader reads it.
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = re.findall(r"[\w-]+\.md", str(site["nav"]))
    assert len(named) == len(set(named))
    assert {path.name for path in DOCS} <= set(named)


# -- what is generated --


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_generated_parts_are_fresh(path: Path) -> None:
    assert render_page(path.read_text()) == path.read_text(), "stale: run `make docs`"


def test_every_generated_part_stands_on_one_page() -> None:
    marked = re.findall(r"<!-- generated: (\S+) -->", "\n".join(PAGES.values()))
    assert sorted(marked) == sorted(PARTS)


class Answer(BaseModel):
    size: int = Field(description="in bytes")


def test_the_http_api_names_every_status_and_field() -> None:
    app = FastAPI()

    @app.get("/size/{name}", responses={409: {"description": "not now"}})
    async def size(name: str, whole: bool = False) -> Answer:
        """Tell the size."""
        raise NotImplementedError

    text = render_openapi(app.openapi())
    assert "### GET /size/{name}\n\nTell the size." in text
    assert "| `whole` | query | boolean | default `false` |" in text
    assert "| 200 | OK: [Answer](#answer) |\n| 409 | not now |" in text
    assert "### Answer\n\n| field |" in text
    assert "| `size` | integer | in bytes |" in text
    assert "ValidationError" not in text


# -- the source tree --


def test_the_tree_names_every_package() -> None:
    drawn: set[str] = set()
    folders: list[str] = []
    section = PAGES["docs/architecture.md"].partition("## The source tree")[2]
    for line in section.split("```")[1].splitlines():
        match = re.match(r"( *)([\w.]+)(/?)", line)
        if match and match[2]:
            depth = len(match[1]) // 2
            folders = [*folders[:depth], match[2]]
            drawn.add("/".join(folders))
    for path in drawn:
        assert (ROOT / path).exists(), path
    packages = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("emo_serve", "kernels", "benchmarks")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert packages <= drawn
