"""What a fleet is made of, from flags to what Ray and Kubernetes read."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from emo_serve.errors import ConfigError
from emo_serve.ray_cluster.environment import VARIABLES
from emo_serve.ray_cluster.manifests import ray_service, serve_config
from emo_serve.ray_cluster.settings import FleetSettings, read_replicas


@pytest.mark.parametrize(("text", "counts"), [("2", (2, 2)), ("1..8", (1, 8)), ("3..3", (3, 3))])
def test_replicas_are_a_number_or_a_range(text: str, counts: tuple[int, int]) -> None:
    assert read_replicas(text) == counts


@pytest.mark.parametrize("text", ["", "0", "-1", "4..2", "0..2", "2..", "..2", "two", "1...3"])
def test_other_numbers_of_replicas_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--replicas"):
        read_replicas(text)


def test_settings_survive_a_config_file() -> None:
    settings = FleetSettings(("m", "--expert-slots", "16"), cpus=2.0, memory_bytes=2**30)
    document = yaml.safe_load(yaml.safe_dump(serve_config(settings, "0.0.0.0", 8000)))
    (application,) = document["applications"]
    assert FleetSettings.from_args(application["args"]) == settings
    with pytest.raises(ConfigError, match="there is no replica"):
        FleetSettings.from_args({"replica": 2})


def test_the_number_of_replicas_can_change_and_the_replicas_stay() -> None:
    def application(least: int, most: int) -> Any:
        return serve_config(FleetSettings((), least, most), "0.0.0.0", 8000)["applications"][0]

    two, four, some = application(2, 2), application(4, 4), application(2, 4)
    assert two["args"] == four["args"] == some["args"]  # of what Ray replaces replicas for
    assert two["deployments"] == [{"name": "EmoServe", "num_replicas": 2}]
    assert four["deployments"] == [{"name": "EmoServe", "num_replicas": 4}]
    assert some["deployments"][0]["autoscaling_config"]["max_replicas"] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            FleetSettings((), 2, 3, gpus=1.0),
            "3 replicas need 3 of Ray's GPU, .* has 2",
        ),
        (FleetSettings((), cpus=3.0), "need 6 of Ray's CPU, .* has 4; .* smaller --cpus"),
        (FleetSettings((), memory_bytes=2**35), "of Ray's memory"),
        (FleetSettings((), 2, 4, cpus=1.0, gpus=0.5), None),
    ],
)
def test_more_replicas_than_this_machine_has_room_for_are_refused(
    settings: FleetSettings, words: str | None
) -> None:
    have = {"CPU": 4.0, "GPU": 2.0, "memory": 2.0**34}
    if words is None:
        settings.check_fits(have)
    else:
        with pytest.raises(ConfigError, match=words):
            settings.check_fits(have)


def test_a_replica_without_a_gpu_for_each_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus is 1 and --tensor-parallel-size 2"):
        FleetSettings(("-tp", "2"), gpus=1.0)
    assert FleetSettings((), gpus=0.5).gpus == 0.5  # two replicas may share one


@pytest.mark.parametrize(
    ("argv", "ranks"),
    [
        ((), 1),
        (("--tensor-parallel-size", "4"), 4),
        (("--tensor-parallel-size=2",), 2),
        (("-tp", "8"), 8),
        (("-tp",), 1),
        (("-tp", "2", "--pipeline-parallel-size=3"), 6),
        (("-pp", "2"), 2),
    ],
)
def test_a_replica_takes_a_gpu_per_rank(argv: tuple[str, ...], ranks: int) -> None:
    assert FleetSettings(argv).num_ranks == ranks


def test_the_manifest_starts_proxies_with_our_layer() -> None:
    settings = FleetSettings((), 2, 4, gpus=1.0)
    config = yaml.safe_dump(serve_config(settings, "0.0.0.0", 8000))
    manifest: Any = ray_service(settings, config, "image", 8000)
    cluster = manifest["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (2, 4)
    for group in (cluster["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        assert {item["name"]: item["value"] for item in container["env"]} == VARIABLES
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == yaml.safe_load(config)
