"""`emo-serve demo`: the parser, and errors as exit statuses."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from emo_serve.cli.demo import add_demo_parser
from emo_serve.cli.main import main
from emo_serve.errors import ConfigError


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_demo_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *words])


def test_train_takes_steps_and_one_of_the_models(tmp_path: Path) -> None:
    arguments = _parse("train", str(tmp_path), "--steps", "300", "50", "--model", "emo-demo")
    assert (arguments.steps, arguments.model) == ([300, 50], "emo-demo")


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        _parse("train", str(tmp_path), "--model", "emo")


def test_a_corpus_that_cannot_be_had_is_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(directory: Path) -> None:
        raise ConfigError("npm is not installed")

    monkeypatch.setattr("emo_serve.demo.training.corpus.build_corpus", refuse)
    assert main(["demo", "corpus", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "emo-serve: npm is not installed\n"
