"""Adapters on Flax layers of any kind: found, added, stacked, sharded and merged."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import memgen
from memgen.lora import LowRank, make_adapter
from thoughtbubbles.adapters import LoRAWeights

RANK = 2
GATHER = re.compile(r" (all-gather|all-to-all|collective-permute)\(")


class OwnLinear(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), (inputs, outputs)))

    def __call__(self, x, *, out_sharding=None):
        return jnp.matmul(x, self.kernel[...], out_sharding=out_sharding)


class Attention(nnx.Module):
    """Attention as bonsai writes it: einsums, sharded results, sizes read from kernels."""

    def __init__(self, width, heads, head_dim, *, rngs):
        self.q_proj = nnx.Einsum("BTD,DNH->BTNH", (width, heads, head_dim), rngs=rngs)
        self.k_proj = nnx.Einsum("BSD,DNH->BSNH", (width, heads, head_dim), rngs=rngs)
        self.v_proj = nnx.Einsum("BSD,DNH->BSNH", (width, heads, head_dim), rngs=rngs)
        self.o_proj = nnx.Einsum("BTNH,NHD->BTD", (heads, head_dim, width), rngs=rngs)

    def __call__(self, x, heads_split, out):
        query, key, value = (
            layer(x, out_sharding=heads_split) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = self.o_proj.kernel.shape[1] ** -0.5
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->btns", query, key) * scale, axis=-1)
        return self.o_proj(jnp.einsum("btns,bsnh->btnh", weights, value), out_sharding=out)


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.attn = Attention(16, 4, 4, rngs=rngs)
        self.gate_proj = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.down_proj = OwnLinear(32, 16, rngs=rngs)

    def __call__(self, x, heads_split=None, wide=None, out=None):
        norm = lambda x: x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True))  # noqa: E731
        x = x + self.attn(norm(x), heads_split, out)
        y = norm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(y, out_sharding=wide)), out_sharding=out)


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.List([Layer(rngs=rngs) for _ in range(2)])

    def __call__(self, x, *shardings):
        for layer in self.layers:
            x = layer(x, *shardings)
        return x

    @property
    def lora_targets(self):
        return memgen.linear_layers(self)


class Stacked(nnx.Module):
    """The layers of `Net` in one stack, applied by `nnx.scan`."""

    def __init__(self, *, rngs):
        self.layers = nnx.vmap(lambda rngs: Layer(rngs=rngs))(rngs.split(2))

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: (layer(x), None), in_axes=(nnx.Carry, 0))
        return run(x, self.layers)[0]

    @property
    def lora_targets(self):
        return memgen.linear_layers(self)


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def random_adapter(net, *targets):
    """Adapters of which each one matters."""
    adapter = make_adapter(net, memgen.LoRAConfig(RANK, targets=targets), rngs=nnx.Rngs(0))  # pyright: ignore
    for seed, low in enumerate(adapter.values()):
        low.a[...], low.b[...] = drawn(low.a.shape, seed) / 16, drawn(low.b.shape, seed + 99) / 16
    return adapter


def merged(net, adapter):
    return memgen.merge_lora(net, {name: low.delta for name, low in adapter.items()})


X = drawn((2, 3, 16))
EINSUM, GENERAL = nnx.Einsum, nnx.LinearGeneral
LAYERS = {
    "linear": (lambda r: nnx.Linear(16, 6, rngs=r), (3, 16), "io->io"),
    "of one's own": (lambda r: OwnLinear(16, 6, rngs=r), (3, 16), "io->io"),
    "general": (lambda r: GENERAL(16, (2, 3), rngs=r), (3, 16), "ixy->ixy"),
    "two axes": (lambda r: GENERAL((2, 8), 6, axis=(-2, -1), rngs=r), (3, 2, 8), "xyo->xyo"),
    "middle axis": (lambda r: GENERAL(2, 6, axis=(1,), rngs=r), (3, 2, 8), "io->io"),
    "heads in": (lambda r: EINSUM("BTNH,NHD->BTD", (4, 4, 16), rngs=r), (3, 5, 4, 4), "NHD->NHD"),
    "heads out": (lambda r: EINSUM("BTD,NDH->NBTH", (4, 16, 5), rngs=r), (3, 5, 16), "DNH->NDH"),
    "turned": (lambda r: EINSUM("BHTN,DNH->DTB", (6, 3, 4), rngs=r), (2, 4, 5, 3), "NHD->DNH"),
    "dots": (lambda r: EINSUM("...d,dnh->...nh", (16, 2, 3), rngs=r), (3, 5, 16), "dnh->dnh"),
    "bias": (lambda r: EINSUM("td,de->te", (16, 6), (6,), rngs=r), (3, 16), "de->de"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapter_is_a_change_of_the_kernel(kind: str):
    """Against the layer itself with another kernel, which NumPy makes."""
    make, shape, equation = LAYERS[kind]
    layer = make(nnx.Rngs(0))
    (name, (stack, inputs, outputs)) = next(iter(memgen.linear_layers(layer).items()))
    assert (stack, inputs * outputs) == ((), layer.kernel.size)
    low = LowRank((), inputs, outputs, memgen.LoRAConfig(RANK, 3.0), rngs=nnx.Rngs(0))
    low.b[...] = drawn(low.b.shape)
    # Contracted axes first: those are what A and B look like.
    order, _, kernel_order = equation.partition("->")
    sizes = dict(zip(kernel_order, layer.kernel.shape, strict=True))
    delta = (np.asarray(low.a[...]) @ np.asarray(low.b[...])) * 1.5
    delta = np.einsum(equation, delta.reshape([sizes[axis] for axis in order]))
    x, changed = drawn(shape), make(nnx.Rngs(0))
    changed.kernel[...] = changed.kernel[...] + delta
    adapted = memgen.apply_lora(layer, {name: low})
    run = jax.jit(lambda layer, x: layer(x))
    np.testing.assert_allclose(run(adapted, x), run(changed, x), atol=1e-5)
    assert float(jnp.abs(run(layer, x) - run(adapted, x)).max()) > 0.1
    np.testing.assert_allclose(
        memgen.merge_lora(layer, {name: low.delta}).kernel[...], changed.kernel[...], atol=1e-6
    )


@pytest.mark.parametrize("kind", [Net, Stacked])
def test_a_decoder_as_others_write_it(kind):
    net = kind(rngs=nnx.Rngs(0))
    adapter = random_adapter(net, *memgen.LoRAConfig().targets, "*/[ko]_proj", "*down_proj", "gate")
    assert set(adapter) == set(memgen.linear_layers(net)), "queries and values by their last names"
    stack = (2,) if kind is Stacked else ()
    assert adapter[f"layers{'' if stack else '/1'}/attn/o_proj"].delta.shape == (*stack, 16, 16)
    run = jax.jit(lambda net, x: net(x))
    adapted = memgen.apply_lora(net, adapter)
    found = run(adapted, X)
    np.testing.assert_allclose(found, run(merged(net, adapter), X), atol=1e-5)
    assert float(jnp.abs(found - run(net, X)).max()) > 0.1
    if stack:  # the same layers one by one
        apart, state = Net(rngs=nnx.Rngs(0)), nnx.state(merged(net, adapter).layers)
        for index in range(2):
            own = jax.tree.map(lambda leaf, index=index: leaf[index], state)
            nnx.update(apart.layers[index], own)
        np.testing.assert_allclose(found, run(apart, X), atol=1e-5)
    gates = [(n.layers if stack else n.layers[0]).gate_proj for n in (net, adapted)]
    assert isinstance(gates[1], nnx.Linear) and gates[0].kernel[...] is gates[1].kernel[...]


def test_under_explicit_axes():
    """Batch and heads sharded: as on one device, and every result where its layer puts it."""
    net = Net(rngs=nnx.Rngs(0))
    adapter = random_adapter(net, "*")
    expected = jax.jit(lambda net: net(X))(merged(net, adapter))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        heads, wide = (
            PartitionSpec("data", None, "tensor", None),
            PartitionSpec("data", None, "tensor"),
        )
        x = jax.device_put(X, PartitionSpec("data"))
        run = jax.jit(lambda net, x: net(x, heads, wide, PartitionSpec("data", None, None)))
        found = run(memgen.apply_lora(net, adapter), x)
        text = run.lower(memgen.apply_lora(net, adapter), x).compile().as_text()
        plain = run.lower(net, x).compile().as_text()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.sharding.spec[0] == "data"
    # What the layers contract stays where it is: sums of rank 2 are reduced, nothing is gathered.
    assert "all-reduce" in text and len(GATHER.findall(text)) <= len(GATHER.findall(plain))


def test_products_of_matrices_that_are_split_themselves():
    """As optimizers hold them (FSDP): the small matrices are gathered, not what they multiply."""
    low = LowRank((), 16, 6, memgen.LoRAConfig(RANK, dropout=0.5), rngs=nnx.Rngs(0))
    low.b[...], low.key = drawn(low.b.shape), nnx.data(jax.random.key_data(jax.random.key(0)))
    run = jax.jit(lambda low, x: (low(x), low.delta))
    expected = run(low, X)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        low.a.set_value(jax.device_put(low.a[...], PartitionSpec("data")))
        low.b.set_value(jax.device_put(low.b[...], PartitionSpec(None, "data")))
        found = run(low, jax.device_put(X, PartitionSpec("data")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    assert found[0].sharding.spec[0] == "data"


def test_a_contracted_axis_that_is_sharded_behind_another():
    """The two can't be one axis as they are."""
    layer = nnx.Einsum("BTNH,NHD->BTD", (4, 4, 16), rngs=nnx.Rngs(0))
    low = LowRank((), 16, 16, memgen.LoRAConfig(RANK), rngs=nnx.Rngs(0))
    low.b[...] = drawn(low.b.shape)
    x, adapted = drawn((2, 3, 4, 4)), memgen.apply_lora(layer, {"": low})
    expected = jax.jit(lambda x: adapted(x))(x)
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])):
        split = jax.device_put(x, PartitionSpec(None, None, None, "tensor"))
        found = jax.jit(lambda x: adapted(x, out_sharding=PartitionSpec(None, None, None)))(split)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_adapters_have_the_named_axes_of_their_layers():
    """As Flax maps them, so that A and B are split as the kernel is; in stacks too."""
    init = nnx.with_partitioning(nnx.initializers.normal(), ("heads", "head_dim", "embed"))
    turned = nnx.with_partitioning(nnx.initializers.normal(), ("heads", "embed", None))
    plain = nnx.with_partitioning(nnx.initializers.normal(), ("embed", "mlp"))

    class Named(nnx.Module):
        def __init__(self, rngs):
            options = {"rngs": rngs, "kernel_init": init}
            self.o = nnx.LinearGeneral((4, 2), 16, axis=(-2, -1), **options)
            self.q = nnx.Einsum("BTD,NDH->BTNH", (4, 16, 2), rngs=rngs, kernel_init=turned)
            self.up = nnx.vmap(
                lambda rngs: nnx.Linear(16, 8, rngs=rngs, kernel_init=plain),
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )(rngs.split(3))
            self.none = nnx.Linear(16, 8, rngs=rngs)

        @property
        def lora_targets(self):
            return memgen.linear_layers(self)

    with nnx.use_eager_sharding(False):
        net = Named(nnx.Rngs(0))
    adapter = make_adapter(net, memgen.LoRAConfig(RANK, targets=("*",)), rngs=nnx.Rngs(0))  # pyright: ignore
    flat = nnx.to_flat_state(nnx.get_partition_spec(nnx.state(adapter)))
    spec = PartitionSpec
    assert {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat} == {
        "o/a": spec("heads", None),
        "o/b": spec(None, "embed"),
        "q/a": spec("embed", None),
        "q/b": spec(None, "heads"),
        "up/a": spec("layers", "embed", None),
        "up/b": spec("layers", None, "mlp"),
        "none/a": spec(None, None),
        "none/b": spec(None, None),
    }


class ScaledLinear(nnx.Linear):
    """A layer whose output is not its product, as of muP or with an activation inside."""

    def __init__(self, *sizes, rngs):
        super().__init__(*sizes, rngs=rngs)
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, inputs, *, out_sharding=None):
        self.calls[...] += 1
        return jnp.tanh(super().__call__(inputs, out_sharding=out_sharding) / 3) * 2


def test_a_layer_with_a_call_of_its_own_has_the_adapter_in_its_kernel():
    """So that adapting is merging whatever the class does; its other variables stay its own."""
    net = nnx.List([ScaledLinear(6, 4, rngs=nnx.Rngs(0))])
    adapted, x = with_adapters(net), drawn((2, 6)) / 4
    merged = memgen.merge_lora(net, {"0": adapted[0].low_rank.delta})
    found = adapted[0](inputs=x, out_sharding=None)
    np.testing.assert_allclose(found, merged[0](x), atol=1e-6)
    assert float(jnp.abs(found - net[0](x)).max()) > 0.1
    assert int(adapted[0].calls[...]) == 1
    squares = lambda low: (memgen.apply_lora(net, {"0": low})[0](x) ** 2).sum()  # noqa: E731
    changes = jax.grad(squares)(adapted[0].low_rank)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in (changes.a, changes.b))
    noisy = LowRank((), 6, 4, memgen.LoRAConfig(RANK, dropout=0.1), rngs=nnx.Rngs(0))
    noisy.key = nnx.data(jax.random.key_data(jax.random.key(0)))
    for low, message in ((lambda x: x, "not a function"), (noisy, "dropout=0.1 reaches: set")):
        with pytest.raises(
            ValueError, match=f"ScaledLinear has a __call__ of its own, .*{message}"
        ):
            memgen.apply_lora(net, {"0": low})[0](x)


class Misfits(nnx.Module):
    def __init__(self, rngs):
        self.experts = nnx.Einsum("BED,EDF->BEF", (2, 16, 4), rngs=rngs)
        self.called = nnx.Einsum("BD,DF->BF", (16, 4), rngs=rngs)
        self.called.einsum_str = None
        self.batched = nnx.LinearGeneral(16, 4, batch_axis={0: 2}, rngs=rngs)
        self.conv = nnx.Conv(16, 4, (3,), rngs=rngs)
        self.fits = nnx.Linear(16, 4, rngs=rngs)


def test_layers_of_several_matrices_are_left_out():
    assert memgen.linear_layers(Misfits(nnx.Rngs(0))) == {"fits": ((), 16, 4)}


def test_mistakes():
    net = Net(rngs=nnx.Rngs(0))
    adapter = random_adapter(net, "q")
    with pytest.raises(ValueError, match=r"no linear layer 'w': .* layers/\*/attn/k_proj, layers"):
        random_adapter(net, "w")
    with pytest.raises(ValueError, match=r"no linear layer 'w': choose from layers/\*/attn/k_proj"):
        memgen.apply_lora(net, {"w": None})
    adapted = memgen.apply_lora(net, adapter)
    with pytest.raises(ValueError, match="layers/0/attn/q_proj has an adapter already"):
        memgen.apply_lora(adapted, adapter)
    with pytest.raises(ValueError, match="has an adapter already"):
        merged(adapted, adapter)
    with pytest.raises(ValueError, match=r"a delta of shape \(16, 8\) for a layer of \(16, 16\)"):
        memgen.merge_lora(net, {"layers/0/attn/q_proj": jnp.zeros((16, 8))})
    aside = nnx.vmap(lambda rngs: nnx.Linear(3, 4, rngs=rngs), out_axes=1)(nnx.Rngs(0).split(2))
    with pytest.raises(ValueError, match=r"kernel of shape \(3, 2, 4\), its sizes are \(3, 4\)"):
        memgen.linear_layers(aside)


class ExpertsLinear(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((4, 8, 8)))

    def __call__(self, x):
        return jnp.einsum("bed,edf->bef", x, self.kernel[...])


def with_adapters(net: nnx.Module):
    draw = lambda shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), "f4")  # noqa: E731
    adapter = {}
    for name, (stack, inputs, outputs) in memgen.linear_layers(net).items():
        a, b = draw((*stack, inputs, RANK)), draw((*stack, RANK, outputs))
        adapter[name] = LoRAWeights(a, b, jnp.ones(stack))
    return memgen.apply_lora(net, adapter)


def test_a_matrix_for_each_expert_is_no_stack_of_layers():
    adapted = with_adapters(nnx.List([ExpertsLinear()]))
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\) is a stack of \(8, 8\) matrices"):
        adapted[0](jnp.ones((4, 4, 8)))


def test_an_adapted_layer_takes_arguments_by_name_and_is_pickled():
    net = nnx.List([OwnLinear(6, 4, rngs=nnx.Rngs(0))])
    adapted, x = with_adapters(net), jnp.ones((2, 6))
    expected = adapted[0](x)
    np.testing.assert_array_equal(adapted[0](out_sharding=None, x=x), expected)
    again = pickle.loads(pickle.dumps(adapted))
    assert type(again[0]) is type(adapted[0])
    np.testing.assert_array_equal(again[0](x), expected)


def test_a_scale_of_one_axis_is_no_layer():
    scale = OwnLinear(6, 4, rngs=nnx.Rngs(0))
    scale.kernel = nnx.Param(jnp.ones(6))
    assert memgen.linear_layers(nnx.List([scale])) == {}
    with pytest.raises(ValueError, match="choose from a module that has some; this one has none"):
        memgen.apply_lora(nnx.List([scale]), {"0": lambda x: x})
