"""Requests to our routes that schemathesis makes from the server's own OpenAPI document.

An answer must be one that the document describes: status, content type, body. Valid and invalid
requests are made, one at a time and in sequences in which a request uses what an earlier one made.
The seed is fixed, so two runs send the same. The stream /v1/residency/events, which never ends, is
left out.
"""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition, Unsatisfiable
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import BaseSchema

from tests.abuse.asking import PATIENCE_SECONDS

__all__ = ["ask_generated_cases", "run_generated_sequences"]

OURS = r"^/(v1/pools|v1/access|v1/residency$|ready)"
STEPS = 12
NAMES = ("made-1", "made-2", "made-3")

load_all_checks()
_CHECKS = [
    *CHECKS.get_by_names(
        [
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
            "response_headers_conformance",
        ]
    )
]


def ask_generated_cases(
    url: str, document: dict[str, Any], examples: int, deadline: float
) -> list[str]:
    """Send valid and invalid requests to each route; return a reproduction of each fault.

    After the deadline, on the monotonic clock, the routes that are left get one of each.
    """
    faults: dict[str, str] = {}
    for found in _schema(url, document).get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            is_late = time.monotonic() > deadline

            @given(case=operation.as_strategy(generation_mode=mode))
            @_settings(1 if is_late else examples)
            def send(case: Case) -> None:
                _judge(case, case.call(timeout=PATIENCE_SECONDS), faults)

            try:
                send()
            except Unsatisfiable:  # every name and body is valid for some routes
                assert mode == GenerationMode.NEGATIVE, operation.label
    return list(faults.values())


def run_generated_sequences(url: str, document: dict[str, Any], sequences: int) -> list[str]:
    """Run sequences of requests, most of which name a pool that one of them has made."""
    faults: dict[str, str] = {}
    left = sequences
    schema = _schema(url, document)
    schema.hooks.register_hook_with_name(_with_pools, "before_generate_body")

    class Sequence(schema.as_state_machine()):  # type: ignore[misc]
        def call(self, case: Case, **options: Any) -> Response:
            response: Response = case.call(timeout=PATIENCE_SECONDS, **options)
            return response

        def validate_response(self, response: Response, case: Case, **_: Any) -> None:
            _judge(case, response, faults)

        def teardown(self) -> None:
            nonlocal left
            left -= 1
            super().teardown()

    for start in count():
        try:
            seed(start)(Sequence).run(settings=_settings(left, stateful_step_count=STEPS))
            break
        except FlakyStrategyDefinition:
            # What can follow depends on the answers, and a server whose pools have changed may
            # answer an equal beginning otherwise: go on with another seed.
            if left <= 0:
                break
    return list(faults.values())


def _schema(url: str, document: dict[str, Any]) -> BaseSchema:
    schema = schemathesis.openapi.from_dict(document, config=schemathesis.Config(seed=0))
    schema.config.update(base_url=url)
    return schema.include(path_regex=OURS)


def _settings(examples: int, **more: Any) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        **more,
    )


def _with_pools(context: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Make most bodies of POST /v1/pools pools that fit the model: others are all refused."""
    if context.operation.label != "POST /v1/pools":
        return strategy
    ids = st.lists(st.integers(0, 31), min_size=8, max_size=8, unique=True)
    layers = st.lists(st.fixed_dictionaries({"experts": ids}), min_size=4, max_size=4)
    pools = st.fixed_dictionaries(
        {"format": st.just("emo-pool/1"), "name": st.sampled_from(NAMES), "layers": layers}
    )
    return st.one_of(pools, pools, strategy)


def _judge(case: Case, response: Response, faults: dict[str, str]) -> None:
    """Keep one reproduction per route, status and reason."""
    reasons: list[str] = []
    try:
        case.validate_response(response, checks=_CHECKS)
    except FailureGroup as group:
        reasons = [str(each).strip() for each in group.exceptions]
    status = response.status_code
    if status >= 500 and not (status == 503 and "retry-after" in response.headers):
        reasons.append("a server error")
    for reason in reasons:
        key = f"{case.operation.label} {status} {reason[:60]}"
        said = (
            f"{case.as_curl_command()}\n    -> {status} {response.text[:300]}\n    {reason[:600]}"
        )
        faults.setdefault(key, said)
