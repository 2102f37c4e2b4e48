"""Check the flags of a cluster's replicas before Ray starts any, as `emo-serve serve` would.

vLLM knows its flags, but takes seconds and half a GiB to import. So a process of its own does it,
and this one, which lives as long as the replicas, stays small.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from emo_serve.cli.commands import REFUSED
from emo_serve.errors import ConfigError

__all__ = ["check_replica_flags"]


def check_replica_flags(argv: Sequence[str], *, opens_model: bool) -> None:
    """Raise ConfigError for flags that each replica would refuse.

    `opens_model` also looks at the model's files, for replicas on this machine. A machine on which
    vLLM cannot be imported refuses nothing: the replicas may run on others.
    """
    request = json.dumps({"argv": list(argv), "opens_model": opens_model})
    command = [sys.executable, "-m", __name__, request]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode == REFUSED and lines:
        raise ConfigError(lines[-1].removeprefix("emo-serve serve: error: "))


def _check(argv: Sequence[str], opens_model: bool) -> int:
    from emo_serve.server.startup.quiet import be_quiet

    be_quiet()
    from emo_serve.server.shipped import shipped_model
    from emo_serve.server.startup.launch import check_flags

    try:
        check_flags(argv, shipped_model(), opens_model=opens_model)
    except ConfigError as error:
        print(error)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_check(**json.loads(sys.argv[1])))
