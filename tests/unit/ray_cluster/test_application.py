"""What Ray is told about a fleet; in a process of its own, since Ray changes the one it is in."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `cluster`")

PROGRAM = """
import json, sys
from emo_serve.ray_cluster.application import build
deployment = build(json.loads(sys.argv[1]))._bound_deployment
config = deployment._deployment_config
scaling, policy = config.autoscaling_config, None
if scaling is not None:
    policy = type(scaling.policy.get_policy()()).__name__
print(json.dumps({
    "argv": deployment._replica_config.init_args[0],
    "options": deployment.ray_actor_options,
    "replicas": None if scaling else config.num_replicas,
    "policy": policy,
    "router": config.request_router_config.get_request_router_class().__name__,
    "grace": config.graceful_shutdown_timeout_s,
}))
"""


def built(**args: Any) -> Any:
    program = [sys.executable, "-c", PROGRAM, json.dumps(args)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_replicas_on_one_machine_share_its_cores_and_drain_in_time() -> None:
    found = built(argv=["m"], cpus=2.0, memory_bytes=2**30, drain_seconds=45.0)
    assert (found["argv"], found["replicas"], found["policy"]) == (["m"], 2, None)
    assert found["router"] == "PoolAffinityRouter"
    assert found["grace"] > 45
    assert (found["options"]["num_cpus"], found["options"]["memory"]) == (2.0, 2**30)
    variables = found["options"]["runtime_env"]["env_vars"]
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_a_range_is_our_policys_and_gpus_leave_threads_alone() -> None:
    found = built(argv=[], min_replicas=1, max_replicas=3, cpus=4.0, gpus=1.0)
    assert (found["replicas"], found["policy"]) == (None, "PoolPolicy")
    assert (found["options"]["num_gpus"], "memory" in found["options"]) == (1, False)
    assert "OMP_NUM_THREADS" not in found["options"]["runtime_env"]["env_vars"]
