"""The library's own format of a model folder, which can hold every architecture.

The folder has the files of a Hugging Face model: config.json, model.safetensors, tokenizer.json. In
config.json, `model_type` is "thoughtbubbles", `format` is the version of the format, `architecture`
is a name in `ARCHITECTURES`, and `model` is an object with all fields of the config. A fork policy
is an object with its class name as `policy`, and the fields of the class. Tensors have the names
and shapes of parameters in a checkpoint, such as `blocks/attention/q`: blocks are stacked along a
leading axis, and contracted axes come first. See docs/pretrained.md.
"""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from thoughtbubbles.architecture import ARCHITECTURES, ArchitectureConfig, architecture_name
from thoughtbubbles.fields import Fields, shown
from thoughtbubbles.policies import POLICIES
from thoughtbubbles.policy import Policy
from thoughtbubbles.safetensors_files import SafetensorsFiles
from thoughtbubbles.typed_json import from_json

MODEL_TYPE = "thoughtbubbles"
FORMAT = 1
"""Version of the format, raised whenever an older reader would misread a new folder."""


def is_own(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a config.json are those of the library's own format."""
    return fields.get("model_type") == MODEL_TYPE


def own_to_json(config: ArchitectureConfig, dtype: str) -> dict[str, Any]:
    """Return the content of config.json for a model of any architecture in the own format.

    Args:
        config: Config of the model.
        dtype: Dtype of the stored parameters, such as "bfloat16".

    Raises:
        ValueError: The architecture or the fork policy is not registered under a name.
    """
    name = architecture_name(config)
    model = dataclasses.asdict(config)
    if "policy" in model:
        model["policy"] = _policy_to_json(getattr(config, "policy"))  # noqa: B009 (not of the base)
    return {
        "architectures": [ARCHITECTURES[name].__name__],
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "architecture": name,
        "model": model,
        "torch_dtype": dtype,
    }


def own_from_json(fields: Mapping[str, Any], source: str) -> Any:
    """Return the config of a model from a config.json in the own format (`own_to_json`).

    Args:
        fields: Fields of the config.json.
        source: Name of the file for error messages.

    Returns:
        Config, an instance of the architecture's `config_class`.

    Raises:
        ValueError: A newer version wrote the file, the architecture or the policy is not
            registered, or a field is missing, unknown or of a wrong type.
    """
    given = Fields(fields, source)
    version = given.integer("format")
    if version > FORMAT:
        raise ValueError(
            f"{source} has format {version}, this version of thoughtbubbles reads {FORMAT}: "
            "install a newer one"
        )
    name = given.text("architecture")
    if name not in ARCHITECTURES:  # a package that nothing here has imported yet
        importlib.import_module("thoughtbubbles.hatchling")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{source}: unknown architecture {shown(name)}: choose one of "
            f"{', '.join(ARCHITECTURES)}, or import the module that adds it"
        )
    kind = ARCHITECTURES[name].config_class
    try:
        return from_json(kind, given.raw("model"), "model", _policy_from_json)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def check_sizes(path: Path, files: SafetensorsFiles, config: ArchitectureConfig) -> None:
    """Raise a ValueError if the safetensors files hold fewer elements than the config needs."""
    stored = sum(math.prod(shape) for shape in files.shapes.values())
    if config.num_params() > stored:
        raise ValueError(
            f"{path}: the config has {config.num_params()} parameters, its tensors {stored} "
            "elements: copy both again"
        )


def _policy_to_json(policy: Policy) -> dict[str, Any]:
    for name, known in POLICIES.items():
        if type(policy) is known:
            return {"policy": name, **dataclasses.asdict(cast(Any, policy))}
    raise ValueError(
        f"the policy {policy} has no name: put its class into thoughtbubbles.policies.POLICIES, so "
        "that the folder can be read again"
    )


def _policy_from_json(value: Any) -> Policy:
    if not isinstance(value, dict):
        raise TypeError
    name = value.get("policy")
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(
            f"unknown policy {shown(name)}: choose one of {', '.join(POLICIES)}, or import the "
            "module that adds it to thoughtbubbles.policies.POLICIES"
        )
    options = {field: option for field, option in value.items() if field != "policy"}

    def nested(value: Any) -> Policy:
        raise TypeError

    return from_json(POLICIES[name], options, f"the policy {name}", nested)
