"""What is misspelt is refused with what was probably meant."""

from __future__ import annotations

import argparse

import pytest

from emo_serve.cli.parsing import CommandParser
from tests.unit.cli.test_main import run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("pool", "list"), "invalid choice: 'pool'"),
        (("pool", "list"), "did you mean 'pools'?"),
        (("pools", "lst"), "did you mean 'list'?"),
        (
            ("pools", "list", "--sever", "x"),
            "unrecognized arguments: --sever (did you mean --server?)\n",
        ),
        (("pools", "show", "a", "b"), "unrecognized arguments: b\n"),
        (("completion", "bsh"), "did you mean 'bash'?"),
    ],
)
def test_each_command_refuses_its_own(
    capsys: pytest.CaptureFixture[str], line: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, *line)
    assert (status, out) == (2, "")
    assert message in err


def test_a_command_refuses_what_another_one_takes(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "pools", "list", "--examples", "x")
    assert err.startswith("usage: emo-serve pools list ")
    assert "unrecognized arguments: --examples\n" in err


def test_values_that_are_no_words_are_checked_as_ever() -> None:
    parser = CommandParser(exit_on_error=False)
    parser.add_argument("--size", type=int, choices=(1, 2))
    assert parser.parse_args(["--size", "2"]).size == 2
    with pytest.raises(argparse.ArgumentError, match=r"invalid choice: 3 \(choose from 1, 2\)$"):
        parser.parse_args(["--size", "3"])
