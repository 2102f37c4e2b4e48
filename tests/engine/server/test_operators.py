"""Operators at work on a real server: every route and command, and keys.

The slab has room for two of three pools; test_ends.py has what survives a restart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from emo_serve.cli.connection import KEY_VARIABLES
from emo_serve.cli.main import main
from emo_serve.pools.document import read_pool
from tests.engine.server.conftest import ADMIN, API, TIGHT_SLOTS, document
from tests.support.golden.checkpoints import pools_of
from tests.support.progress import wait_for
from tests.support.server_process import RawRequest, RunningServer, stopped_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.server("tight"),
    pytest.mark.usefixtures("restored"),
]

GOLDEN = ("math", "code", "law")


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client(API) as client:
        yield client


def text_of(client: openai.OpenAI, model: str) -> str:
    """Return what a pool writes, which tells the golden pools apart."""
    answer = client.completions.create(
        model=model, prompt="hello", max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
    )
    return str(answer.choices[0].text)


def cards_of(http: httpx.Client) -> dict[str, dict[str, Any]]:
    return {card["name"]: card for card in http.get("/v1/pools").json()["data"]}


def error_of(answer: httpx.Response) -> str:
    """Return the message of an error, checked to have OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == answer.status_code
    return str(error["message"])


# -- residency --


def test_the_list_and_its_map_agree_with_the_slots(http: httpx.Client) -> None:
    for name in ("math", "code"):
        http.post(f"/v1/pools/{name}/load").raise_for_status()
    answer = http.get("/v1/pools", params={"experts": True}).json()
    assert [card["name"] for card in answer["data"][:5]] == [
        *("base", "code", "law", "math", "tiny")
    ]
    assert answer["experts_per_layer"] == [32, 32, 32]
    assert answer["slots"]["total"] == 3 * TIGHT_SLOTS
    held = sum(count > 0 for layer in answer["holders"] for count in layer)
    assert held == answer["slots"]["used"]
    cards = {card["name"]: card for card in answer["data"]}
    assert cards["math"]["default"] and cards["math"]["persisted"]
    assert cards["math"]["experts"] == pools_of("shared1")["math"]
    assert answer["persists"] and answer["refused"] == []
    details = http.get("/v1/pools/math").json()
    assert details["holders"] == answer["holders"]


def test_load_pin_unpin_and_evict(http: httpx.Client) -> None:
    assert http.post("/v1/pools/law/load", json={"pin": True}).json()["state"] == "resident"
    assert "unpin" in error_of(http.post("/v1/pools/law/evict"))
    blocked = http.post("/v1/pools/math+code/load")
    assert (blocked.status_code, blocked.headers["retry-after"].isdigit()) == (503, True)
    error_of(blocked)
    http.post("/v1/pools/law/unpin").raise_for_status()
    assert http.post("/v1/pools/law/evict").json()["state"] == "absent"
    for name in cards_of(http):
        http.post(f"/v1/pools/{name}/evict").raise_for_status()
    slots = http.get("/v1/pools").json()["slots"]
    assert (slots["used"], slots["free"], slots["leased"]) == (0, 3 * TIGHT_SLOTS, 0)
    assert http.post("/v1/pools/base/load").json()["state"] == "streamed"
    assert http.post("/v1/pools/base/pin").status_code == 400
    assert http.post("/v1/pools/math+code/load").json()["experts_per_layer"] == [
        len({*a, *b})
        for a, b in zip(pools_of("shared1")["math"], pools_of("shared1")["code"], strict=True)
    ]


def test_a_pool_in_use_is_evicted_when_its_requests_have_ended(
    server: RunningServer, http: httpx.Client
) -> None:
    http.post("/v1/pools/math/load").raise_for_status()
    with ExitStack() as stack:
        with stopped_engine(server):
            request = stack.enter_context(
                RawRequest(server, model="math", prompt="hello", max_tokens=200)
            )
            wait_for(lambda: http.get("/v1/pools/math").json()["running_requests"] == 1)
            assert http.get("/v1/pools").json()["slots"]["leased"] > 0
            busy = http.post("/v1/pools/math/evict")
            assert busy.status_code == 409
            assert "drain=true" in error_of(busy)
        drained = http.post("/v1/pools/math/evict", json={"drain": True})
        assert (drained.status_code, drained.json()["state"]) == (200, "absent")
        request.read_to_end()
        assert b"[DONE]" in request.received


# -- definitions --


def test_a_pool_is_defined_redefined_and_removed_under_requests(
    http: httpx.Client, client: openai.OpenAI, tight_pools: Path
) -> None:
    texts = {name: text_of(client, name) for name in GOLDEN}
    assert len(set(texts.values())) == 3
    made = http.post("/v1/pools", json=document("poems", "law", description="verse"))
    assert (made.status_code, made.json()["version"]) == (201, 1)
    assert read_pool(tight_pools / "poems.json").description == "verse"
    assert text_of(client, "poems") == texts["law"]
    assert "poems" in {model.id for model in client.models.list().data}
    for turn, content in enumerate(("math", "code", "law", "math"), start=2):
        answer = http.post("/v1/pools?replace=true", json=document("poems", content))
        assert (answer.status_code, answer.json()["version"]) == (200, turn)
        assert text_of(client, "poems") == texts[content]
    again = http.post("/v1/pools", json=document("poems", "law"))
    assert (again.status_code, "replace=true" in error_of(again)) == (409, True)
    assert http.delete("/v1/pools/poems").json()["deleted"] is True
    assert not (tight_pools / "poems.json").exists()
    with pytest.raises(openai.NotFoundError, match="the pools are: code, law, math, tiny"):
        text_of(client, "poems")


def test_a_pinned_pool_is_pinned_again_when_it_is_redefined(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    http.post("/v1/pools", json=document("verses", "math")).raise_for_status()
    http.post("/v1/pools/verses/pin").raise_for_status()
    card = http.post("/v1/pools?replace=true", json=document("verses", "code")).json()
    assert (card["state"], card["pinned"], card["version"]) == ("resident", True, 2)
    assert text_of(client, "verses") == text_of(client, "code")


def test_running_requests_end_with_the_experts_they_began_with(
    server: RunningServer, http: httpx.Client, client: openai.OpenAI
) -> None:
    http.post("/v1/pools", json=document("songs", "math")).raise_for_status()
    with (
        RawRequest(server, model="songs", prompt="hello", temperature=0) as old,
        RawRequest(server, model="math", prompt="hello", temperature=0) as same,
    ):
        old.read_events(1)
        http.post("/v1/pools?replace=true", json=document("songs", "code")).raise_for_status()
        assert text_of(client, "songs") == text_of(client, "code")
        old.read_to_end()
        same.read_to_end()
        assert written(old) == written(same)


def written(request: RawRequest) -> str:
    """Return the text of a stream's events."""
    lines = request.received.decode(errors="replace").splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


# -- errors --


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/pools", b"{", 400, "is not UTF-8 JSON"),
        ("POST", "/v1/pools", json.dumps(document("Bad", "math")).encode(), 400, "name is 'Bad'"),
        ("POST", "/v1/pools", json.dumps(document("emo", "math")).encode(), 400, "of the model"),
        ("POST", "/v1/pools", json.dumps(document("base", "math")).encode(), 400, "is kept for"),
        ("POST", "/v1/pools?replace=maybe", b"{}", 400, "replace"),
        ("POST", "/v1/pools?replcae=true", b"{}", 400, "replcae"),
        ("POST", "/v1/pools", b" " * (9 * 2**20), 413, "--max-body-size"),
        ("GET", "/v1/pools/nope", b"", 404, "the pools are: code, law, math, tiny"),
        ("DELETE", "/v1/pools/nope", b"", 404, "the pools are: code, law, math, tiny"),
        ("DELETE", "/v1/pools/math", b"", 409, "--default-pool"),
        ("DELETE", "/v1/pools/base", b"", 409, "cannot be removed"),
        ("POST", "/v1/pools/nope/load", b"", 404, "the pools are: code, law, math, tiny"),
        ("POST", "/v1/pools/math/load", b'{"pni": true}', 400, "pni"),
        ("POST", "/v1/pools/math/evict", b'{"drain": 1}', 400, "drain"),
    ],
)
def test_errors_have_openais_shape(
    http: httpx.Client, method: str, path: str, body: bytes, status: int, message: str
) -> None:
    answer = http.request(method, path, content=body)
    assert answer.status_code == status, answer.text
    assert message in error_of(answer)


def test_the_routes_are_in_the_servers_own_documentation(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {method for path in paths if "/v1/pools" in path for method in paths[path]} == {
        "get",
        "post",
        "delete",
    }
    schema = paths["/v1/pools"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    document, build = schema["anyOf"]
    assert {"format", "name", "layers"} == set(document["required"])
    assert {"name", "examples", "experts"} == set(build["required"])


# -- keys --


@pytest.mark.parametrize(
    ("method", "path", "no_key", "api"),
    [
        ("GET", "/health", 200, 200),
        ("GET", "/ready", 200, 200),
        ("GET", "/metrics", 200, 200),
        ("GET", "/metrics/routing", 200, 200),
        ("GET", "/version", 200, 200),
        ("GET", "/v1/models", 401, 200),
        ("GET", "/v1/pools", 401, 200),
        ("GET", "/v1/pools/math", 401, 200),
        ("GET", "/openapi.json", 401, 200),
        ("POST", "/tokenize", 401, 400),
        ("POST", "/v1/completions", 401, 400),
        ("POST", "/v1/pools", 401, 403),
        ("POST", "/v1/pools/", 401, 403),
        ("POST", "/v1/pools%0A", 401, 403),
        ("DELETE", "/v1/pools/code", 401, 403),
        ("POST", "/v1/pools/math/load", 401, 403),
        ("POST", "/v1/pools/math/evict", 401, 403),
        ("POST", "/v1/pools/math/pin", 401, 403),
        ("POST", "/v1/pools/math/unpin", 401, 403),
    ],
)
def test_which_key_opens_what(
    server: RunningServer, method: str, path: str, no_key: int, api: int
) -> None:
    json_body = {"json": {}} if method == "POST" else {}
    for key, status in (("", no_key), ("wrong", no_key), (API, api)):
        with server.http(key) as http:
            answer = http.request(method, path, **json_body)
        assert answer.status_code == status, (key, answer.text)
    with server.http(ADMIN) as http:
        if method == "GET":
            assert http.get(path).status_code == 200


# -- the terminal --


@pytest.fixture
def cli(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `emo-serve pools ...` against the server; return status, stdout and stderr."""
    for variable in KEY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("EMO_SERVE_ADMIN_API_KEY", ADMIN)

    def command(*arguments: str) -> tuple[int, str, str]:
        status = main(["pools", *arguments, "--server", server.url])
        out, err = capsys.readouterr()
        return status, out, err

    return command


def test_every_command(
    cli: Callable[..., tuple[int, str, str]], http: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "tales.json").write_text(json.dumps(document("tales", "law")))
    assert cli("add", str(tmp_path / "tales.json"))[1].startswith("pool tales: version 1, stored")
    assert cli("add", str(tmp_path / "tales.json"), "--replace")[1].startswith("pool tales: vers")
    assert cli("load", "tales")[1].startswith("tales: resident, 16 experts per layer")
    assert cli("pin", "tales")[1].startswith("tales: resident, pinned")
    status, out, err = cli("list", "--map")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:7]] == [
        *("base", "code", "law", "math", "tales", "tiny")
    ]
    marks = [line.split(maxsplit=2)[2] for line in out.splitlines()[-3:]]
    assert {len(row) for row in marks} == {32}
    shown = cli("show", "tales")[1].splitlines()[-3:]
    for row, ids in zip(shown, pools_of("shared1")["law"], strict=True):
        drawn = row.split(maxsplit=2)[2]
        assert [expert for expert, mark in enumerate(drawn) if mark != "."] == ids
        assert "o" not in drawn
    assert cli("evict", "tales")[0] == 2
    assert cli("unpin", "tales")[0] == 0
    assert cli("evict", "tales", "--drain")[0] == 0
    assert cli("remove", "tales") == (0, "pool tales is removed\n", "")
    status, _, err = cli("load", "tales")
    assert (status, err.count("\n"), "the pools are: code, law, math, tiny" in err) == (2, 1, True)
    status, _, err = cli("load", "math", "--api-key", API)
    assert (status, "set EMO_SERVE_ADMIN_API_KEY" in err) == (2, True)
