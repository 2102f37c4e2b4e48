"""Turn MODEL on the command line into a local directory, as vLLM itself would.

The expert store reads safetensors files from a directory, so a Hub id is resolved to a snapshot
before the engine starts. huggingface_hub shows progress and honours HF_HUB_OFFLINE and HF_HOME.
"""

from __future__ import annotations

from pathlib import Path

from emo_serve.errors import ConfigError

__all__ = ["resolve_checkpoint"]

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def resolve_checkpoint(
    model: str,
    revision: str | None,
    download_dir: str | None,
    token: bool | str | None,
    *,
    flag: str = "MODEL",
) -> Path:
    """Return the directory of a checkpoint, downloaded from the Hub if it is not a local one.

    `flag` is what the user calls it. Raises ConfigError if there is neither a directory nor a
    repository of that name.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory.resolve()
    if model.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{flag} {model!r} is not a directory")
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            token=token,
            allow_patterns=list(_PATTERNS),
        )
    except Exception as error:  # the Hub's own, and what proxies and certificates make of a call
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{flag} {model!r} is neither a directory nor a model that can be downloaded: {reason}"
        ) from error
    return Path(snapshot)
