"""Show files of the repository outside docs/ on the site, and point links to them.

Pages link to such a file by its path in the repository, as `../kernels/README.md`, which is right
where the page is read there; on the site the file has a place of its own.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

__all__ = ["on_files", "on_page_markdown"]

ROOT = Path(__file__).resolve().parents[1]
PLACES = {
    "benchmarks/README.md": "benchmarks.md",
    "kernels/README.md": "kernels.md",
    "deploy/README.md": "deploy.md",
    "deploy/kubernetes/README.md": "kubernetes.md",
    "emo_serve/demo/README.md": "demo.md",
    "CHANGELOG.md": "changelog.md",
} | {
    path.relative_to(ROOT).as_posix(): f"assets/plots/{path.name}"
    for path in (ROOT / "benchmarks/results/plots").glob("*.svg")
}
"""Path in the repository -> path on the site."""

_LINK = re.compile(r"(\]\()([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of PLACES to the site."""
    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of PLACES, and from them to docs/, into links inside the site."""
    here = page.file.src_uri
    sources = {place: source for source, place in PLACES.items()}
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def turn(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        place = PLACES.get(target, target.removeprefix("docs/"))
        is_ours = target in PLACES or target.startswith("docs/")
        if "://" in match[2] or not is_ours:
            return match[0]
        return match[1] + posixpath.relpath(place, posixpath.dirname(here) or ".")

    return _LINK.sub(turn, markdown)
