"""The flags of `emo-serve serve`, vLLM's and ours in one parser."""

from __future__ import annotations

import pytest

from emo_serve.errors import ConfigError
from emo_serve.server.vllm_adapter.flags import parse_serve_args


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--expert-slotz", "8"], "--expert-slotz 8 (did you mean --expert-slots?)"),
        (["--max_model_length=8"], "--max-model-length=8 (did you mean --max-model-len?)"),
        (["--what-is-this"], "--what-is-this"),
    ],
)
def test_a_flag_that_is_not_there_is_refused_with_the_one_that_was_meant(
    flags: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_serve_args(["some/model", *flags], {})
    assert str(refusal.value) == f"unrecognized arguments: {message}"


def test_flags_of_both_are_known() -> None:
    args = parse_serve_args(["some/model", "--expert-slots", "8", "--max-model-len", "64"], {})
    assert (args.expert_slots, args.max_model_len, args.model_tag) == ("8", 64, "some/model")
