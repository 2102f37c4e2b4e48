"""The README names what there is: every metric, every flag, every command of the terminal."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from emo_serve import metrics
from emo_serve.cli.pools import add_pools_parser
from emo_serve.config import add_serve_flags

README = (Path(__file__).resolve().parents[3] / "README.md").read_text()


def test_it_lists_every_metric_and_no_other() -> None:
    listed = set(re.findall(r"`(emo_serve_\w+)", README))
    assert metrics.__doc__ is not None
    assert listed == set(re.findall(r"^    (emo_serve_\w+)", metrics.__doc__, re.M))


def test_it_lists_every_flag_of_serve_with_its_default() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_serve_flags(parser)
    section = README.partition("## Flags\n")[2].partition("\n## ")[0]
    for action in parser._actions:
        (flag,) = action.option_strings
        rows = [row for row in section.splitlines() if row.startswith(f"| `{flag}")]
        assert len(rows) == 1, flag
        if action.default:
            default = rows[0].rsplit("|", 2)[1]
            assert default.strip(" `") == str(action.default), rows


def test_it_shows_every_command_that_asks_a_server() -> None:
    parser = argparse.ArgumentParser()
    add_pools_parser(parser.add_subparsers())
    for command in ("list", "show", "usage", "load", "evict", "pin", "add", "remove"):
        assert re.search(rf"emo-serve pools {command} .*--server URL", README), command
    assert "# and unpin" in README
