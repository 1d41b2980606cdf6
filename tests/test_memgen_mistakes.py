"""What would have been a wrong answer or a traceback is one line."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memgen_tiny import BOUNDARY, CONFIG, backbone, fresh_memgen, memgen_of, trigger_config

from memgen import (
    LearnedInvoke,
    MemGen,
    Plan,
    begin,
    boundary_table,
    generate,
    make_adapter,
    observe,
    plan_from_decisions,
    plan_insertions,
    replay,
    token_log_probs,
)
from memgen.request import row_keys
from thoughtbubbles import Backbone, ModelConfig, Thoughtbubbles
from train import generate as command
from train.data import load_tokenizer
from train.models.load import LanguageModel

TOKENS = jnp.zeros((1, 12), jnp.int32)


class Silent:
    """A retriever that must not be asked."""

    max_snippet_tokens = 4


@dataclasses.dataclass(frozen=True)
class NoPytree:
    learned = False

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.ones(logits.shape[:1], bool)


def test_a_plan_made_by_hand_must_ascend():
    point = jnp.array([[5, 3, -1]])
    plan = Plan(point, jnp.array([[0, 1, 1]]), jnp.array([[3, 2, 0]]))
    with pytest.raises(ValueError, match=r"points \[5, 3\] of a plan do not ascend"):
        memgen_of().weave(TOKENS, plan)


@pytest.mark.parametrize(("runs", "count"), [([], 0), ([(2, 4), (7, 9)], 2)])
def test_a_plan_takes_one_response(runs: list[tuple[int, int]], count: int):
    loss_mask = np.zeros((1, 12), bool)
    for first, end in runs:
        loss_mask[0, first:end] = True
    with pytest.raises(ValueError, match=f"row 0 has {count} responses in .* a plan needs 1"):
        plan_insertions(TOKENS, jnp.asarray(loss_mask), jnp.asarray(BOUNDARY), CONFIG)


def test_a_trigger_of_other_ids_is_refused():
    small = ModelConfig(vocab_size=3, embed_dim=32, num_layers=1, num_heads=2)
    reasoner = backbone("plain")

    def build() -> MemGen:
        other = Backbone(Thoughtbubbles(small, rngs=nnx.Rngs(0)))
        config = trigger_config("tokens")
        return MemGen(reasoner, config, boundary=BOUNDARY, trigger_backbone=other, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match="a trigger of 3 ids does not fit a reasoner of"):
        nnx.eval_shape(build)


def asked(**options: Any) -> None:
    made = options.pop("made", None) or memgen_of()
    generate(made, [[1, 2]], 4, **options)


def test_what_generation_cannot_use_is_refused():
    nothing = dataclasses.replace(
        CONFIG, weaver=dataclasses.replace(CONFIG.weaver, context="nothing")
    )
    with pytest.raises(ValueError, match="context='nothing' takes no text"):
        asked(made=memgen_of("plain", nothing), retriever=Silent())
    with pytest.raises(ValueError, match="^keep_memory=.* is no pytree: register its class"):
        asked(keep_memory=lambda latents, real, keys: real.any(axis=1))
    with pytest.raises(ValueError, match="^policy=.* is no pytree: register its class"):
        asked(policy=NoPytree())
    untrained = fresh_memgen("plain", trigger_config("tokens"))
    with pytest.raises(ValueError, match="this one is untrained, its head is zero"):
        asked(made=untrained, policy=LearnedInvoke())


def test_lengths_are_those_of_the_rows():
    made, keys = memgen_of(), row_keys(0, [[1], [2]])
    tokens = jnp.zeros((2, 16), jnp.int32)
    listed: Any = [3, 16]  # as ids may be
    session = begin(made, tokens, listed, keys, 32)
    assert session.count.tolist() == [3, 16]
    padded = begin(made, tokens.at[0, 3:].set(-1), listed, keys, 32)
    np.testing.assert_array_equal(padded.reasoner.hidden, session.reasoner.hidden)
    wrong: Any = (
        ([3, 17], "length 17 of row 1, which has 16 tokens: choose from 0 to 16"),
        (np.array([-1, 2]), "length -1 of row 0"),
    )
    for length, message in wrong:
        with pytest.raises(ValueError, match=message):
            begin(made, tokens, length, keys, 32)
        with pytest.raises(ValueError, match=message):
            observe(made, session, tokens, length)


def test_what_is_replayed_fits():
    made, keys, tokens = memgen_of(), row_keys(0, [[1]]), TOKENS
    plan = Plan.of(jnp.array([[2, 5, 7]]), jnp.array([[0, 1, 1]]), CONFIG)
    latents, length = jnp.zeros((1, 3, CONFIG.weaver.latents, 32)), jnp.array([12])
    for given, most, message in (
        (latents[:, :2], (20, 1), "latents of 2 events for a plan of 3"),
        (latents, (12, 0), "grow to 19 tokens and latents, the session holds 12: begin with more"),
        (latents, (11, 1), "texts of 12 tokens do not fit into max_tokens=11"),
    ):
        with pytest.raises(ValueError, match=message):
            replay(made, tokens, length, plan, given, keys, *most)


def test_nothing_is_no_mistake():
    """Responses of no tokens have plans and log-probabilities."""
    none = jnp.zeros((2, 0), jnp.int32)
    plan = plan_from_decisions(none, jnp.array([4, 2]), CONFIG)
    assert plan.point.tolist() == [[-1] * CONFIG.events] * 2
    assert plan.kind.tolist() == [[0, 1, 1]] * 2
    for rows in (none, none[:0]):
        hidden = jnp.zeros((*rows.shape, 32))
        assert token_log_probs(backbone("shallow"), hidden, rows, rows > 0).shape == rows.shape


def test_delimiters_may_be_an_iterator():
    given: Any = iter(",."), np.array([",", "."])
    for delimiters in given:
        assert boundary_table(["a,", "b", "c."], delimiters=delimiters).tolist() == [1, 0, 1]


def test_a_second_adapter_does_not_take_the_place_of_the_first():
    decoder = backbone("plain")
    adapter = make_adapter(decoder, CONFIG.weaver.lora, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has an adapter already: merge it first"):
        decoder.apply_lora(adapter).apply_lora(adapter)


def test_a_dial_reaches_the_reasoner_that_remembers():
    made = memgen_of("rank")
    writer = LanguageModel(made.reasoner.model, load_tokenizer("bytes"), made)
    turned = command.under_policy(writer, command.GenerateConfig(ratio=1.0))
    assert turned.memgen is not None
    assert turned.memgen.reasoner.model.config.policy.ratio == 1.0
    assert made.reasoner.model.config.policy.ratio != 1.0


def test_options_of_another_kind_of_model_are_refused(monkeypatch: pytest.MonkeyPatch):
    made = memgen_of()
    writer = LanguageModel(made.reasoner.model, load_tokenizer("bytes"), made)
    monkeypatch.setattr(command, "load_named", lambda checkpoint, model: writer)
    with pytest.raises(ValueError, match="--no-cache is not offered with latent memory"):
        command.main(command.GenerateConfig(checkpoint="run", cache=False))
    writer = dataclasses.replace(writer, memgen=None)
    with pytest.raises(ValueError, match="--memory never: run has no weaver"):
        command.main(command.GenerateConfig(checkpoint="run", memory="never"))
