"""Metrics as Prometheus's text, made beside an event loop instead of on it.

The text is that of prometheus_client's `generate_latest`, byte for byte. Two things differ, since a
server has thousands of lines and a busy event loop in the same process. What a series is called
never changes, so its text is remembered from one scrape to the next, and only the number is made
anew. And the text is made in short pieces: between two of them the thread sleeps for a moment. A
thread that computes gives the interpreter's lock away only every 5 ms, and so long would every
stream stand still.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

__all__ = ["CONTENT_TYPE", "Exposition", "selected"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""What an answer with this text says that it is."""

_PIECE = 50  # lines; collecting and writing them takes about 0.3 ms
_PAUSE_SECONDS = 5e-5  # long enough for a thread that waits for the lock to wake up and take it
_APART = ("_created", "_gsum", "_gcount")  # OpenMetrics has them; here each is a family of gauges


class Exposition:
    """Write metrics as text; what it has written, it writes faster the next time.

    `pause` is called between two pieces. One thread at a time may use it.
    """

    def __init__(self, pause: Callable[[], None] = lambda: time.sleep(_PAUSE_SECONDS)) -> None:
        self._pause = pause
        self._texts: dict[object, _Series] = {}  # of what the last scrape showed, and no more
        self._used: dict[object, _Series] = {}

    def text(self, families: Iterable[Metric]) -> bytes:
        """Return all of these metrics as text, in their order."""
        self._used = {}
        texts: list[str] = []
        room = _PIECE
        for family in families:
            parts: dict[str, list[str]] = {"": [self._header(family)]}
            for start in range(0, len(family.samples), _PIECE):
                samples = family.samples[start : start + _PIECE]
                self._write(family, samples, parts)
                room -= len(samples) + 1
                if room <= 0:
                    room = _PIECE
                    self._pause()
            for suffix in sorted(parts):
                texts += parts[suffix]
        self._texts = self._used
        return "".join(texts).encode()

    def _header(self, family: Metric) -> str:
        key = (family.name, family.type, family.documentation)
        series = self._texts.get(key) or _Series(_text_of(family, []))
        self._used[key] = series
        return series.text

    def _write(
        self, family: Metric, samples: Sequence[Sample], parts: dict[str, list[str]]
    ) -> None:
        """Add lines to the parts of a family, "" and those of _APART, each with its header."""
        known, used, own = self._texts, self._used, parts[""]
        for sample in samples:
            if sample.timestamp is not None:
                own.append(_line_of(sample))
                continue
            key = (sample.name, *sample.labels.items())
            series = known.get(key)
            if series is None:
                suffix = sample.name[len(family.name) :]
                text = _line_of(sample).rpartition(" ")[0]
                series = _Series(text, suffix if suffix in _APART else "")
            used[key] = series
            lines = own
            if series.part:
                if series.part not in parts:
                    name = family.name + series.part
                    parts[series.part] = [self._header(Metric(name, family.documentation, "gauge"))]
                lines = parts[series.part]
            number = floatToGoString(sample.value)  # type: ignore[no-untyped-call]
            lines.append(f"{series.text} {number}\n")


@dataclass(frozen=True, slots=True)
class _Series:
    """The text of a header, or of a series up to its number; `part` is "" or one of _APART."""

    text: str
    part: str = ""


def selected(registry: CollectorRegistry, names: Iterable[str]) -> list[Metric]:
    """Return the registry's families of these names, ordered by name; what it lacks is left out.

    Only what is named is collected, unless the registry cannot tell which of its collectors has it:
    one that reads the files of PROMETHEUS_MULTIPROC_DIR must read them all.
    """
    wanted = set(names)
    samples = [name + suffix for name in wanted for suffix in ("", "_total")]
    found = [*registry.restricted_registry(samples).collect()] or [*registry.collect()]
    return sorted((one for one in found if one.name in wanted), key=lambda one: one.name)


def _line_of(sample: Sample) -> str:
    """Return a sample as prometheus_client writes it."""
    header = Metric(sample.name, "", "gauge")
    return _text_of(header, [sample]).removeprefix(_text_of(header, []))


def _text_of(family: Metric, samples: list[Sample]) -> str:
    alone = Metric(family.name, family.documentation, family.type)
    alone.samples = samples
    return generate_latest(_Families(alone)).decode()


class _Families(Collector):
    """A registry of one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        """Yield the family."""
        yield self._family
