"""A fine-tuned run read back: what was trained, and the weights that it stood beside."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from memgen import (
    LoRAConfig,
    MemGen,
    MemGenConfig,
    TriggerConfig,
    TriggerParam,
    WeaverConfig,
    WeaverParam,
    load_params,
)
from thoughtbubbles import Thoughtbubbles
from train.config import model_from_json
from train.finetuning.job import boundaries_for, checksum
from train.finetuning.tuning import TRAINED, Tuned
from train.models.load import Shardings, load_writer


def tuned_model(
    meta: dict[str, Any], params: Mapping[Any, Any], shardings: Shardings | None = None
) -> tuple[Thoughtbubbles, MemGen | None]:
    """The model of a fine-tuned run: an adapter merged into it, a weaver around it.

    Args:
        meta, params: of its checkpoint.
        shardings: where the model's parameters go, as in `load_pretrained`.

    Raises:
        ValueError: the frozen weights are gone or others now, or leaves are missing or too many.
    """
    config = meta["config"]
    if config["train"] == "all":
        shape, params = model_from_json(meta["model"]), params["decoder"]["model"]
        return Thoughtbubbles.from_params(shape, params, shardings=shardings), None
    writer = load_writer(config["weights"], shardings)
    woven = writer.memgen
    now = checksum(woven or writer.model)
    if now != meta["base"]:
        raise ValueError(
            f"this run was trained beside weights {meta['base']}, {config['weights']} holds {now}: "
            "put the weights that it began with there"
        )
    shape = memgen_from_json(config["memgen"]) if woven is None else woven.config
    boundary = boundaries_for(writer, config["train"], config["boundaries"])
    if woven is not None:
        boundary = np.asarray(woven.boundary[...])
        if config["train"] == "trigger" and shape.trigger is None:
            shape = dataclasses.replace(shape, trigger=trigger_from_json(config["trigger"]))
    tuned = Tuned(
        writer.model,
        config["train"],
        lora=lora_from_json(config["lora"]),
        memgen=shape,
        boundary=boundary,
        rngs=nnx.Rngs(0),
    )
    if woven is not None and tuned.memgen is not None:
        tuned.memgen = nnx.data(trained_before(woven, tuned.memgen))
    tuned = load_params(tuned, params, TRAINED[tuned.method])
    if tuned.adapter is None:
        return writer.model, tuned.memgen
    deltas = {name: map_.delta for name, map_ in tuned.adapter.items()}
    return tuned.backbone.merged(deltas), None


def trained_before(woven: MemGen, around: MemGen) -> MemGen:
    """`around` with what was trained in `woven`: a weaver, and a trigger if it has one."""
    kind = WeaverParam if woven.trigger is None else nnx.Any(WeaverParam, TriggerParam)
    return load_params(around, nnx.to_pure_dict(nnx.state(woven, kind)), kind)


def lora_from_json(fields: Any) -> LoRAConfig:
    """What `train.config.as_json` made of it."""
    return LoRAConfig(**{**fields, "targets": tuple(fields["targets"])})


def trigger_from_json(fields: Any) -> TriggerConfig:
    """What `train.config.as_json` made of it."""
    return TriggerConfig(**{**fields, "lora": lora_from_json(fields["lora"])})


def memgen_from_json(fields: Any) -> MemGenConfig:
    """What `train.config.as_json` made of it."""
    weaver = WeaverConfig(**{**fields["weaver"], "lora": lora_from_json(fields["weaver"]["lora"])})
    trigger = fields["trigger"] and trigger_from_json(fields["trigger"])
    return MemGenConfig(**{**fields, "weaver": weaver, "trigger": trigger})
