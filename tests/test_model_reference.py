"""The model equals the float64 reference written from the equations, whatever the config.

More compiled configs: `python -m pytest -m experiment tests/test_model_reference.py`.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
import reference
from flax import nnx
from reference import Candidate, Stream

from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles, Threshold, TopK

TOLERANCE = 1e-5  # relative to the largest logit; never loosened
NEAR_TIE = 1e-4  # closer keys than this may rank otherwise in float32, rightly

BASE = ModelConfig(
    vocab_size=17,
    embed_dim=16,
    num_layers=3,
    num_heads=2,
    mlp_dim=24,
    norm="layernorm",
    mlp="gelu",
    biases="all",
    fork_layers=(1, 2),
    policy=TopK(ratio=1.5),
    score_originals=True,
    score_bias="head",
    merge="probability",
)

SWITCHES = (
    "fork_embedding",
    "key_bias",
    "value_scaling",
    "residual_scaling",
    "forced_keep",
    "fractional_positions",
)

COPIES = {"fork_layers": (), "merge": "rightmost"}

CAUSAL: list[dict[str, Any]] = [
    {"policy": PrefixRank(1.5), "score_originals": False},
    {"policy": PrefixRank(1.3, window=4, burst=1)},
    {"policy": PrefixRank(2.0), "score_originals": False, "merge": "residual"},
    {"policy": Threshold(1.5), "score_originals": False},
    {"policy": Threshold(1.3, burst=2, gate=False, offset=0.1)},
]

# What each option alone changes in BASE.
SINGLE: dict[str, dict[str, Any]] = {
    "base": {},
    "plain": {"fork_layers": ()},
    "one-fork": {"fork_layers": (1,)},
    "fork-before-the-first-layer": {"fork_layers": (0, 2)},
    "ratio-1": {"policy": TopK(ratio=1.0)},
    "streams-13": {"policy": TopK(streams=13)},
    "streams-20": {"policy": TopK(streams=20)},
    "unscored-originals": {"score_originals": False},
    "fork-gate": {"fork_gate": 0.02},
    "retrofit": {
        "fork_gate": 0.02,
        "score_originals": False,
        "score_bias": "none",
        "value_scaling": False,
        "residual_scaling": False,
        "merge": "rightmost",
    },
    "merge-residual": {"merge": "residual"},
    "merge-rightmost": {"merge": "rightmost"},
    "score-bias-none": {"score_bias": "none"},
    **{f"no-{switch.replace('_', '-')}": {switch: False} for switch in SWITCHES},
    "lost-tokens-residual": {"forced_keep": False, "merge": "residual"},
    "lost-tokens-rightmost": {"forced_keep": False, "merge": "rightmost"},
    "rmsnorm": {"norm": "rmsnorm"},
    "norm-eps": {"norm_eps": 0.1},
    "swiglu": {"mlp": "swiglu"},
    "biases-qkv": {"biases": "qkv"},
    "biases-none": {"biases": "none"},
    "grouped-queries": {"num_heads": 4, "num_kv_heads": 2},
    "qk-norm": {"qk_norm": True},
    "untied-head": {"tied_head": False},
    "rope-base": {"rope_base": 100.0},
}

# Shapes or operations of their own, so compiled as a whole.
SINGLE_WHOLE: dict[str, dict[str, Any]] = {
    "copies-2": COPIES | {"copies": 2},
    "copies-integer-positions": COPIES | {"copies": 2, "fractional_positions": False},
    "fork-before-every-layer": {"fork_layers": (0, 1, 2), "policy": TopK(ratio=2.0)},
    "ratio-4": {"policy": TopK(ratio=4.0)},
    **{f"causal-{index}": causal for index, causal in enumerate(CAUSAL)},
    "other-widths": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 6, "mlp_dim": None},
    "scan-layers": {"scan_layers": True},
}
# Neither shapes nor operations that the others lack: the policies' are in `test_policies.py`.
WHOLE_EXPERIMENTS = ("ratio-4", "causal-0", "causal-2", "causal-4", "scan-layers")
# Only without a mask, below.
SINGLE_UNPADDED: dict[str, dict[str, Any]] = {
    "ratio-1.1": {"policy": TopK(ratio=1.1)},
    "copies-3": COPIES | {"copies": 3},
}


def random_combination(index: int) -> dict[str, Any]:
    """Random values of all options, reproducibly; few shapes, so that little is compiled."""
    rng = np.random.default_rng([7, index])

    def choose(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    num_layers = choose(2, 3)
    num_forks = int(rng.integers(1, min(num_layers, 3) + 1))
    fork_layers = rng.choice(num_layers, size=num_forks, replace=False)
    num_heads, num_kv_heads = choose((2, None), (4, 2))
    return {
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "norm": choose("layernorm", "rmsnorm"),
        "mlp": choose("gelu", "swiglu"),
        "qk_norm": choose(False, True),
        "tied_head": choose(False, True),
        "rope_base": choose(50.0, 10000.0),
        "biases": choose("all", "qkv", "none"),
        "fork_layers": tuple(sorted(int(layer) for layer in fork_layers)),
        "policy": choose(TopK(1.5), TopK(2.0), TopK(streams=20), TopK(streams=26)),
        "score_bias": choose("head", "none"),
        "merge": choose("probability", "residual", "rightmost"),
        **{switch: bool(rng.random() < 0.7) for switch in SWITCHES},
    }


# Chosen greedily from 3000: nearly any two values of two options meet in one of them.
CHOSEN = (0, 17, 84, 175, 359, 545, 608, 753, 926, 1022, 1065, 1287, 1484, 1582, 2124, 2442, 2833)
COMBINATIONS = {f"combination-{index}": random_combination(index) for index in CHOSEN}
CASES = {
    name: dataclasses.replace(BASE, **options)
    for name, options in (SINGLE | SINGLE_WHOLE | SINGLE_UNPADDED | COMBINATIONS).items()
}


# --- weights and inputs


def heavy_params(config: ModelConfig, rng: np.random.Generator, score_std: float) -> dict[str, Any]:
    """Parameters by their documented names and shapes, none at a value that hides a mistake.

    `score_std` is about the standard deviation of the fork and keep logits.
    """
    layers, width = config.num_layers, config.embed_dim
    heads = config.num_heads
    groups = config.num_kv_heads or heads
    head_dim = config.head_dim or width // heads
    hidden = config.mlp_dim or 4 * width

    def normal(*shape: int, std: float = 0.3) -> np.ndarray:
        return rng.normal(0.0, std, shape).astype(np.float32)

    def norm(*shape: int) -> dict[str, np.ndarray]:
        p = {"scale": 1 + normal(*shape)}
        if config.norm == "layernorm" and config.biases == "all":
            p["bias"] = normal(*shape)
        return p

    attention: dict[str, Any] = {
        "q": normal(layers, width, heads, head_dim, std=1.5 * width**-0.5),
        "k": normal(layers, width, groups, head_dim, std=1.5 * width**-0.5),
        "v": normal(layers, width, groups, head_dim, std=width**-0.5),
        "o": normal(layers, heads, head_dim, width, std=(heads * head_dim) ** -0.5),
    }
    mlp = {
        "up": normal(layers, width, hidden, std=width**-0.5),
        "down": normal(layers, hidden, width, std=hidden**-0.5),
    }
    if config.mlp == "swiglu":
        mlp["gate"] = normal(layers, width, hidden, std=width**-0.5)
    if config.qk_norm:
        attention["q_norm"] = {"scale": 1 + normal(layers, head_dim)}
        attention["k_norm"] = {"scale": 1 + normal(layers, head_dim)}
    if config.biases in ("all", "qkv"):
        attention["q_bias"] = normal(layers, heads, head_dim)
        attention["k_bias"] = normal(layers, groups, head_dim)
        attention["v_bias"] = normal(layers, groups, head_dim)
    if config.biases == "all":
        attention["o_bias"] = normal(layers, width)
        mlp |= {f"{name}_bias": normal(layers, w.shape[-1]) for name, w in mlp.items()}

    params = {
        "embed": normal(config.vocab_size, width, std=1.0),
        "blocks": {
            "attention_norm": norm(layers, width),
            "attention": attention,
            "mlp_norm": norm(layers, width),
            "mlp": mlp,
        },
        "final_norm": norm(width),
    }
    for index in range(len(config.fork_layers)):
        fork: dict[str, Any] = {
            "norm": norm(width),
            "score": normal(width, 2, std=score_std * width**-0.5),
        }
        if config.fork_embedding:
            fork["embedding"] = normal(width, std=1.0)
        if config.fork_gate is not None:
            fork["gate"] = np.float32(-config.fork_gate)  # its magnitude acts
        if isinstance(config.policy, Threshold):
            fork["threshold"] = np.float32(rng.uniform(0.2, 0.5))
        params.setdefault("forks", {})[index] = fork
    if not config.tied_head:
        params["head"] = normal(width, config.vocab_size, std=2 * width**-0.5)
    return params


def random_rows(
    config: ModelConfig, rng: np.random.Generator, lengths: list[int]
) -> list[list[int]]:
    return [rng.integers(config.vocab_size, size=length).tolist() for length in lengths]


def heavy_case(
    config: ModelConfig, lengths: list[int], score_std: float = 2.0
) -> tuple[dict[str, Any], list[list[int]], list[reference.Trace]]:
    """Weights, rows and what the reference makes of them, from a seed without a near-tie."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        params = heavy_params(config, rng, score_std)
        rows = random_rows(config, rng, lengths)
        traces = [reference.forward(params, config, row) for row in rows]
        if min(trace.gap for trace in traces) > NEAR_TIE:
            return params, rows, traces
    raise AssertionError("every seed has a near-tie: choose other seeds")


# --- the model under test


def shapes(tree: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def run_model(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: np.ndarray,
    mask: np.ndarray | None = None,
    jit: bool = False,
) -> np.ndarray:
    """The model on parameters that must be exactly those it owns.

    Without `jit` each operation is compiled alone, once for all configs of equal shapes.
    """
    abstract = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    assert shapes(nnx.to_pure_dict(state)) == shapes(params)
    nnx.replace_by_pure_dict(state, jax.device_put(params))

    def apply(state: nnx.State, tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
        return nnx.merge(graph, state)(tokens, mask)

    apply = jax.jit(apply) if jit else apply
    return np.asarray(apply(state, *jax.device_put((tokens.astype(np.int32), mask))))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max()
    assert error <= TOLERANCE * max(1.0, np.abs(expected).max())


# --- model = reference

# A batch of every kind of row: (number of real tokens, where they stand in a row of 13).
LAYOUT = [(13, "left"), (1, "left"), (1, "right"), (2, "right"), (7, "left"), (10, "right")]


def padded(
    rows: list[list[int]], sides: list[str], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows in one batch. Padding holds real token ids, so that reading it is noticed."""
    shape = (len(rows), max(map(len, rows)))
    tokens = np.random.default_rng(0).integers(vocab_size, size=shape)
    mask = np.zeros(shape, dtype=bool)
    for b, (row, side) in enumerate(zip(rows, sides, strict=True)):
        mask[b, : len(row)] = True
        if side == "right":
            mask[b] = mask[b, ::-1]
        tokens[b, mask[b]] = row
    return tokens, mask


def check_padded(
    config: ModelConfig,
    layout: list[tuple[int, str]] = LAYOUT,
    score_std: float = 2.0,
    jit: bool = False,
) -> None:
    params, rows, traces = heavy_case(config, [length for length, _ in layout], score_std)
    tokens, mask = padded(rows, [side for _, side in layout], config.vocab_size)
    logits = run_model(config, params, tokens, mask, jit)
    for b, trace in enumerate(traces):
        assert_close(logits[b, mask[b]], trace.logits)


# All options alone, and some together; nearly all pairs of two values meet in the experiments.
MORE = [pytest.param(name, marks=pytest.mark.experiment) for name in list(COMBINATIONS)[3:]]


@pytest.mark.parametrize("name", [*SINGLE, *list(COMBINATIONS)[:3], *MORE])
def test_each_row_of_a_padded_batch_equals_the_reference_of_that_row_alone(name: str) -> None:
    check_padded(CASES[name])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.experiment] * (name in WHOLE_EXPERIMENTS))
        for name in ("base", *SINGLE_WHOLE)
    ],
)
def test_compiled_as_a_whole(name: str) -> None:
    check_padded(CASES[name], jit=True)


def test_more_streams_than_one_block_of_attention() -> None:
    """40 tokens, 80 and 100 streams."""
    config = dataclasses.replace(BASE, num_layers=2, fork_layers=(0, 1), policy=TopK(ratio=2.5))
    check_padded(config, [(40, "left"), (29, "right")], jit=True)


@pytest.mark.parametrize("merge", ["probability", "residual", "rightmost"])
def test_scores_at_their_floor(merge: str) -> None:
    """Most scores are 1 or clipped: whole bubbles collapse to weights around e^-40."""
    policy = TopK(ratio=4.0)  # keeps all candidates: clipped scores would be near-ties
    check_padded(dataclasses.replace(BASE, merge=merge, policy=policy), score_std=25.0)


@pytest.mark.parametrize(
    ("name", "length"),
    [("base", 1), ("no-forced-keep", 2), ("copies-3", 5), ("ratio-1.1", 10)],
)
def test_unpadded_rows_without_a_mask(name: str, length: int) -> None:
    config = CASES[name]
    params, rows, traces = heavy_case(config, [length, length])
    logits = run_model(config, params, np.array(rows), jit=True)
    for row_logits, trace in zip(logits, traces, strict=True):
        assert_close(row_logits, trace.logits)


def test_equal_scores_are_kept_from_the_left() -> None:
    """Scores clipped to exactly -20 tie; one fork layer, so that nothing is added to them."""
    config = dataclasses.replace(BASE, fork_layers=(1,))
    rng = np.random.default_rng(0)
    params = heavy_params(config, rng, score_std=200.0)
    rows = random_rows(config, rng, [length for length, _ in LAYOUT])
    tokens, mask = padded(rows, [side for _, side in LAYOUT], config.vocab_size)
    logits = run_model(config, params, tokens, mask)
    traces = [reference.forward(params, config, row) for row in rows]
    assert traces[0].gap == 0.0
    for b, trace in enumerate(traces):
        assert_close(logits[b, mask[b]], trace.logits)


# --- the reference itself

SAME_WEIGHTS = [
    *("plain", "one-fork", "fork-before-the-first-layer", "ratio-1", "ratio-1.1", "ratio-4"),
    *("streams-13", "streams-20", "merge-residual", "merge-rightmost", "score-bias-none"),
    *(f"no-{switch.replace('_', '-')}" for switch in SWITCHES),
    *("rmsnorm", "norm-eps", "biases-qkv", "biases-none", "rope-base"),
]


@pytest.mark.parametrize(
    ("name", "other"),
    [(name, "base") for name in SAME_WEIGHTS]
    + [("copies-2", "plain"), ("copies-3", "copies-2"), ("copies-2", "copies-integer-positions")]
    + [("lost-tokens-residual", "merge-residual"), ("lost-tokens-rightmost", "merge-rightmost")],
)
def test_options_change_the_output_on_the_same_weights(name: str, other: str) -> None:
    """Otherwise the sweep could not tell a model that ignores an option."""
    params, (row,), _ = heavy_case(BASE, [12])
    logits = reference.forward(params, CASES[name], row).logits
    assert np.abs(logits - reference.forward(params, CASES[other], row).logits).max() > 0.01


def two_token_model(merge: str) -> tuple[ModelConfig, dict[str, Any]]:
    """One block that writes nothing behind a fork layer with room for one fork.

    Token 0 is (1, -1), token 1 is (-1, 1) and LayerNorm leaves both alone. The fork probabilities
    are 3/4 for token 0 and 1/4 for token 1, the keep probabilities 1/2; a fork turns its sign.
    """
    config = dataclasses.replace(
        BASE,
        vocab_size=2,
        embed_dim=2,
        num_layers=1,
        num_heads=1,
        fork_layers=(0,),
        policy=TopK(streams=3),
        biases="none",
        norm_eps=1e-12,
        merge=merge,
    )
    params = jax.tree.map(np.zeros_like, heavy_params(config, np.random.default_rng(0), 1.0))
    for norm in (params["forks"][0]["norm"], params["final_norm"]):
        norm["scale"] = np.ones(2)
    params["embed"] = np.array([[1.0, -1.0], [-1.0, 1.0]])
    params["forks"][0]["score"] = np.array([[math.log(3), 0.0], [0.0, 0.0]])
    params["forks"][0]["embedding"] = np.array([-2.0, 2.0])
    return config, params


def test_two_tokens_by_hand() -> None:
    config, params = two_token_model("probability")
    trace = reference.forward(params, config, [0, 1])
    assert trace.forks[0].kept == [Candidate(0, True), Candidate(0, False), Candidate(1, False)]
    assert np.allclose(np.exp(trace.forks[0].log_scores), [0.75, 0.5, 0.25, 0.5])
    assert np.isclose(trace.forks[0].gap, math.log(3))
    assert [s.token for s in trace.streams] == [0, 0, 1]
    assert np.allclose(np.stack([s.x for s in trace.streams]), [[-1, 1], [1, -1], [-1, 1]])

    high = 1 / (1 + math.exp(-4))  # softmax of the logits (2, -2) = (1, -1) @ embed.T
    token_0 = np.array([0.75 * (1 - high) + 0.5 * high, 0.75 * high + 0.5 * (1 - high)]) / 1.25
    token_1 = np.array([1 - high, high])
    assert np.allclose(np.exp(trace.logits), np.stack([token_0, token_1]))
    # 3/4 (-1, 1) + 1/2 (1, -1) points where the fork points; the original points the other way.
    for merge, logits in (("residual", [[-2, 2], [-2, 2]]), ("rightmost", [[2, -2], [-2, 2]])):
        config, params = two_token_model(merge)
        assert np.allclose(reference.forward(params, config, [0, 1]).logits, logits)


def test_attenuated_attention_by_hand() -> None:
    """With no queries the scores alone decide: a key of score p weighs p^(1/sqrt K), or p."""
    x = np.zeros(4)
    streams = [Stream(x, math.log(1 / 4), token=0), Stream(x, 0.0, token=0)]
    p = {name: np.zeros((4, 1, 4)) for name in "qk"} | {
        "v": np.eye(4)[:, None],
        "o": np.eye(4)[None],
    }
    inputs = [np.array([12.0, 0, 0, 0]), np.array([0, 3.0, 0, 0])]
    for score_bias, second in (("head", [1, 2, 0, 0]), ("none", [0.6, 2.4, 0, 0])):
        config = dataclasses.replace(BASE, biases="none", score_bias=score_bias)
        outputs = reference.attention(p, config, streams, inputs)
        assert np.allclose(outputs, [[3, 0, 0, 0], second])


def test_positions_budgets_and_ties_by_hand() -> None:
    streams = [Stream(np.zeros(2), 0.0, token) for token in (0, 1, 1, 1, 2, 2)]
    assert np.allclose(reference.rotary_positions(BASE, streams), [0, 1 / 3, 2 / 3, 1, 1.5, 2])
    tenths = dataclasses.replace(BASE, policy=TopK(ratio=1.1))
    assert [reference.budget(tenths, n, n) for n in (1, 2, 10, 11)] == [2, 3, 11, 13]
    assert reference.select([0.0, -1.0, math.inf, -1.0, -1.0], 3) == ([0, 1, 2], 0.0)


def test_replayed_decisions() -> None:
    params, (row,), (trace,) = heavy_case(BASE, [5])
    decisions = [fork.kept for fork in trace.forks]
    again = reference.forward(params, BASE, row, decisions).logits
    assert np.array_equal(again, trace.logits)
    nobody_forks = [[Candidate(n, False) for n in range(5)]] * 2
    other = reference.forward(params, BASE, row, nobody_forks).logits
    no_room = dataclasses.replace(BASE, policy=TopK(ratio=1.0))
    assert np.array_equal(other, reference.forward(params, no_room, row).logits)
