"""An event is computed in the rows that weave: taken out of the session, put back, no others."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memgen_tiny import LORA, NEW, PROMPT_LATENTS, VOCAB, memgen_of, weaver_config

from memgen import TriggerConfig, begin, generate, make_request
from memgen import decoding as loop_module
from memgen.request import pad_prompts, row_keys
from memgen.session import CHUNK
from thoughtbubbles import Backbone
from train.mesh import MeshConfig, batch_sharding, make_mesh, replicated

ROWS = 4
PROMPTS = [[1, 2, 3], [9], [4, 40, 8, 6, 61], [17, 5]]
PATTERNS = [[bool(number >> row & 1) for row in range(ROWS)] for number in range(2**ROWS)]
STREAMS = dataclasses.replace(
    weaver_config(context="hidden"), trigger=TriggerConfig("stream", lora=LORA)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TheseInvoke:
    """Whenever they are asked, these rows invoke and no others."""

    rows: jax.Array
    learned = False

    def __call__(self, logits, keys):
        return self.rows


def these(made, pattern):
    return make_request(made, NEW, TheseInvoke(jnp.array(pattern)))


def opened(made, prompts=PROMPTS, sharding=None):
    tokens, length = pad_prompts(prompts, VOCAB)
    if sharding is not None:
        tokens, length = jax.device_put((tokens, length), sharding)
    return begin(made, tokens, length, row_keys(0, prompts), tokens.shape[1] + 16)


def assert_same(response, alone, pattern):
    for row, weaves in enumerate(pattern):
        expected = alone[row, weaves]
        assert response.texts[row] == expected.texts[0]
        assert response.decisions[row].tolist() == expected.decisions[0].tolist()
        assert response.points[row].tolist() == expected.points[0].tolist()
        np.testing.assert_allclose(response.log_probs[row], expected.log_probs[0], atol=1e-4)
        np.testing.assert_allclose(response.latents[row], expected.latents[0], atol=1e-4)


def alone_of(made):
    """Each prompt by itself, with memory and without."""
    return {
        (row, weaves): generate(made, [prompt], NEW, policy=TheseInvoke(jnp.array([weaves])))
        for row, prompt in enumerate(PROMPTS)
        for weaves in (False, True)
    }


def test_whichever_rows_weave_each_is_what_it_is_alone():
    """All patterns; lanes of four rows, of two (loads unequal or equal) and of one."""
    made = memgen_of(config=STREAMS)
    alone = alone_of(made)
    with_memory, without = (
        np.array([alone[row, weaves].log_probs[0] for row in range(ROWS)])
        for weaves in (True, False)
    )
    assert (np.abs(with_memory - without).max(axis=1) > 0.01).all(), "memory matters in every row"
    for lanes in (1, 2, 4):
        for pattern in PATTERNS:
            response, _ = loop_module._respond(made, opened(made), these(made, pattern), 16, lanes)
            assert_same(response, alone, pattern)


def test_rows_spread_over_devices_weave_where_they_are():
    made = memgen_of()
    mesh = make_mesh(MeshConfig(), jax.devices()[:ROWS])
    alone, spread = alone_of(made), batch_sharding(mesh)
    made_there = jax.device_put(made, replicated(mesh))
    for pattern in PATTERNS[::3]:
        session = opened(made_there, sharding=spread)
        assert loop_module.lanes_of(session) == ROWS
        response, _ = loop_module.respond(made_there, session, these(made, pattern), 16)
        assert_same(response, alone, pattern)


@pytest.mark.parametrize("rows", [2, 4])
def test_an_event_costs_what_its_rows_cost(rows, monkeypatch):
    """Places that decoders read: a token and the prompt's event for every row, then only events."""
    counted, extend = [], Backbone.extend

    def counting(self, cache, x, length, **how):
        places = x.shape[0] * x.shape[1]
        jax.debug.callback(lambda: counted.append(places))
        return extend(self, cache, x, length, **how)

    monkeypatch.setattr(Backbone, "extend", counting)
    made = memgen_of()
    inner: Any = loop_module._respond
    program = jax.jit(lambda *given: inner.__wrapped__(*given, 16, 1))  # traced anew
    event = CHUNK + 2 * PROMPT_LATENTS  # catching up, queries, and latents in the reasoner
    later = []
    for weaving in range(rows + 1):
        session = opened(made, PROMPTS[:rows])
        jax.effects_barrier()
        counted.clear()
        pattern = [row < weaving for row in range(rows)]
        response, _ = jax.block_until_ready(program(made, session, these(made, pattern)))
        jax.effects_barrier()
        later.append(int((response.points > 0).sum()))
        prompt = rows * event * (weaving > 0)
        assert sum(counted) == rows * NEW + prompt + later[-1] * event
    assert later[0] == 0 < later[1]
