"""How the environment says to reach a server: proxies and certificates, or one line why not.

httpx reads these variables itself, for all URLs at once, and fails on values that do not concern
the server asked. Here they are read for one URL, and a value that cannot work is a ConfigError that
names variable, value and remedy. A server on this machine is asked directly, whatever they say.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import httpx

from emo_serve.cli.rendering.tables import printable
from emo_serve.errors import ConfigError

__all__ = ["Route", "is_loopback", "route_to"]

_CREDENTIALS = re.compile(r"//[^/@]*@")
_KEY_LOG = "SSLKEYLOGFILE"


@dataclass(frozen=True)
class Route:
    """How to reach one server; `via` says in words which proxy is used, "" for none."""

    proxy: httpx.Proxy | None
    verify: ssl.SSLContext | bool
    via: str


def route_to(url: httpx.URL, environ: Mapping[str, str] | None = None) -> Route:
    """Read the environment for one URL; raises ConfigError."""
    known = os.environ if environ is None else environ
    # Without TLS no certificates are needed; httpx would read them all the same.
    verify: ssl.SSLContext | bool = _certificates(known) if url.scheme == "https" else False
    if is_loopback(url.host) or _is_exempt(url, known):
        return Route(None, verify, "")
    found = _proxy_variable(url.scheme, known)
    if found is None:
        return Route(None, verify, "")
    name, value = found
    return Route(
        _proxy(name, value, url.host), verify, f" through the proxy {name}={_shown(value)}"
    )


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine: localhost, 127.0.0.0/8, ::1, or any address, 0.0.0.0."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address is not None and (address.is_loopback or address.is_unspecified)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:  # 127.1 is one to every resolver
        return ipaddress.ip_address(socket.inet_aton(host)) if host[:1].isdigit() else None
    except (OSError, UnicodeError):
        return None


# -- proxies --


def _proxy_variable(scheme: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the variable that holds the proxy for a scheme, and its value."""
    for kind in (scheme, "all"):
        for name in (f"{kind}_proxy", f"{kind}_proxy".upper()):
            if name in environ:  # as everywhere, an empty one in small letters hides the other
                value = environ[name].strip()
                if value:
                    return name, value
                break
    return None


def _is_exempt(url: httpx.URL, environ: Mapping[str, str]) -> bool:
    """Tell whether NO_PROXY has the host: a name, a domain, an address, a network or `*`."""
    listed = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    return any(_covers(entry.strip().lower(), url) for entry in listed.split(","))


def _covers(entry: str, url: httpx.URL) -> bool:
    host, address = url.host.lower(), _address(url.host)
    if entry == "*" or entry.strip("[]") == host:
        return True
    if address is not None:
        try:
            return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            return entry in (f"{host}:{url.port}", f"[{host}]:{url.port}")
    domain = entry.removeprefix("*").removeprefix(".")
    return bool(domain) and any(
        f".{name}".endswith(f".{domain}") for name in (host, f"{host}:{url.port}")
    )


def _proxy(name: str, value: str, host: str) -> httpx.Proxy:
    remedy = f"give http://HOST:PORT, unset {name}, or set NO_PROXY={printable(host)}"
    try:
        proxy = httpx.Proxy(value if "://" in value else f"http://{value}")
        if not proxy.url.host:
            raise ValueError("it names no host")
        if not 0 < (proxy.url.port or 1) < 2**16:
            raise ValueError("its port is not one from 1 to 65535")
        if proxy.url.scheme.startswith("socks"):
            import_module("socksio")
    except ImportError as error:
        raise ConfigError(
            f"{name} is {_shown(value)!r}: a SOCKS proxy needs the package socksio;"
            f" pip install 'httpx[socks]', {remedy}"
        ) from error
    except (httpx.InvalidURL, ValueError) as error:
        reason = printable(_CREDENTIALS.sub("//***@", str(error)))
        raise ConfigError(f"{name} is {_shown(value)!r}: {reason}; {remedy}") from error
    return proxy


def _shown(value: str) -> str:
    """Return a variable's value without the password that a proxy's URL may hold."""
    return printable(_CREDENTIALS.sub("//***@", value))


# -- certificates --


def _certificates(environ: Mapping[str, str]) -> ssl.SSLContext:
    """Return what httpx would verify a server by; raises ConfigError naming the variable."""
    for name, is_there in (("SSL_CERT_FILE", Path.is_file), ("SSL_CERT_DIR", Path.is_dir)):
        value = environ.get(name)
        if value and not is_there(Path(value)):
            what = "file" if name == "SSL_CERT_FILE" else "directory"
            raise _refused(name, value, f"there is no such {what}")
        if value:
            break  # httpx does not look at the second
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl's errors are, too
        names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", _KEY_LOG) if environ.get(name)]
        file = error.filename
        names.sort(key=lambda name: environ[name] != file)  # the one it is about first
        for name in names:
            raise _refused(name, environ[name], str(error)) from error
        raise ConfigError(f"no certificates to verify servers by: {error}") from error


def _refused(name: str, value: str, reason: str) -> ConfigError:
    what = "a file to write keys to" if name == _KEY_LOG else "certificates in PEM format"
    return ConfigError(
        f"{name} is {printable(value)!r}: {printable(reason)}; name {what}, or unset {name}"
    )
