"""The lines of docs/clients.md, run as they stand there against a real server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.progress import PATIENCE_SECONDS
from tests.support.server_process import RunningServer, serve

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "clients.md").read_text()
BLOCKS = {
    name: (language, text)
    for name, language, text in re.findall(r"<!-- run: (\w+) -->\n```(\w+)\n(.*?)```", PAGE, re.S)
}
PACKAGES = {
    "langchain": ["langchain-openai"],
    "litellm": ["litellm"],
    "llm": ["llm"],
    "lm_eval": ["lm_eval[api]", "transformers"],
    "guidellm": ["guidellm"],
}
"""What the blocks that are run apart install from PyPI; `node` installs `openai` from npm."""
IN_CI = ("curl", "openai", "structured", "tools", "anthropic")
APART = ("node", "bench", *PACKAGES)
WANTS_CLIENTS = os.environ.get("EMO_CLIENTS") == "1"


def run(command: list[str], directory: Path, **variables: str) -> str:
    """Run a command to its end and return what it printed; it must succeed."""
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def run_block(name: str, server: RunningServer, directory: Path, **variables: str) -> str:
    """Run a block of the page in a directory, at this server's address and with its key."""
    language, text = BLOCKS[name]
    text = text.replace("http://127.0.0.1:8000", server.url)
    if server.key:
        text = text.replace('"none"', f'"{server.key}"').replace(
            "Bearer none", f"Bearer {server.key}"
        )
    suffix = {"python": "py", "js": "mjs", "sh": "sh"}[language]
    file = directory / f"block.{suffix}"
    file.write_text(text)
    programs = {"py": sys.executable, "mjs": "node", "sh": "sh"}
    return run([variables.pop("program", programs[suffix]), str(file)], directory, **variables)


def test_every_block_of_the_page_is_run() -> None:
    assert set(BLOCKS) == {*IN_CI, *APART}
    fences = re.findall(r"^```(\w+)$", PAGE, re.M)
    assert len(fences) == len(BLOCKS)


@pytest.mark.server("shipped")
@pytest.mark.parametrize("name", IN_CI)
def test_a_client_that_is_here(name: str, server: RunningServer, tmp_path: Path) -> None:
    printed = run_block(name, server, tmp_path)
    signs = {
        "curl": '"model":"python"',
        "structured": "is_prime='",
        "tools": "name='weather'",
    }
    assert printed.strip()
    assert signs.get(name, "") in printed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server without keys, as `emo-serve serve` starts it."""
    with serve(tmp_path_factory.mktemp("alone")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.skipif(not WANTS_CLIENTS, reason="installs clients from PyPI and npm: EMO_CLIENTS=1")
@pytest.mark.timeout(2 * PATIENCE_SECONDS)
@pytest.mark.parametrize("name", APART)
def test_a_client_from_a_package_index(name: str, alone: RunningServer, tmp_path: Path) -> None:
    if name == "node":
        if shutil.which("npm") is None:
            pytest.skip("needs Node.js with npm")
        run(["npm", "install", "--no-audit", "--no-fund", "openai"], tmp_path)
        version = run(["npm", "ls", "openai"], tmp_path).split("openai@")[1].split()[0]
        printed = run_block(name, alone, tmp_path)
    elif name == "bench":
        version = run([sys.executable, "-c", "import vllm; print(vllm.__version__)"], tmp_path)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        printed = run_block(name, alone, tmp_path, PATH=path, PYTHONPATH=str(ROOT))
        assert re.search(r"Successful requests: +12 ", printed)
    else:
        venv = tmp_path / "venv"
        run([sys.executable, "-m", "venv", str(venv)], tmp_path)
        python = str(venv / "bin" / "python")
        run([python, "-m", "pip", "install", "--quiet", *PACKAGES[name]], tmp_path)
        package = PACKAGES[name][0].partition("[")[0]
        show = f"import importlib.metadata as m; print(m.version({package!r}))"
        version = run([python, "-c", show], tmp_path)
        variables = {"HOME": str(tmp_path), "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
        variables |= {"PYTHONPATH": str(ROOT), "LLM_USER_PATH": str(tmp_path)}
        if BLOCKS[name][0] == "python":
            variables["program"] = python
        printed = run_block(name, alone, tmp_path, **variables)
    assert printed.strip()
    with Path(os.environ.get("EMO_CLIENTS_REPORT", os.devnull)).open("a") as report:
        report.write(f"{name} {version.strip()}: {printed.strip()[-300:]!r}\n")
