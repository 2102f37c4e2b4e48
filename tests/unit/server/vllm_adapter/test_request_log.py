"""The request log: whole lines, errors at the start, and none after it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from emo_serve.errors import ConfigError
from emo_serve.server.vllm_adapter.request_log import RequestLog, RequestRecord

RECORD = RequestRecord(
    at_seconds=1_763_000_000.25,
    pool="math+law",
    wait_seconds=0.0,
    service_seconds=1.5,
    is_hit=True,
    prompt_tokens=12,
    generation_tokens=64,
    outcome="finished",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


@pytest.fixture
def log(path: Path) -> Iterator[RequestLog]:
    log = RequestLog(path)
    yield log
    log.close()


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_a_line_is_on_disk_at_once_and_holds_every_field(path: Path, log: RequestLog) -> None:
    log.append(RECORD)
    log.append(replace(RECORD, pool="law", wait_seconds=1 / 3))
    first, second = map(json.loads, lines(path))
    assert first == asdict(RECORD)
    assert second == {**asdict(RECORD), "pool": "law", "wait_seconds": 0.333333}


def test_what_is_there_stays_and_two_writers_share_a_file(path: Path) -> None:
    path.write_text("{}\n")
    logs = [RequestLog(path), RequestLog(path)]
    for number in range(10):
        logs[number % 2].append(replace(RECORD, prompt_tokens=number))
    for log in logs:
        log.close()
    assert [json.loads(line).get("prompt_tokens") for line in lines(path)] == [None, *range(10)]


def test_a_file_truncated_by_a_rotation_is_written_from_its_start(
    path: Path, log: RequestLog
) -> None:
    log.append(RECORD)
    os.truncate(path, 0)
    log.append(RECORD)
    assert path.read_bytes()[0] == ord("{")


def test_a_path_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "missing" / "requests.jsonl"):
        with pytest.raises(ConfigError, match=r"--request-log .* cannot be written"):
            RequestLog(bad)


def test_after_close_nothing_is_written_and_nothing_raised(path: Path, log: RequestLog) -> None:
    log.close()
    log.close()
    log.append(RECORD)
    assert lines(path) == []


def test_a_full_disk_costs_lines_and_one_warning(
    path: Path, log: RequestLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log.append(RECORD)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(3):
            log.append(RECORD)
    assert [record.message for record in caplog.records] == [
        f"request log {path}: a line was lost (No space left on device); further lost"
        " lines are counted, and reported at shutdown"
    ]
    log.append(RECORD)
    log.close()
    assert len(lines(path)) == 2
    assert caplog.records[-1].message == f"request log {path}: 3 lines were lost"


def test_half_a_line_spoils_no_other(
    path: Path, log: RequestLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:5]))
        log.append(RECORD)
    log.append(RECORD)
    log.append(RECORD)
    broken, *whole = lines(path)
    assert broken == '{"at_'
    assert [json.loads(line) for line in whole] == [asdict(RECORD)] * 2
