"""The pictures are PNGs of a sensible size, and they show what they are drawn from."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import pytest

from emo_serve.cli.plots import comparison_png, usage_png, write_picture
from emo_serve.errors import ConfigError
from emo_serve.pools.comparison import PoolComparison
from emo_serve.pools.pool import ExpertPool, LayerExperts

image = pytest.importorskip("matplotlib.image", reason="pictures need the extra `plot`")


def compared(*kept: tuple[int, ...], layers: int = 2) -> PoolComparison:
    pools = [ExpertPool(f"pool-{i}", (LayerExperts(ids),) * layers) for i, ids in enumerate(kept)]
    return PoolComparison(pools)


def pixels(png: bytes) -> Any:
    return image.imread(io.BytesIO(png), format="png")


def test_it_is_a_png_whose_size_follows_the_pools() -> None:
    small = comparison_png(compared((0, 1), (1, 2)))
    large = comparison_png(compared(*((i, i + 1) for i in range(12)), layers=16))
    assert small.startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = pixels(small).shape
    assert 400 < height < width < 1600
    assert pixels(large).shape[0] > height
    assert pixels(large).shape[1] > width


def test_any_number_of_pools_gives_a_picture_of_bounded_size() -> None:
    assert pixels(comparison_png(compared((0, 1)))).shape[1] > 400
    many = pixels(comparison_png(compared(*((i % 9, 9) for i in range(120)))))
    assert max(many.shape) < 6000


def test_the_same_pools_give_the_same_picture_and_others_another() -> None:
    first = pixels(comparison_png(compared((0, 1), (1, 2))))
    assert (first == pixels(comparison_png(compared((0, 1), (1, 2))))).all()
    other = pixels(comparison_png(compared((0, 1), (0, 1))))
    assert other.shape == first.shape
    assert (other != first).any(axis=-1).mean() > 0.01  # cells, not a digit


def test_more_alike_is_brighter() -> None:
    """The colour map goes from dark to bright; all cells of one picture against the other's."""
    alike = pixels(comparison_png(compared((0, 1), (0, 1))))[..., :3].mean()
    apart = pixels(comparison_png(compared((0, 1), (2, 3))))[..., :3].mean()
    assert alike > apart + 0.01


USED: tuple[tuple[float | None, ...], ...] = ((), (0.0, 0.4, None, 1.0), (0.2, 0.4, None, 1.0))


def test_usage_is_a_png_whose_size_follows_the_model() -> None:
    small = pixels(usage_png("math", USED))
    large = pixels(usage_png("math", [(0.5,) * 128] * 48))
    assert large.shape[0] > small.shape[0]
    assert large.shape[1] > small.shape[1]
    assert max(pixels(usage_png("math", [(0.5,) * 4096] * 999)).shape) < 6000


def test_usage_shows_more_as_brighter_whatever_every_token_takes() -> None:
    first = pixels(usage_png("math", USED))
    assert (first == pixels(usage_png("math", USED))).all()
    rare = pixels(usage_png("math", ((), (0.0, 0.4, None, 1.0), (0.0, 0.4, None, 1.0))))
    assert rare.shape == first.shape
    assert first[..., :3].mean() > rare[..., :3].mean() + 0.005
    outside = pixels(usage_png("math", ((), (0.0, 0.4, None, 1.0), (None, 0.4, None, 1.0))))
    assert (outside != rare).any(axis=-1).mean() > 0.01


@pytest.mark.parametrize("shares", [((), (1.0, 1.0)), ((0.0, 0.0),)])
def test_usage_without_a_scale_is_a_picture_all_the_same(shares: tuple[Any, ...]) -> None:
    assert pixels(usage_png("math", shares)).size > 0


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        write_picture(b"", tmp_path)


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'emo-serve\[plot\]'"):
        comparison_png(compared((0, 1), (1, 2)))
    with pytest.raises(ConfigError, match=r"pip install 'emo-serve\[plot\]'"):
        usage_png("math", USED)
