"""The configuration of a model folder, and the class that it is built with."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerwise.core.errors import LayerwiseError, nearest, refusing
from layerwise.core.index import read_json
from layerwise.core.trust import trusted

#: layers or experts, beyond which nobody goes
MOST = 100_000
#: mappings from configurations to classes, those with a head first
_AUTO = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForImageClassification,
    transformers.AutoModel,
)


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder; code in it is run only where the user trusts it.

    Raises:
        LayerwiseError: transformers has no such architecture, or a field is not what it allows.
    """
    path = folder / "config.json"
    fields = read_json(path)
    kind = fields.get("model_type")
    for name, value in _numbers(fields):
        if value > MOST and re.search("layer|depth|expert", name):
            raise LayerwiseError(
                f"{path}, {name}",
                allowed=f"at most {MOST}",
                found=value,
                fix="compare it with the configuration of the original model",
            )
    own = fields.get("auto_map") is not None and trusted("code")
    if not own and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
        raise _unknown(path, fields)
    with refusing(
        str(path),
        allowed=f"a configuration of type {kind!r} that transformers can read",
        fix="compare it with the configuration of the original model",
    ):
        return AutoConfig.from_pretrained(folder, trust_remote_code=own)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration with the name of its field."""
    if type(value) is int:
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)


def _unknown(path: Path, fields: dict[str, Any]) -> LayerwiseError:
    kind, remote = fields.get("model_type"), fields.get("auto_map")
    version = f"transformers {transformers.__version__}"
    found, fix = f"model_type {kind!r}", "install the transformers version that has this model"
    if remote is not None:
        found = f"remote code, {remote}, which is not run unless you say so"
        fix = "say `layerwise --trust code ...` where you trust it, or convert the checkpoint to "
        fix += "an architecture that transformers has itself"
    elif kind is None:
        found, fix = "no model_type", "write the `model_type` of the architecture into it"
    else:
        fix = nearest(str(kind), CONFIG_MAPPING.keys(), fix)
    allowed = f"a `model_type` that {version} has itself, such as llama"
    return LayerwiseError(str(path), allowed=allowed, found=found, fix=fix)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a configuration names, else the first of its type that has a head.

    Raises:
        LayerwiseError: transformers has no such class.
    """
    remote: Any = config.to_dict().get("auto_map")
    if remote is not None and trusted("code"):
        return _remote(config, remote)
    named: Any = config.architectures
    for name in named if isinstance(named, list) else ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return _fitting(kind, config)
    for kind in _classes(config):
        return kind
    raise LayerwiseError(
        f"config of type {config.model_type!r}",
        allowed="architectures that transformers knows",
        found=config.architectures,
        fix="install the transformers version that has this model",
    )


def _classes(config: PretrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes that transformers has for a configuration, those with a head first."""
    for auto in _AUTO:
        mapping: Any = auto._model_mapping
        if type(config) in mapping:
            yield mapping[type(config)]


def _remote(config: PretrainedConfig, remote: Mapping[str, str]) -> type[PreTrainedModel]:
    """The class in the folder's own code, that with a head first."""
    for auto in _AUTO:
        if auto.__name__ in remote:
            found: Any = get_class_from_dynamic_module(
                remote[auto.__name__], str(config.name_or_path)
            )
            return found
    raise LayerwiseError(
        "config.json, auto_map",
        allowed=f"one of {', '.join(auto.__name__ for auto in _AUTO)}",
        found=", ".join(remote),
        fix="name the model's class there",
    )


def _fitting(kind: type[PreTrainedModel], config: PretrainedConfig) -> type[PreTrainedModel]:
    wanted: Any = kind.config_class
    if wanted is None or isinstance(config, wanted):
        return kind
    if kind not in _classes(config):  # some types share a class
        raise LayerwiseError(
            "config.json, architectures",
            allowed=f"a class for model_type {config.model_type!r}",
            found=f"{kind.__name__}, which is one for {wanted.model_type!r}",
            fix="correct `architectures` or `model_type`",
        )
    return kind
