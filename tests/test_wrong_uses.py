"""Wrong uses of what the libraries export: each is one line that names both values; all are cheap,
since nothing is computed: shapes alone are followed."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import memgen
from memgen import LoRAConfig, MemGenConfig, TriggerConfig, WeaverConfig
from thoughtbubbles import (
    Block,
    Fork,
    ModelConfig,
    PrefixRank,
    Streams,
    Thoughtbubbles,
    Threshold,
    TopK,
    join_segments,
    left_align,
    merge,
    restore_alignment,
    split_segments,
    token_slots,
)
from thoughtbubbles.bubbles import bubble_map
from thoughtbubbles.checks import check_stop, is_whole
from thoughtbubbles.decoding import generate
from thoughtbubbles.hatchling import Hatchling, HatchlingConfig, grow
from thoughtbubbles.hatchling import merge as merge_hatchlings
from thoughtbubbles.hatchling.forking import ForkingHatchling, ForkingHatchlingConfig
from thoughtbubbles.rows import next_tokens

SMALL = ModelConfig(vocab_size=20, embed_dim=8, num_layers=2, num_heads=2, fork_layers=(1,))
HATCHLING = HatchlingConfig(vocab_size=20, embed_dim=8, num_layers=2, num_heads=2, num_neurons=16)
Call = Callable[[], Any]


class Given:
    """Values of shapes alone."""

    def array(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        return jnp.zeros(shape, dtype)

    def keys(self, rows: int) -> Any:
        return jax.random.split(jax.random.key(0), rows)

    def ids(self, *shape: int) -> Any:
        return jnp.zeros(shape, jnp.int32)

    def streams(self, width: int = 8, **changes: Any) -> Streams:
        return Streams.start(jnp.zeros((2, 4, width)), **changes)

    @property
    def fork(self) -> Fork:
        return Fork(8, PrefixRank(2.0), rngs=nnx.Rngs(0))

    @property
    def model(self) -> Thoughtbubbles:
        return Thoughtbubbles(SMALL, rngs=nnx.Rngs(0))

    @property
    def hatchling(self) -> Hatchling:
        return Hatchling(HATCHLING, rngs=nnx.Rngs(0))

    @property
    def forking_hatchling(self) -> ForkingHatchling:
        config = ForkingHatchlingConfig(**vars(HATCHLING), fork_layers=(1,))
        return ForkingHatchling(config, rngs=nnx.Rngs(0))

    @property
    def hatchling_adapter(self) -> Any:
        config = LoRAConfig(rank=2, targets=("dx",))
        return memgen.make_adapter(self.hatchling, config, rngs=nnx.Rngs(0))

    @property
    def made(self) -> memgen.MemGen:
        return self.with_memory()

    def with_memory(self, config: MemGenConfig | None = None, **parts: Any) -> memgen.MemGen:
        lora = LoRAConfig(rank=2)
        config = config or MemGenConfig(WeaverConfig(2, 2, lora=lora), TriggerConfig(lora=lora))
        parts = {"boundary": np.zeros(20, np.uint8)} | parts
        return memgen.MemGen(self.model.backbone(), config, rngs=nnx.Rngs(0), **parts)

    def plan(self, rows: int = 2) -> memgen.Plan:
        kind = self.ids(rows, 2)
        return memgen.Plan(kind + jnp.array([0, 2]), kind, kind + 2)


WRONG: dict[str, tuple[Callable[[Given], Any], str]] = {
    # Streams
    "residuals of two axes": (lambda g: Streams.start(g.array(4, 8)), r"shape \(4, 8\).*\[batch"),
    "residuals that are ids": (lambda g: Streams.start(g.ids(2, 4, 8)), "int32.*float"),
    "residuals that are no array": (lambda g: Streams.start([[1.0]]), r"list.*array"),
    "no copies": (lambda g: g.streams(copies=0), "copies=0 is below 1"),
    "lengths of other rows": (lambda g: g.streams(length=g.ids(3)), r"\(3,\) for 2 rows"),
    "lengths beyond the row": (lambda g: g.streams(length=np.array([9, 0])), r"\[9, 0\] of 4"),
    "negative lengths": (lambda g: g.streams(length=np.array([-1, 0])), r"\[-1, 0\] of 4 tokens"),
    "lengths of floats": (lambda g: g.streams(length=g.array(2)), "length of type float32"),
    "lengths of bool": (lambda g: g.streams(length=[True, True]), "length of type bool"),
    "first of floats": (lambda g: g.streams(first=[0.5, 0.5]), "first of type float64"),
    "first of other rows": (lambda g: g.streams(first=g.ids(3)), r"first of shape \(3,\) for 2"),
    "a misspelt field": (lambda g: g.streams().replace(y=0), "no field 'y': did you mean"),
    "texts of other rows": (lambda g: g.streams().page([["a"]]), r"no values here|texts of \[1\]"),
    # Rows
    "a mask of other tokens": (
        lambda g: left_align(g.ids(2, 4), g.ids(2, 3) > 0),
        r"\(2, 3\).*\(2, 4",
    ),
    "a mask of other values": (
        lambda g: restore_alignment(g.array(2, 4), g.ids(1, 4) > 0, g.ids(2, 4)),
        r"\(1, 4\).*\(2, 4",
    ),
    "a mask of floats": (
        lambda g: left_align(g.ids(2, 4), g.array(2, 4)),
        "a mask of type float32: give bool",
    ),
    "segment ids of floats": (
        lambda g: split_segments(g.ids(2, 4), g.array(2, 4), 2),
        "segment ids of type float32",
    ),
    "segment ids of bool": (
        lambda g: join_segments(g.array(2, 4), g.ids(2, 4) > 0),
        "segment ids of type bool",
    ),
    "segment ids beyond": (
        lambda g: split_segments(g.ids(2, 4), np.full((2, 4), 3), 2),
        "to 3 with num_segments=2",
    ),
    "segment ids of other tokens": (
        lambda g: split_segments(g.ids(2, 4), g.ids(2, 3), 2),
        r"ids of shape \(2, 3\).*\(2, 4\)",
    ),
    "no segments": (lambda g: split_segments(g.ids(2, 4), g.ids(2, 4), 0), "num_segments=0"),
    "segments of other rows": (
        lambda g: join_segments(g.array(3, 4), g.ids(2, 4)),
        r"\(3, 4\) for segment ids of shape \(2, 4\): give",
    ),
    "residuals of other slots": (
        lambda g: g.streams().replace(x=g.array(2, 3, 8)),
        r"residuals of shape \(2, 3, 8\) for streams \(2, 4\): give",
    ),
    "residuals of one row": (lambda g: g.streams().replace(x=g.array(1, 4, 8)), r"\(1, 4, 8\) for"),
    "a bias of a width a head": (
        lambda g: g.streams().attention_bias(np.zeros(3)),
        r"head_dim=array\(\[0., 0., 0.\]\) is below 1",
    ),
    "values of other streams": (
        lambda g: g.streams().attenuate(g.array(2, 3, 8)),
        r"values of shape \(2, 3, 8\) for streams \(2, 4\): give",
    ),
    "a bubble of other rows": (
        lambda g: g.streams().bubble_of(g.ids(3), 2),
        r"tokens of shape \(3,\) for 2 rows: give",
    ),
    "half a copy": (lambda g: g.streams(copies=1.5), "copies=1.5: give a whole number"),
    "ranks of other tokens": (
        lambda g: restore_alignment(g.array(2, 4, 3), g.ids(2, 4) > 0, g.ids(2, 3)),
        r"rank of shape \(2, 3\) for a mask of shape \(2, 4\): give",
    ),
    "ranks of floats": (
        lambda g: restore_alignment(g.array(2, 4, 3), g.ids(2, 4) > 0, g.array(2, 4)),
        "rank of type float32: give integers",
    ),
    "values of one axis": (
        lambda g: restore_alignment(g.array(2), g.ids(2) > 0, g.ids(2)),
        r"values of shape \(2,\): give \[batch, tokens",
    ),
    "lists of tokens": (
        lambda g: left_align([[1, 2]], [[True, True]]),
        "values are a list: give",
    ),
    "segments of one axis": (
        lambda g: split_segments(g.ids(4), g.ids(4), 1),
        r"tokens of shape \(4,\): give \[batch, tokens",
    ),
    "half a segment": (
        lambda g: split_segments(g.ids(2, 4), g.ids(2, 4), 1.5),
        "num_segments=1.5: give a whole number",
    ),
    # Caches of others
    "entries of another width": (
        lambda g: token_slots(g.streams(), 4).write(g.array(2, 4, 3), g.array(2, 4, 5)),
        r"entries of shape \(2, 4, 5\) for a cache of shape \(2, 4, 3\): give",
    ),
    "one entry for two caches": (
        lambda g: token_slots(g.streams(), 4).write(
            (g.array(2, 4), g.array(2, 4)), (g.array(2, 4),)
        ),
        r"entries PyTreeDef\(\(\*,\)\) for caches PyTreeDef\(\(\*, \*\)\): give one",
    ),
    "a cache of numbers": (
        lambda g: token_slots(g.streams(), 4).write(1.0, 2.0),
        "a cache that is a float: give arrays",
    ),
    "slots of an array": (
        lambda g: token_slots(g.array(2, 4, 8), 4),
        r"not \(2, 4, 8\): Streams.s",
    ),
    "streams in place of a cache": (
        lambda g: g.fork.init_cache(2, 4, before=g.streams()),
        "before is a Streams: give the ForkCache",
    ),
    "tokens in place of a batch": (
        lambda g: g.fork.init_cache(g.ids(2, 4), 4),
        r"batch=\(2, 4\): give a whole number, such as tokens.shape\[0\]",
    ),
    "half a row": (lambda g: g.model.init_cache(2.5, 4), "batch=2.5: give a whole number"),
    "no tokens": (lambda g: g.model.init_cache(2, 0), "max_tokens=0: choose 1 or more"),
    "tokens in place of a Hatchling's batch": (
        lambda g: g.hatchling.init_cache(g.ids(2, 4), 4),
        r"batch=\(2, 4\): give a whole",
    ),
    "vectors of other rows": (
        lambda g: g.model.advance(g.model.init_cache(2, 4), g.ids(3, 4), g.ids(3)),
        r"vectors \(3, 4, 8\) for a cache of 2 rows: give",
    ),
    "lengths of other rows of a cache": (
        lambda g: g.model.advance(g.model.init_cache(2, 4), g.ids(2, 4), g.ids(3)),
        r"length of shape \(3,\) for 2 rows: give",
    ),
    "lengths of fractions": (
        lambda g: g.model.advance(g.model.init_cache(2, 4), g.ids(2, 4), g.array(2)),
        "length of type float32: give integers",
    ),
    "a fork layer's cache for a model": (
        lambda g: g.model.advance(g.fork.init_cache(2, 4), g.ids(2, 4), g.ids(2)),
        "a ForkCache in place of a cache: give",
    ),
    "a fork layer's cache for a Hatchling": (
        lambda g: g.hatchling.advance(g.fork.init_cache(2, 4), g.ids(2, 4), g.ids(2)),
        "a ForkCache in place of a State: give",
    ),
    "a Hatchling's state for a forking one": (
        lambda g: g.forking_hatchling.advance(g.hatchling.init_cache(2, 4), g.ids(2, 4), g.ids(2)),
        "a State in place of a ForkingState: give",
    ),
    "lengths of other rows of a state": (
        lambda g: g.hatchling.advance(g.hatchling.init_cache(2, 4), g.ids(2, 4), g.ids(3)),
        r"length of shape \(3,\) for 2 rows: give",
    ),
    "vectors of another width in a cache": (
        lambda g: g.model.backbone().extend(g.model.init_cache(2, 4), g.array(2, 4, 6), g.ids(2)),
        "vectors of width 6 for a decoder of embed_dim=8: give",
    ),
    "vectors of another width in a Hatchling": (
        lambda g: g.forking_hatchling.hidden_states(g.array(2, 4, 6)),
        "vectors of width 6 for a Hatchling of embed_dim=8: give",
    ),
    # Keys and initializers
    "a key in place of Rngs": (
        lambda g: Fork(8, rngs=jax.random.key(0)),
        r"rngs is a \w+: give nnx.Rngs\(seed\)",
    ),
    "a seed in place of Rngs": (lambda g: Thoughtbubbles(SMALL, rngs=0), "rngs is a int: give nnx"),
    "a seed for a Hatchling": (lambda g: Hatchling(HATCHLING, rngs=0), "rngs is a int: give nnx"),
    "a seed for memory": (
        lambda g: memgen.MemGen(g.model.backbone(), boundary=np.zeros(20), rngs=0),
        "rngs is a int: give nnx",
    ),
    "a seed for an adapter": (
        lambda g: memgen.make_adapter(g.model.backbone(), LoRAConfig(), rngs=0),
        "rngs is a int: give nnx",
    ),
    "an initializer of another shape": (
        lambda g: Fork(8, rngs=nnx.Rngs(0), kernel_init=lambda *_: g.array(3)),
        r"shape \(3,\) for a kernel of \(8, 2\): return",
    ),
    "an initializer of a weaver of another shape": (
        lambda g: memgen.Weaver(
            *2 * [g.model.backbone()],
            WeaverConfig(),
            rngs=nnx.Rngs(0),
            kernel_init=lambda *_: g.array(3),
        ),
        r"shape \(3,\) for a kernel of \(8, 8\): return",
    ),
    "an array for an initializer": (
        lambda g: Fork(8, rngs=nnx.Rngs(0), kernel_init=g.array(8, 2)),
        "kernel_init is a .*: give an initializer",
    ),
    "a factory of initializers": (
        lambda g: Block(SMALL, rngs=nnx.Rngs(0), kernel_init=lambda *_: nnx.initializers.normal()),
        r"gives a function for a kernel of \(8, 8\): return",
    ),
    "a type that is none": (
        lambda g: Fork(8, rngs=nnx.Rngs(0), param_dtype="nope"),
        "param_dtype='nope': choose a floating",
    ),
    "a type of memory that is none": (
        lambda g: g.with_memory(param_dtype="nope"),
        "param_dtype='nope': choose a floating",
    ),
    # Adapters
    "a delta of no layer": (lambda g: g.model.merge_lora({"w": g.array(3)}), "'w': choose from q"),
    "a delta of another shape": (
        lambda g: g.model.merge_lora({"q": g.array(3)}),
        r"q: a delta of shape \(3,\) for a layer of \(2, 8, 8\): merge",
    ),
    "a Hatchling's delta": (
        lambda g: g.hatchling.merge_lora({"dx": g.array(3)}),
        r"dx: a delta of shape \(3,\) for a layer of \(8, 16\): merge",
    ),
    "a decoder without targets": (
        lambda g: memgen.make_adapter(
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)), LoRAConfig(), rngs=nnx.Rngs(0)
        ),
        "Linear has no lora_targets, .*: give a decoder",
    ),
    "targets in one text": (lambda g: LoRAConfig(targets="qv"), r"'qv': give a tuple"),
    "half a rank": (lambda g: LoRAConfig(rank=2.5), "rank=2.5: choose a whole number"),
    "an adapter of another model": (
        lambda g: g.model.apply_lora({"q": g.hatchling_adapter["dx"]}),
        r"q: an adapter of shape \(8, 16\) for a layer of \(2, 8, 8\): make",
    ),
    "an adapter of another Hatchling": (
        lambda g: g.hatchling.apply_lora({"e": g.hatchling_adapter["dx"]}),
        r"e: an adapter of shape \(8, 16\) for a layer of \(16, 8\): make",
    ),
    "an adapter of another net": (
        lambda g: memgen.apply_lora(
            {"q": nnx.Linear(2, 3, rngs=nnx.Rngs(0))}, {"q": g.hatchling_adapter["dx"]}
        ),
        r"q: an adapter of shape \(8, 16\) for a layer of \(2, 3\): give",
    ),
    "no adapter": (lambda g: g.model.apply_lora(None), "adapter is a NoneType: give a mapping"),
    "no adapter for a net": (
        lambda g: memgen.apply_lora(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ["q"]),
        "adapter is a list: give a mapping",
    ),
    "layers of an array": (
        lambda g: memgen.linear_layers(g.array(3)),
        "holds no nnx.Module, whose layers have names: give",
    ),
    "layers of a Linen module": (
        lambda g: memgen.linear_layers(linen.Dense(3)),
        "a Dense holds no nnx.Module, whose layers have names: give",
    ),
    "targets in a list": (lambda g: LoRAConfig(targets=["q"]), r"targets=\['q'\]: give a tuple"),
    # Fork layers
    "an array in a fork layer": (lambda g: g.fork(g.array(2, 4, 8)), r"not \(2, 4, 8\): Streams.s"),
    "another width in a fork layer": (lambda g: g.fork(g.streams(6)), "width 6 .* embed_dim=8"),
    "another width in extend": (
        lambda g: g.fork.extend(g.streams(6), g.fork.init_cache(2, 4)),
        "width 6 .* embed_dim=8",
    ),
    "a fork layer without width": (lambda g: Fork(0, rngs=nnx.Rngs(0)), "embed_dim=0"),
    "a width in a text": (lambda g: Fork("8", rngs=nnx.Rngs(0)), "embed_dim='8': give a whole"),
    "a width of fractions": (lambda g: Fork(8.0, rngs=nnx.Rngs(0)), "embed_dim=8.0: give a whole"),
    "a policy by name": (lambda g: Fork(8, "TopK", rngs=nnx.Rngs(0)), "policy='TopK'.*PrefixRank"),
    "an unknown norm": (
        lambda g: Fork(8, norm="layer", rngs=nnx.Rngs(0)),
        "norm='layer'.*layernorm",
    ),
    "a gate of 0": (lambda g: Fork(8, gate=0.0, rngs=nnx.Rngs(0)), "gate=0.0.*positive"),
    "a fork layer of integers": (
        lambda g: Fork(8, dtype=jnp.int32, rngs=nnx.Rngs(0)),
        "dtype=int32: choose a floating",
    ),
    "scores of integers": (
        lambda g: Fork(8, param_dtype=jnp.int8, rngs=nnx.Rngs(0)),
        "param_dtype=int8: choose a floating",
    ),
    "a later part without a cache": (lambda g: g.fork(g.streams(first=g.ids(2))), "Fork.extend"),
    "a cache for the paper's policy": (
        lambda g: Fork(8, TopK(2.0), rngs=nnx.Rngs(0)).init_cache(2, 4),
        "TopK.* can't be cached",
    ),
    "a cache of no rows": (lambda g: g.fork.init_cache(0, 4), "batch=0: choose 1"),
    "a cache behind another one": (
        lambda g: g.fork.init_cache(2, 4, g.fork.init_cache(3, 4)),
        "batch=2, .* batch=3",
    ),
    "a cache of other rows": (
        lambda g: g.fork.extend(g.streams(), g.fork.init_cache(3, 4)),
        "2 rows.*3|3.*2",
    ),
    "slots of no tokens": (lambda g: token_slots(g.streams(), 0), "max_tokens=0: choose 1"),
    "slots behind a fork layer": (lambda g: token_slots(g.fork(g.streams()), 4), "take the slots"),
    "entries of other slots": (
        lambda g: token_slots(g.streams(), 9).write(g.array(2, 8), g.array(2, 4)),
        r"\(2, 8\) for 2 rows of 9",
    ),
    "entries of other streams": (
        lambda g: token_slots(g.streams(), 9).write(g.array(2, 9), g.array(2, 3)),
        r"\(2, 3\) for new streams \(2, 4\)",
    ),
    "a merge of an array": (lambda g: merge(g.array(2, 4, 8)), r"not \(2, 4, 8\): Streams.start"),
    "a merge of predictions": (lambda g: merge(g.streams(), "probability"), "merge='probability'"),
    "a ratio below 1": (lambda g: PrefixRank(ratio=0.5), "ratio=0.5"),
    "a window of 0": (lambda g: PrefixRank(ratio=2.0, window=0), "window=0"),
    "a threshold's ratio below 1": (lambda g: Threshold(ratio=0.5), "ratio=0.5"),
    "a ratio in a text": (lambda g: PrefixRank("2"), "ratio='2': give a number"),
    "no ratio": (lambda g: TopK(None), "ratio=None: give a number"),
    "a window of fractions": (lambda g: PrefixRank(2.0, 2.5), "window=2.5: give a whole number"),
    # Models
    "heads that do not divide": (lambda g: ModelConfig(20, 8, 2, 3), "num_heads=3 .* embed_dim=8"),
    "a fork layer beyond": (
        lambda g: ModelConfig(20, 8, 2, 2, fork_layers=(2,)),
        "fork layer 2 .* num_layers=2",
    ),
    "a policy by name in a config": (
        lambda g: ModelConfig(20, 8, 2, 2, policy="TopK"),
        "policy='TopK'.*PrefixRank",
    ),
    "a size in a text": (lambda g: ModelConfig("20", 8, 2, 2), "vocab_size='20': give a whole"),
    "a number of fork layers": (
        lambda g: ModelConfig(20, 8, 2, 2, fork_layers=1),
        r"fork_layers=1: give a tuple of whole numbers, such as \(1,\)",
    ),
    "fork layers in a list": (
        lambda g: ModelConfig(20, 8, 2, 2, fork_layers=[1]),
        r"fork_layers=\[1\]: give a tuple",
    ),
    "a Hatchling's size of fractions": (
        lambda g: dataclasses.replace(HATCHLING, num_layers=2.0),
        "num_layers=2.0: give a whole number",
    ),
    "a text for a temperature": (
        lambda g: generate(g.model, [[1]], 2, temperature="hot"),
        "temperature='hot': give a number",
    ),
    "a number of tokens in a text": (
        lambda g: generate(g.model, [[1]], "2"),
        "max_new_tokens='2': give a whole",
    ),
    "a prompt alone": (lambda g: generate(g.model, [1, 2], 2), "prompt 0 is 1: give a list"),
    "fractions in a prompt": (lambda g: generate(g.model, [[0.5]], 2), "type float64: give int"),
    "a seed in a text": (lambda g: generate(g.model, [[1]], 2, seed="x"), "seed='x': give a whole"),
    "a backbone that generates": (
        lambda g: generate(g.model.backbone(), [[1]], 2),
        "Backbone does not generate here: give",
    ),
    "rows of one axis": (lambda g: g.model.loss(g.ids(4)), r"rows of shape \(4,\): give"),
    "rows of one token": (lambda g: g.model.loss(g.ids(2, 1)), r"rows of shape \(2, 1\): give"),
    "rows of floats": (lambda g: g.model.loss(g.array(2, 4)), "rows of type float32: give int"),
    "rows padded on the left": (
        lambda g: g.model.loss(np.array([[5, 6, -1], [-1, 5, 6]])),
        r"row 1 has padding \(-1\) in front of a token: pad",
    ),
    "a Hatchling's rows padded inside": (
        lambda g: g.hatchling.loss(np.array([[5, -1, 6]])),
        r"row 0 has padding \(-1\) in front of a token: pad",
    ),
    "targets of other inputs": (
        lambda g: g.model.log_prob(g.model.run(g.ids(2, 4)), g.ids(2, 3)),
        r"targets of shape \(2, 3\) for predictions of shape \(2, 4\): give",
    ),
    "targets of one row": (
        lambda g: g.hatchling.log_prob(g.hatchling.run(g.ids(2, 4)), g.ids(1, 4)),
        r"targets of shape \(1, 4\) for predictions of shape \(2, 4\): give",
    ),
    "logits of an array": (
        lambda g: g.model.logits(g.array(2, 4, 8)),
        r"an output that is \(2, 4, 8\): give",
    ),
    "an unknown preset": (lambda g: ModelConfig.preset("huge"), "'huge': choose one of tiny"),
    "a config that is a dict": (
        lambda g: Thoughtbubbles({"vocab_size": 20}, rngs=nnx.Rngs(0)),
        "dict.*ModelConfig",
    ),
    "parameters of integers": (
        lambda g: Thoughtbubbles(SMALL, rngs=nnx.Rngs(0), param_dtype="int32"),
        "param_dtype=int32: choose a floating",
    ),
    "a block of integers": (
        lambda g: Block(SMALL, rngs=nnx.Rngs(0), param_dtype=jnp.int32),
        "param_dtype=int32: choose a floating",
    ),
    "ids in lists of other lengths": (lambda g: g.model([[1, 2], [3]]), "list that makes no array"),
    "ids in a list of floats": (lambda g: g.model([[1.5]]), "float32: give int32"),
    "ids of one axis": (lambda g: g.model(g.ids(4)), r"shape \(4,\).*\[batch, tokens\]"),
    "ids that are floats": (lambda g: g.model(g.array(2, 4)), "float32.*int"),
    "a mask of other ids": (lambda g: g.model(g.ids(2, 4), g.ids(2, 3) > 0), r"\(2, 3\).*\(2, 4\)"),
    "lengths of other ids": (lambda g: g.model.run(g.ids(2, 4), g.ids(3)), r"\(3,\) for 2 rows"),
    "vectors of another width": (lambda g: g.model.hidden_states(g.array(2, 4, 6)), "width 6.*8"),
    "an array in a block": (
        lambda g: Block(SMALL, rngs=nnx.Rngs(0))(g.array(2, 4, 8)),
        r"not \(2, 4, 8\): Streams.start",
    ),
    "another width in a block": (
        lambda g: Block(SMALL, rngs=nnx.Rngs(0))(g.streams(6)),
        "width 6 .*embed_dim=8",
    ),
    "a text of other ids": (lambda g: bubble_map(g.model, [1, 2], ["a"]), "2 ids and 1 texts"),
    "a block's config that is a dict": (lambda g: Block({}, rngs=nnx.Rngs(0)), "dict.*ModelConfig"),
    "a bias of no width": (lambda g: g.streams().attention_bias(0), "head_dim=0 is below 1"),
    # Hatchlings
    "a Hatchling's ids of one axis": (lambda g: g.hatchling(g.ids(4)), r"shape \(4,\): give"),
    "a Hatchling's ids of floats": (lambda g: g.hatchling(g.array(2, 4)), "float32: give int"),
    "neurons of ids of one axis": (
        lambda g: g.hatchling.activations(g.ids(4)),
        r"shape \(4,\): give",
    ),
    "a forking Hatchling's ids of one axis": (
        lambda g: g.forking_hatchling(g.ids(4)),
        r"shape \(4,\): give",
    ),
    "a Hatchling's config that is a dict": (
        lambda g: Hatchling({"vocab_size": 20}, rngs=nnx.Rngs(0)),
        "dict: give a HatchlingConfig",
    ),
    "a Hatchling of another config": (
        lambda g: Hatchling(SMALL, rngs=nnx.Rngs(0)),
        "ModelConfig: give a HatchlingConfig",
    ),
    "a forking Hatchling that does not fork": (
        lambda g: ForkingHatchling(HATCHLING, rngs=nnx.Rngs(0)),
        "HatchlingConfig: give a ForkingHatchlingConfig",
    ),
    "a model that grows": (lambda g: grow(g.model, 64), "a Thoughtbubbles in place of a model"),
    "neurons in a text": (lambda g: grow(g.hatchling, "64"), "num_neurons='64': give a whole"),
    "a model to merge": (
        lambda g: merge_hatchlings(g.hatchling),
        r"1 model\(s\) to merge: give two or more, in a list",
    ),
    # Memory
    "a boundary table of other ids": (lambda g: g.with_memory(boundary=np.zeros(3)), "3 ids.* 20"),
    "a reasoner that is no decoder": (
        lambda g: memgen.MemGen(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), boundary=[], rngs=nnx.Rngs(0)),
        "embed_dim",
    ),
    "a config of another class": (
        lambda g: g.with_memory(WeaverConfig()),
        "WeaverConfig.*MemGenConfig",
    ),
    "a rank of 0": (lambda g: LoRAConfig(rank=0), "rank=0: choose 1"),
    "a target that is no layer": (
        lambda g: memgen.make_adapter(
            g.model.backbone(), LoRAConfig(targets=("qq",)), rngs=nnx.Rngs(0)
        ),
        "'qq': choose",
    ),
    "a weaver of another config": (
        lambda g: memgen.Weaver(*2 * [g.model.backbone()], TriggerConfig(), rngs=nnx.Rngs(0)),
        "TriggerConfig: give a WeaverConfig",
    ),
    "a trigger of another config": (
        lambda g: memgen.Trigger(g.model.backbone(), WeaverConfig(), rngs=nnx.Rngs(0)),
        "WeaverConfig: give a TriggerConfig",
    ),
    "a weaver of integers": (
        lambda g: memgen.Weaver(
            *2 * [g.model.backbone()], WeaverConfig(), rngs=nnx.Rngs(0), param_dtype=int
        ),
        "param_dtype=int64: choose a floating",
    ),
    "an adapter of another config": (
        lambda g: memgen.make_adapter(g.model.backbone(), WeaverConfig(), rngs=nnx.Rngs(0)),
        "WeaverConfig: give a LoRAConfig",
    ),
    "an unknown context": (lambda g: WeaverConfig(context="text"), "context='text': choose emb"),
    "a certain trigger": (
        lambda g: TriggerConfig(init_invoke_prob=1.0),
        "init_invoke_prob=1.0: ch",
    ),
    "text in lists of other lengths": (
        lambda g: g.made.weave([[1, 2], [3]], g.plan()),
        "list that makes no array",
    ),
    "text of one axis": (lambda g: g.made.weave(g.ids(4), g.plan()), r"shape \(4,\).*\[batch, tok"),
    "text of floats": (lambda g: g.made.weave(g.array(2, 4), g.plan()), "float32.*int"),
    "a plan of other rows": (lambda g: g.made.weave(g.ids(2, 4), g.plan(3)), "3 rows .* 2"),
    "a loss mask of other tokens": (
        lambda g: memgen.sft_loss(g.made, g.ids(2, 4), g.ids(2, 3) > 0, g.plan()),
        r"loss mask of shape \(2, 3\).*\(2, 4\)",
    ),
    "decisions of other tokens": (
        lambda g: memgen.decision_log_probs(g.made, g.ids(2, 4), g.ids(2, 3), g.plan()),
        r"decisions of shape \(2, 3\).*\(2, 4\)",
    ),
    "a plan from another mask": (
        lambda g: memgen.plan_insertions(
            g.ids(2, 4), g.ids(2, 3) > 0, g.made.boundary[...], g.made.config
        ),
        r"loss mask of shape \(2, 3\).*\(2, 4\)",
    ),
    "advantages of other rows": (
        lambda g: memgen.trigger_loss(g.array(2, 4), g.ids(2, 4), g.array(3)),
        r"\(3,\).* 2 rows",
    ),
    "decisions of a loss": (
        lambda g: memgen.trigger_loss(g.array(2, 4), g.ids(2, 3), g.array(2)),
        r"decisions of shape \(2, 3\).*\(2, 4\)",
    ),
    "a trigger of another width": (lambda g: g.made.trigger(g.array(2, 6)), "width 6.*8"),
    "a stream of another width": (lambda g: g.made.weaver.context(g.array(2, 4, 6)), "width 6.*8"),
    "an unknown rule for boundaries": (
        lambda g: memgen.boundary_table(["a"], mode="end"),
        "'end'.*suffix",
    ),
    "a prompt for prompts": (lambda g: memgen.generate(g.made, [1, 2], 4), "prompt 0 is 1: give a"),
    "a text for prompts": (lambda g: memgen.generate(g.made, "ab", 4), "prompt 0 is 'a': give a"),
    "a prompt of floats": (lambda g: memgen.generate(g.made, [[0.5]], 4), "prompt 0 is of type fl"),
    "a trigger policy by name": (
        lambda g: memgen.generate(g.made, [[1]], 4, policy="always"),
        "policy='always': choose a TriggerPolicy",
    ),
    "a table of two axes": (
        lambda g: g.with_memory(boundary=np.zeros((20, 2))),
        r"boundary table of shape \(20, 2\): give one number",
    ),
    "no table": (
        lambda g: g.with_memory(boundary=None),
        r"boundary table of shape \(\): give one",
    ),
    "ids in place of a plan": (
        lambda g: g.made.weave(g.ids(2, 4), g.ids(2, 4)),
        "in place of a plan: give one",
    ),
    "targets of other tokens": (
        lambda g: memgen.token_log_probs(
            g.model.backbone(), g.array(2, 4, 8), g.ids(2, 3), g.ids(2, 3) > 0
        ),
        r"hidden states of shape \(2, 4, 8\) for targets of shape \(2, 3\): give",
    ),
    "targets of another mask": (
        lambda g: memgen.token_log_probs(
            g.model.backbone(), g.array(2, 4, 8), g.ids(2, 4), g.ids(2, 3) > 0
        ),
        r"loss mask of shape \(2, 3\) for tokens of shape \(2, 4\): give",
    ),
    "a stop id alone": (lambda g: memgen.generate(g.made, [[1]], 4, stop=3), "stop=3: give a list"),
    "a text to stop at": (
        lambda g: memgen.generate(g.made, [[1]], 4, stop="3"),
        "stop='3': give a list",
    ),
    "texts to stop at": (
        lambda g: memgen.generate(g.made, [[1]], 4, stop=["a"]),
        "'a'.: give a list",
    ),
    "fractions to stop at": (
        lambda g: memgen.generate(g.made, [[1]], 4, stop=jnp.array([1.5])),
        "give a list of token ids",
    ),
    "an id beyond 32 bits to stop at": (
        lambda g: memgen.generate(g.made, [[1]], 4, stop=(2**31,)),
        "give a list of token ids",
    ),
    "more tokens than 32 bits count": (
        lambda g: memgen.generate(g.made, [[1]], 2**31),
        "max_new_tokens=2147483648: choose from 0 to 2147483647",
    ),
    "half an id": (
        lambda g: memgen.generate(g.made, [[1]], 4, valid_vocab_size=3.7),
        "valid_vocab_size=3.7: give a whole number",
    ),
    "a seed beyond 64 bits": (
        lambda g: memgen.generate(g.made, [[1]], 4, seed=2**63),
        "seed=9223372036854775808: choose a number of at most 64 bits",
    ),
    "a decoder that generates": (
        lambda g: memgen.generate(g.model, [[1]], 4),
        "a Thoughtbubbles in place of a MemGen: give",
    ),
    "half a latent": (lambda g: WeaverConfig(2.5), "prompt_latents=2.5: choose a whole"),
    "a weaver's config that is another": (
        lambda g: MemGenConfig(TriggerConfig()),
        "TriggerConfig: give a WeaverConfig",
    ),
    "prompts of other keys": (
        lambda g: memgen.begin(
            g.made, g.ids(2, 4), g.ids(2), jax.random.split(jax.random.key(0), 3), 9
        ),
        r"keys of shape \(3,\) for 2 rows: give",
    ),
    "lengths of other prompts": (
        lambda g: memgen.begin(
            g.made, g.ids(2, 4), g.ids(3), jax.random.split(jax.random.key(0)), 9
        ),
        r"length of shape \(3,\) for 2 rows: give",
    ),
    "a cache in place of a session": (
        lambda g: memgen.observe(g.made, g.model.init_cache(2, 4), g.ids(2, 4), g.ids(2)),
        "a Cache in place of a session: give",
    ),
    "lengths of other decisions": (
        lambda g: memgen.plan_from_decisions(g.ids(2, 4), g.ids(2, 3), g.made.config),
        r"prompt_length of shape \(2, 3\) for 2 rows: give",
    ),
    "weights in a loss mask": (
        lambda g: memgen.sft_loss(g.made, g.ids(2, 4), g.array(2, 4), g.plan()),
        "a loss mask of type float32: give bool",
    ),
    "decisions of bool": (
        lambda g: memgen.decision_log_probs(g.made, g.ids(2, 4), g.ids(2, 4) > 0, g.plan()),
        "decisions of type bool: give 1 for",
    ),
    "log-probabilities of other tokens": (
        lambda g: memgen.trigger_loss(g.array(2, 4), g.ids(2, 4), g.array(2), g.array(1, 4)),
        r"old of shape \(1, 4\) for tokens of shape \(2, 4\): give",
    ),
    "a rate of nothing": (
        lambda g: memgen.invocation_penalty(
            g.ids(2, 4), *[np.ones(2)] * 3, np.ones(2) > 0, weight=0.1, rate="token"
        ),
        "rate='token': choose decisions or tokens",
    ),
    "a memory that scores": (
        lambda g: memgen.token_log_probs(g.made, g.array(2, 4, 8), g.ids(2, 4), g.ids(2, 4) > 0),
        "a MemGen has no unembed: give a decoder",
    ),
    "no texts": (lambda g: memgen.boundary_table(None), "texts are a NoneType: give a list"),
    "texts of bytes": (lambda g: memgen.boundary_table([b"a"]), "id 0 is b'a': give the surface"),
    "a list of vectors": (lambda g: g.made.trigger([1.0]), "vectors in a list for a trigger: give"),
    "parameters of nothing": (
        lambda g: memgen.trained_params(3),
        "a int holds no nnx.Module, .*: g",
    ),
    "a number in place of parameters": (
        lambda g: memgen.load_params(g.made, 3),
        "params are a int: give a nested dict",
    ),
    "no prompts": (lambda g: memgen.generate(g.made, [], 4), "prompt"),
    "a prompt beyond the ids": (lambda g: memgen.generate(g.made, [[99]], 4), "99.*20"),
    "a negative temperature": (
        lambda g: memgen.make_request(g.made, 4, temperature=-1.0),
        "temperature=-1.0",
    ),
    "a negative number of tokens": (lambda g: memgen.make_request(g.made, -1), "max_new_tokens=-1"),
    "parameters of another shape": (
        lambda g: memgen.load_params(g.made, {"weaver": {}}),
        "checkpoint has none, the model float32.*: build the model with",
    ),
}


def test_ids_may_be_nested_lists():
    def shapes(given: Given) -> list[Any]:
        woven = given.made.weave([[1, 2, 3, 4], [5, 6, 7, 8]], given.plan())
        hatchling = Hatchling(dataclasses.replace(HATCHLING, separator=3), rngs=nnx.Rngs(0))
        neurons = hatchling.activations([[1, 3, 2]])
        return [given.model([[1, 2]]), woven.inputs_embeds, hatchling([[1, 3]]), neurons.value]

    logits, stream, others, value = nnx.eval_shape(lambda: shapes(Given()))
    assert others.shape == (1, 2, 20) and value.shape == (2, 1, 3, 8)
    assert logits.shape == (1, 2, 20) and stream.shape == (2, 8, 8)


def test_advantages_may_be_a_list():
    zeros = jnp.zeros((2, 4))
    loss, rows = memgen.trigger_loss(zeros, zeros, [1.0, 2.0])
    assert (float(loss), float(rows)) == (-3.0, 2.0)


def test_tokens_that_have_no_slots_are_refused():
    streams = Streams.start(jnp.zeros((2, 4, 8)), jnp.array([3, 2]), first=jnp.array([0, 1]))
    assert token_slots(streams, 3).capacity == 3
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit into max_tokens=2"):
        token_slots(streams, 2)


def test_there_are_forty():
    assert len(WRONG) >= 40


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_use_is_one_line(name: str):
    use, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        nnx.eval_shape(lambda: use(Given()))
    [line] = str(caught.value).splitlines()
    assert "incompatible shapes" not in line, "of JAX, without a way out"
    assert ": " in line or "choose" in line


class Id(enum.IntEnum):
    END = 3


class OfRows(nnx.Module):
    """An adapter of two matrices for each row."""

    def __init__(self, stack: tuple[int, ...], inputs: int, outputs: int):
        self.a = nnx.Param(jnp.ones((*stack, 2, inputs, 1)))
        self.b = nnx.Param(jnp.ones((*stack, 2, 1, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.a[...] @ self.b[...]


@dataclasses.dataclass(frozen=True)
class Scheduled(ModelConfig):
    schedule: float | str = "cosine"
    depth: "int | None" = None


def test_what_may_be_is_not_refused():
    def shapes(given: Given) -> list[Any]:
        model, linear = given.model, nnx.Linear(4, 5, rngs=nnx.Rngs(0))
        decoder = given.made.reasoner
        name, target = next(iter(decoder.lora_targets.items()))
        adapted = decoder.apply_lora({name: OfRows(*target)})
        vectors = given.array(2, 4, 8)
        _, cache = model.extend(model.init_cache(2, 8), vectors, [4, 3])  # pyright: ignore
        layer = memgen.apply_lora(linear, {"": OfRows((), 4, 5)})
        streams = jax.vmap(lambda one: one.replace(x=2 * one.x))(given.streams())
        layer = layer(given.array(2, 3, 4))
        return [adapted.hidden_states(vectors), cache.length, streams.x, layer]

    assert nnx.eval_shape(lambda: shapes(Given()))[-1].shape == (2, 3, 5)
    axes = jax.tree.map(lambda _: 0, Given().streams())
    assert axes.replace(x=None).x is None
    closed_over = jnp.array([[1, 2, -1], [1, 2, 3]])
    assert jax.eval_shape(lambda: next_tokens(closed_over))[0].shape == (2, 2)
    check_stop((Id.END, np.int64(3), 4))
    assert Scheduled(**vars(SMALL)).schedule == "cosine"
    for wrong in ({"vocab_size": 1.5}, {"depth": 1.5}, {"num_layers": np.float32(2)}):
        with pytest.raises(ValueError, match="give a whole number"):
            Scheduled(**(vars(SMALL) | wrong))
    assert is_whole(jnp.int32(2)) and not is_whole(jnp.float32(2)) and not is_whole(np.array(1.5))


def test_arrays_of_numpy_are_what_arrays_of_jax_are():
    """Of data loaders, whose integers have 64 bits; only a plan of values is computed."""
    ids, mask, length = np.ones((2, 4), int), np.ones((2, 4), bool), np.array([4, 3])

    def shapes(given: Given) -> list[Any]:
        found, keys = [], given.keys(2)
        for model in (given.model, given.hatchling, given.forking_hatchling):
            output, cache = model.run(ids, length), model.init_cache(2, 8)
            read, cache = model.advance(cache, ids, length, fresh=True)
            more, _ = model.advance(cache, ids[:, :1], length - 3)
            scores = model.log_prob(output, ids), model.logits_at(output, length - 1)
            found += [model(ids, mask), model.loss(ids), scores, model.logits_at(read, length - 1)]
            found.append(model.logits_at(more, length - 3))
        memory = given.made
        plan = memgen.plan_insertions(ids, mask, np.zeros(20, np.uint8), memory.config)
        scored = memgen.decision_log_probs(memory, ids, ids, plan)
        found += [memgen.sft_loss(memory, ids, mask, plan), scored]
        session = memgen.begin(memory, ids, length, keys, 16)
        return [*found, memgen.trigger_loss(scored, ids, length), session.count]

    leaves = jax.tree.leaves(nnx.eval_shape(lambda: shapes(Given())))
    assert leaves[0].shape == (2, 4, 20) and leaves[-1].shape == (2,)


def test_an_id_outside_the_vocabulary_is_nan_as_the_last_target_too():
    """It is embedded nowhere, which would make the whole row NaN."""
    rows = np.array([[1, 2, 3, 4], [1, 2, 3, 20]])
    truncated = dataclasses.replace(HATCHLING, truncate=2)

    @jax.jit
    def losses(rows):
        model, hatchling, cut = (
            Given().model,
            Given().hatchling,
            Hatchling(truncated, rngs=nnx.Rngs(0)),
        )
        nats = model.token_losses(rows)[0], hatchling.token_losses(rows)[0]
        return nats, cut.loss(rows)[0]

    nats, of_segments = losses(rows)
    assert np.isnan(nats).tolist() == 2 * [[[False] * 3, [False, False, True]]]
    assert np.isnan(of_segments) and np.isfinite(losses(rows[[0, 0]])[1])


def test_rows_padded_on_the_left_have_a_loss_of_nan_under_jit():
    truncated = dataclasses.replace(HATCHLING, truncate=2)

    @jax.jit
    def losses(rows):
        model, other = (Hatchling(config, rngs=nnx.Rngs(0)) for config in (HATCHLING, truncated))
        return model.token_losses(rows)[0], model.loss(rows)[0], other.loss(rows)[0]

    rows = np.array([[1, 2, -1, -1], [-1, 1, 2, 3], [1, -1, 2, 3], [1, 2, 3, 4]])
    nats, *sums = losses(rows)
    assert np.isnan(nats).tolist() == [[False] * 3, [True] * 3, [True] * 3, [False] * 3]
    assert np.isnan(sums).all() and nats[0, 0] > 0 and nats[0, 1:].tolist() == [0, 0]
    assert np.isfinite(losses(rows[[0, 0, 3, 3]])[1:]).all()
