"""What a fleet is made of: how many replicas, with which flags and how much of a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emo_serve.errors import ConfigError

__all__ = ["FleetSettings", "read_replicas"]

_POLICY = "emo_serve.ray_cluster.scaling:PoolPolicy"


def read_replicas(text: str) -> tuple[int, int]:
    """Read N or MIN..MAX; raises ConfigError."""
    least, dots, most = text.partition("..")
    counts = [least, most if dots else least]
    if not all(count.isascii() and count.isdigit() for count in counts):
        raise ConfigError(f"--replicas is {text!r}; give a number, or MIN..MAX, as in 2..8")
    low, high = map(int, counts)
    if not 1 <= low <= high:
        raise ConfigError(f"--replicas is {text!r}; give at least 1, and MAX no smaller than MIN")
    return low, high


@dataclass(frozen=True)
class FleetSettings:
    """One fleet; `argv` are the flags of `emo-serve serve` for each replica.

    `cpus`, `gpus` and `memory_bytes` are what Ray reserves for one replica. Without GPUs, `cpus` is
    also how many threads its engine computes with; 0 leaves that to vLLM, for replicas that have a
    machine each. `drain_seconds` is how long a replica may finish its requests.
    """

    argv: tuple[str, ...]
    min_replicas: int = 2
    max_replicas: int = 2
    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: int = 0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for flag, value in (("--cpus", self.cpus), ("--gpus", self.gpus)):
            if value < 0:
                raise ConfigError(f"{flag} is {value:g}; give 0 or more")
        if 0 < self.gpus < self.num_ranks and self.num_ranks > 1:
            raise ConfigError(
                f"--gpus is {self.gpus:g} and --tensor-parallel-size {self.num_ranks}; give each"
                " replica a GPU per rank"
            )

    @property
    def num_ranks(self) -> int:
        """Return the devices that one engine takes: the ranks of all stages of its pipeline."""
        return self._number("--tensor-parallel-size", "-tp") * self._number(
            "--pipeline-parallel-size", "-pp"
        )

    def _number(self, *names: str) -> int:
        """Return the number that a flag of the engine gives, 1 without."""
        for place, argument in enumerate(self.argv):
            flag, _, value = argument.partition("=")
            if flag in names:
                text = value or "".join(self.argv[place + 1 : place + 2])
                return int(text) if text.isdigit() else 1
        return 1

    def check_fits(self, have: Mapping[str, float]) -> None:
        """Refuse more replicas than Ray's resources `have` room for; raises ConfigError.

        Ray itself would wait for room. Where machines can be added, do not ask.
        """
        reserved = (
            ("CPU", "--cpus", self.cpus),
            ("GPU", "--gpus", self.gpus),
            ("memory", "--memory", self.memory_bytes),
        )
        for resource, flag, each in reserved:
            room = have.get(resource, 0)
            if each * self.max_replicas > room:
                raise ConfigError(
                    f"{self.max_replicas} replicas need {self.max_replicas * each:g} of Ray's"
                    f" {resource}, and this machine has {room:g}; give fewer --replicas, or a"
                    f" smaller {flag}"
                )

    def to_args(self) -> dict[str, Any]:
        """Return the settings as plain values, for a Serve config.

        How many replicas stands elsewhere there, where it can change and the replicas stay.
        """
        values = asdict(self)
        del values["min_replicas"], values["max_replicas"]
        return {**values, "argv": list(self.argv)}

    def replica_options(self) -> dict[str, Any]:
        """Return how many replicas Ray shall run, as options of a Serve deployment."""
        least, most = self.min_replicas, self.max_replicas
        if least == most:
            return {"num_replicas": least}
        scaling = {
            "min_replicas": least,
            "initial_replicas": least,
            "max_replicas": most,
            # The policy itself waits before it acts, so Ray must not wait again.
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "policy": {"policy_function": _POLICY},
        }
        return {"autoscaling_config": scaling}

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> FleetSettings:
        """Read what `to_args` returned; raises ConfigError for unknown names."""
        unknown = sorted(set(args) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"args of the application: there is no {', '.join(unknown)}")
        argv: Sequence[str] = args.get("argv", ())
        return cls(**{**args, "argv": tuple(map(str, argv))})
