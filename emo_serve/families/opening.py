"""Open a checkpoint directory of any family that is served.

The one place that knows all families: `emo` opens its own, `standard` says what the others are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emo_serve.checkpoints.checkpoint import ModelCheckpoint, check_shape
from emo_serve.checkpoints.companions import check_companions
from emo_serve.checkpoints.json_file import read_object, shown
from emo_serve.checkpoints.weight_files import find_tensors, is_left_over
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.config import EMO_CONFIGS, EmoConfig
from emo_serve.errors import CheckpointError, ConfigError
from emo_serve.facts import ModelFacts
from emo_serve.families.standard import FAMILIES, check_served, facts_of

__all__ = ["facts_of_config", "open_checkpoint", "open_with_reference"]


def open_checkpoint(directory: Path | str) -> ModelCheckpoint:
    """Open a checkpoint of whatever family config.json says, with the checks of that family.

    Raises ConfigError for a family or field that is not served, CheckpointError for weights that
    are not as the config says.
    """
    directory = Path(directory)
    path = directory / "config.json"
    try:
        fields = read_object(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; expected a checkpoint directory") from None
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type in EMO_CONFIGS:
        return Checkpoint.open(directory)
    has_biases = bool(fields.get("attention_bias"))
    return _StandardCheckpoint.open(directory, _read_facts(path, fields), has_biases=has_biases)


def open_with_reference(directory: Path | str, command: str, instead: str) -> Checkpoint:
    """Open a checkpoint that emo-serve can run by itself; raises ConfigError for any other.

    `command` is what needs it, `instead` the other way.
    """
    checkpoint = open_checkpoint(directory)
    if not checkpoint.facts.has_reference:
        raise ConfigError(
            f"{command}: {checkpoint.directory} is a {checkpoint.facts.family}, of which emo-serve"
            f" has no reference model that runs without vLLM; {instead}"
        )
    assert isinstance(checkpoint, Checkpoint), "only EMO has a reference model"
    return checkpoint


def facts_of_config(config: Any) -> ModelFacts:
    """Return the facts of a config that transformers read; raises ConfigError."""
    if isinstance(config, EmoConfig):
        return config.facts
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ConfigError(
            f"the config was loaded as {type(config).__name__}, model_type {shown(model_type)},"
            f" from the checkpoint's own code; expected {', '.join((*EMO_CONFIGS, *FAMILIES))};"
            " serve without --trust-remote-code"
        )
    return facts_of(FAMILIES[model_type], config.to_dict())


def _read_facts(path: Path, fields: Mapping[str, Any]) -> ModelFacts:
    """Return the facts of a standard family, with transformers' defaults for absent fields."""
    from transformers import AutoConfig

    model_type = fields.get("model_type")
    try:
        check_served(fields)
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise ConfigError(
                f"model_type is {shown(model_type)}; the models served are"
                f" {', '.join((*EMO_CONFIGS, *FAMILIES))}"
            )
        known = dict(fields)
        del known["model_type"]
        config = AutoConfig.for_model(model_type, **known)
        return facts_of(FAMILIES[model_type], {**config.to_dict(), **_plain(fields)})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # transformers computes with fields, and each way to fail is its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path}: transformers cannot read it: {reason}") from error


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file says of whole numbers and flags, which transformers may convert."""
    return {name: value for name, value in fields.items() if isinstance(value, int)}


class _StandardCheckpoint(ModelCheckpoint):
    """A checkpoint of a standard family; of its trunk only vLLM's class knows the shapes."""

    @classmethod
    def open(cls, directory: Path, facts: ModelFacts, *, has_biases: bool) -> _StandardCheckpoint:
        """Check that gates and experts, and nothing else of a router's, are there."""
        check_companions(directory)
        checkpoint = cls(directory, facts, *find_tensors(directory))
        checkpoint._check_names(has_biases)
        for index, moe in enumerate(facts.moe_layers):
            if moe is not None:
                name = facts.names.router(index)
                shape = (moe.num_experts, facts.hidden_size)
                check_shape(checkpoint.file_of(name), name, shape)
        checkpoint._check_width()
        return checkpoint

    def _check_names(self, has_biases: bool) -> None:
        """Refuse names without a place, some of which vLLM's loader would drop without a word."""
        facts, names = self.facts, self.facts.names
        missing = next((name for name in facts.expert_names() if name not in self._files), None)
        for name in self._files:
            if ".e_score_correction_bias" in name:
                raise CheckpointError(
                    f"{self.directory}: {shown(name)}: scores with a correction bias are not served"
                )
            if not self._has_place(name, has_biases):
                raise CheckpointError(
                    f"{self.directory}: {shown(name)} has no place in a {facts.family} of this"
                    " config; expected nothing but weights, three weights per expert such as"
                    f" {names.expert(facts.first_moe_layer or 0, 0, 'gate')}: no biases, no scales"
                    " of quantised weights"
                )
        if missing is not None:
            raise CheckpointError(f"{self.directory}: tensor {missing} is missing")

    def _has_place(self, name: str, has_biases: bool) -> bool:
        counts, names = self.facts.experts_per_layer, self.facts.names
        if f".{names.block}.experts." in name:
            layer, expert, _ = names.parse(name) or (len(counts), 0, "")
            return layer < len(counts) and expert < counts[layer]
        kinds = (".weight", ".bias") if has_biases else (".weight",)
        return name.endswith(kinds) or is_left_over(name)
