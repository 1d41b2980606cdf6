"""A fine-tuned run read back: what was trained, and the weights that it stood beside."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from memgen import LoRAConfig, MemGen, MemGenConfig, TriggerConfig, WeaverConfig, load_params
from thoughtbubbles import Thoughtbubbles
from train.config import model_from_json
from train.finetuning import boundaries_for, checksum
from train.load import load_writer
from train.tuning import TRAINED, Tuned


def tuned_model(
    meta: dict[str, Any], params: Mapping[Any, Any]
) -> tuple[Thoughtbubbles, MemGen | None]:
    """The model of a fine-tuned run: an adapter merged into it, a weaver around it.

    Args:
        meta, params: of its checkpoint.

    Raises:
        ValueError: the frozen weights are gone or others now, or leaves are missing or too many.
    """
    config = meta["config"]
    if config["train"] == "all":
        return Thoughtbubbles.from_params(
            model_from_json(meta["model"]), params["decoder"]["model"]
        ), None
    writer = load_writer(config["weights"])
    now = checksum(writer.model)
    if now != meta["base"]:
        raise ValueError(
            f"this run was trained beside weights {meta['base']}, {config['weights']} holds {now}: "
            "put the weights that it began with there"
        )
    tuned = Tuned(
        writer.model,
        config["train"],
        lora=lora_from_json(config["lora"]),
        memgen=memgen_from_json(config["memgen"]),
        boundary=boundaries_for(writer, config["train"], config["boundaries"]),
        rngs=nnx.Rngs(0),
    )
    tuned = load_params(tuned, params, TRAINED[tuned.method])
    if tuned.adapter is None:
        return writer.model, tuned.memgen
    deltas = {name: map_.delta for name, map_ in tuned.adapter.items()}
    return tuned.backbone.merged(deltas), None


def lora_from_json(fields: Any) -> LoRAConfig:
    """What `train.config.as_json` made of it."""
    return LoRAConfig(**{**fields, "targets": tuple(fields["targets"])})


def memgen_from_json(fields: Any) -> MemGenConfig:
    """What `train.config.as_json` made of it."""

    def part(kind: type, fields: Any) -> Any:
        return fields and kind(**{**fields, "lora": lora_from_json(fields["lora"])})

    weaver, trigger = part(WeaverConfig, fields["weaver"]), part(TriggerConfig, fields["trigger"])
    return MemGenConfig(**{**fields, "weaver": weaver, "trigger": trigger})
