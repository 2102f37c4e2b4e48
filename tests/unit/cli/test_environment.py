"""Proxies and certificates of the environment: this machine needs none, the rest is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_serve.cli import main as cli
from emo_serve.cli.environment import is_loopback, route_to
from emo_serve.errors import ConfigError

VARIABLES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
ALL = [
    *VARIABLES,
    *map(str.lower, VARIABLES),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
]
BROKEN = {
    "ALL_PROXY": "socks5://127.0.0.1:1",
    "HTTP_PROXY": "http://[::1",
    "HTTPS_PROXY": "bananas://x",
    "NO_PROXY": "localhost,[::1],10.0.0.0/8,*bad*,http://x:y",
    "SSL_CERT_FILE": "/no/such/file",
    "SSL_CERT_DIR": "/no/such/directory",
    "SSLKEYLOGFILE": "/no/such/place/keys",
    "REQUESTS_CA_BUNDLE": "/no/such/file",
    "CURL_CA_BUNDLE": "/no/such/file",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server on this machine that answers every GET with an empty list of pools."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"object": "pool", "name": "math"}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("0.0.0.0", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "127.1", "0.0.0.0"])
@pytest.mark.parametrize("variables", [BROKEN, *({name: value} for name, value in BROKEN.items())])
def test_this_machine_is_asked_directly(
    monkeypatch: pytest.MonkeyPatch, port: int, host: str, variables: dict[str, str]
) -> None:
    from emo_serve.cli.client import PoolServer

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.lower() if "PROXY" in name else name, value)
    with PoolServer(f"http://{host}:{port}", timeout_seconds=10) as server:
        assert server.show("math")["name"] == "math"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("localhost", "LOCALHOST.", "a.localhost", "127.255.0.1")),
        *((host, True) for host in ("::1", "0.0.0.0", "::", "::ffff:127.0.0.1", "127.1", "0:0::1")),
        *((host, False) for host in ("128.0.0.1", "10.0.0.1", "::2", "localhost.org", "a", "")),
        *((host, False) for host in ("127.0.0.1.nip.io", "127a", "::ffff:10.0.0.1", "\ud800")),
    ],
)
def test_what_this_machine_is(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("url", "variables", "words"),
    [
        ("http://emo", {"ALL_PROXY": "socks5://h:1"}, "ALL_PROXY is 'socks5://h:1': a SOCKS proxy"),
        ("http://emo", {"all_proxy": "socks5h://h:1"}, "all_proxy is 'socks5h://h:1'"),
        ("http://emo", {"HTTP_PROXY": "socks4://h"}, "HTTP_PROXY is 'socks4://h': Unknown scheme"),
        ("http://emo", {"HTTP_PROXY": "bananas://x"}, "HTTP_PROXY is 'bananas://x'"),
        ("http://emo", {"HTTP_PROXY": "http://[::1"}, "HTTP_PROXY is 'http://[::1'"),
        ("http://emo", {"HTTP_PROXY": "http://h:port"}, "HTTP_PROXY is 'http://h:port'"),
        ("http://emo", {"HTTP_PROXY": "h:99999"}, "HTTP_PROXY is 'h:99999'"),
        ("http://emo", {"HTTP_PROXY": "http://"}, "HTTP_PROXY is 'http://'"),
        ("http://emo", {"HTTP_PROXY": "http://u:secret@h:p"}, "HTTP_PROXY is 'http://***@h:p'"),
        ("http://emo", {"http_proxy": "a\x1bb"}, "http_proxy is 'a?b'"),
        ("https://emo", {"HTTPS_PROXY": "://"}, "HTTPS_PROXY is '://'"),
        ("https://emo", {"SSL_CERT_FILE": "/no/file"}, "SSL_CERT_FILE is '/no/file': there is no"),
        ("https://emo", {"SSL_CERT_FILE": "/"}, "SSL_CERT_FILE is '/': there is no such file"),
        ("https://emo", {"SSL_CERT_FILE": __file__}, f"SSL_CERT_FILE is '{__file__}': "),
        ("https://emo", {"SSL_CERT_DIR": "/no/dir"}, "SSL_CERT_DIR is '/no/dir': there is no such"),
        ("https://localhost", {"SSL_CERT_FILE": "/no/file"}, "or unset SSL_CERT_FILE"),
        ("https://emo", {"SSLKEYLOGFILE": "/no/dir/k"}, "SSLKEYLOGFILE is '/no/dir/k': "),
    ],
)
def test_what_cannot_work_is_one_line_with_variable_value_and_remedy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    url: str,
    variables: dict[str, str],
    words: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["pools", "list", "--server", url]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("emo-serve: ") and words in output.err
    assert output.err.count("\n") == 1 and output.err.strip().isprintable()
    assert "secret" not in output.err
    (name,) = variables
    assert f"unset {name}" in output.err


@pytest.mark.parametrize(
    ("url", "variables", "proxy"),
    [
        ("http://emo", {"HTTP_PROXY": "http://h:1"}, "http://h:1"),
        ("http://emo", {"http_proxy": "h:1", "HTTP_PROXY": "x:2"}, "http://h:1"),
        ("http://emo", {"http_proxy": "", "HTTP_PROXY": "x:2"}, None),
        ("http://emo", {"HTTPS_PROXY": "h:1"}, None),
        ("https://emo", {"HTTPS_PROXY": "h:1", "ALL_PROXY": "x:2"}, "http://h:1"),
        ("http://emo", {"HTTPS_PROXY": "h:1", "ALL_PROXY": "x:2"}, "http://x:2"),
        ("http://emo.org", {"HTTP_PROXY": "h:1", "NO_PROXY": "emo.org"}, None),
        ("http://a.emo.org", {"HTTP_PROXY": "h:1", "NO_PROXY": ".emo.org"}, None),
        ("http://emo.org:80", {"HTTP_PROXY": "h:1", "NO_PROXY": "other, *"}, None),
        ("http://emo.org", {"HTTP_PROXY": "h:1", "NO_PROXY": "*"}, None),
        ("http://[fe80::1]:8000", {"HTTP_PROXY": "h:1", "NO_PROXY": "x,[fe80::1]"}, None),
        ("http://[fe80::1]:8000", {"HTTP_PROXY": "h:1", "NO_PROXY": "fe80::1"}, None),
        ("http://10.1.2.3", {"HTTP_PROXY": "h:1", "NO_PROXY": "10.0.0.0/8"}, None),
        ("http://11.1.2.3", {"HTTP_PROXY": "h:1", "NO_PROXY": "10.0.0.0/8,[::1],"}, "http://h:1"),
        ("http://[::2]:80", {"HTTP_PROXY": "h:1", "NO_PROXY": "[::1]"}, "http://h:1"),
        ("http://other.org", {"HTTP_PROXY": "h:1", "NO_PROXY": "r.org,.,"}, "http://h:1"),
        ("http://127.0.0.1", {"HTTP_PROXY": "h:1"}, None),
    ],
)
def test_which_proxy_is_used(url: str, variables: dict[str, str], proxy: str | None) -> None:
    route = route_to(httpx.URL(url), variables)
    assert (None if route.proxy is None else str(route.proxy.url)) == proxy
    assert bool(route.via) == (proxy is not None)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["http://emo:8000", "http://[fe80::1]", "http://10.0.0.1"]),
    st.text(max_size=20) | st.from_regex(r"(http|socks5)?(://)?\[?[a-z:@0-9]*\]?:?[0-9]*"),
    st.text(max_size=20) | st.from_regex(r"\[?[0-9:.]*\]?(/[0-9]+)?(,\*)?"),
)
def test_any_proxy_is_used_or_refused_in_one_line(url: str, proxy: str, exempt: str) -> None:
    try:
        route_to(httpx.URL(url), {"ALL_PROXY": proxy, "NO_PROXY": exempt})
    except ConfigError as error:
        assert str(error).startswith("ALL_PROXY is ") and str(error).isprintable()


def test_a_proxy_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://u:secret@127.0.0.1:1")
    assert cli.main(["pools", "list", "--server", "http://emo.example", "--timeout", "5"]) == 1
    message = capsys.readouterr().err
    assert "through the proxy HTTP_PROXY=http://***@127.0.0.1:1" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "url", ["http://localhost:99999", "http://emo:port", "http://[::1", "http://h:70000"]
)
def test_an_address_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert cli.main(["pools", "list", "--server", url, "--timeout", "1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("emo-serve: --server is ") and message.count("\n") == 1


def test_a_key_of_any_bytes_is_sent(port: int, tmp_path: Path) -> None:
    variables = {**os.environb, b"EMO_SERVE_API_KEY": b"a\xffb"}
    command = [sys.executable, "-m", "emo_serve", "pools", "load", "x", "--server"]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}"], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1  # the server has no POST
