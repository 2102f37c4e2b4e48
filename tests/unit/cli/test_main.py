"""The command line: what it answers at once, and how it refuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from emo_serve import __version__
from emo_serve.cli import main as cli
from emo_serve.errors import ConfigError, EngineDead


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # argparse's own way to end
        status = int(stop.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"emo-serve {__version__}\n", "")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(command in out for command in ("serve", "pools", "demo"))


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[0] == 2


def test_help_of_serve_shows_our_flags_and_where_vllms_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, _ = run(capsys, "serve", "--help")
    flags = ("--pools", "--default-pool", "--expert-memory", "--expert-slots", "--preload")
    assert all(flag in out for flag in (*flags, "--moe-backend", "--max-pools", "--drain-timeout"))
    assert "--help=all" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--expert-memory", "8GB"], "--expert-memory is '8GB'; write 8GiB"),
        (["MODEL", "--port", "1", "--expert-slots", "0"], "--expert-slots is 0"),
        (["--pools", "/no/such/place"], "--pools /no/such/place is not a directory"),
    ],
)
def test_our_bad_flags_are_refused_in_one_line_before_the_server_is_imported(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "emo_serve.server.serve", None)  # importing it would raise
    status, out, err = run(capsys, "serve", *flags)
    assert (status, out) == (2, "")
    assert err.startswith(f"emo-serve: {message}")
    assert err.count("\n") == 1


class FakeApp:
    """Stand where emo_serve.server.serve is imported from."""

    def __init__(self, outcome: Exception | int) -> None:
        self.outcome = outcome
        self.argv: list[str] = []

    def shipped_model(self) -> None:
        return None

    def run(
        self, argv: Sequence[str], announce: object, default_model: object, *, is_quiet: bool
    ) -> int:
        assert is_quiet
        self.argv = list(argv)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (ConfigError("--port is odd"), 2, "emo-serve: --port is odd\n"),
        (EngineDead("the engine process died"), 1, "emo-serve: the engine process died\n"),
    ],
)
def test_serve_passes_every_flag_on_and_turns_errors_into_a_status(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    outcome: Exception | int,
    status: int,
    message: str,
) -> None:
    app = FakeApp(outcome)
    for module in ("emo_serve.server.serve", "emo_serve.server.shipped"):
        monkeypatch.setitem(sys.modules, module, app)
    monkeypatch.setattr("emo_serve.server.startup.quiet.log_to_stderr", lambda: None)
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "")
    assert run(capsys, "serve", "M", "--port", "1", "--max-pools", "4") == (status, "", message)
    assert app.argv == ["M", "--port", "1", "--max-pools", "4"]


def test_an_interrupt_is_not_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_serve", interrupted)
    assert run(capsys, "serve") == (130, "", "")
