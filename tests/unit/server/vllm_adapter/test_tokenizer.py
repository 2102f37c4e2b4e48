"""Text that the server reads is the text it serves: the engine's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers.registry import renderer_from_config

from emo_serve import demo
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.errors import RequestError
from emo_serve.server.vllm_adapter.flags import parse_serve_args
from emo_serve.server.vllm_adapter.tokenizer import EngineTokenizer

CHAT = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]

Opened = Callable[..., EngineTokenizer]


@pytest.fixture
def opened() -> Any:
    renderers: list[Any] = []

    def open_with(*flags: str) -> EngineTokenizer:
        args = parse_serve_args([str(demo.model_dir()), "--enforce-eager", *flags], {})
        args.model = args.model_tag
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        renderers.append(renderer_from_config(config))
        return EngineTokenizer(renderers[-1], args)

    yield open_with
    for renderer in renderers:
        renderer.shutdown()


async def test_by_default_it_reads_as_the_checkpoints_own_files_say(opened: Opened) -> None:
    served, own = opened(), ModelTokenizer(demo.model_dir())
    text = "def f(x):\n    return x  # \u00e9"
    assert await served.encode(text) == own.encode(text)
    assert await served.decode(own.encode(text)) == own.decode(own.encode(text))
    for messages in (CHAT, CHAT[:1]):
        assert await served.encode_chat(messages) == own.encode_chat(messages)


async def test_it_takes_the_template_and_the_tokenizer_of_the_flags(
    opened: Opened, tmp_path: Path
) -> None:
    template = tmp_path / "shout.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content | upper }};{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}{{ mood }}"
    )
    own = ModelTokenizer(demo.model_dir())
    flags = ("--chat-template", str(template))
    flags += ("--default-chat-template-kwargs", '{"mood": "!"}')
    served = opened(*flags)
    assert own.decode(await served.encode_chat(CHAT)) == "WHY?;SO;!"
    assert own.decode(await served.encode_chat(CHAT[:1])) == "WHY?;>!"

    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((demo.model_dir() / name).read_text())
    other = (demo.model_dir() / "tokenizer.json").read_text()
    assert '"normalizer": null' in other.replace('"normalizer":null', '"normalizer": null')
    lower = other.replace('"normalizer":null', '"normalizer": null')
    lower = lower.replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}')
    (tmp_path / "tokenizer.json").write_text(lower)
    served = opened("--tokenizer", str(tmp_path))
    assert await served.encode("ABC") == own.encode("abc") != own.encode("ABC")


async def test_what_a_template_refuses_is_a_refusal(opened: Opened, tmp_path: Path) -> None:
    template = tmp_path / "no.jinja"
    template.write_text("{{ raise_exception('no roles but user') }}")
    with pytest.raises(RequestError, match="chat template refuses these messages: no roles but"):
        await opened("--chat-template", str(template)).encode_chat(CHAT)
