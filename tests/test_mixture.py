"""Mixtures: exact shares in every prefix, one order for all hosts, schedules, exhausted sources."""

import dataclasses
import itertools
import random
import shutil
import time
from fractions import Fraction

import numpy as np
import pytest

from train.data import (
    ByteTokenizer,
    DataConfig,
    DataError,
    MixtureReader,
    TrainReader,
    interpolate,
    mix,
    open_corpus,
    parse_mixture,
    prepare,
)
from train.data.assignment import Assignment
from train.data.mixture import check_bound
from train.data.schedule import Piece, schedule, without

SEQ_LEN = 8


def some_weights(rng: random.Random, count: int, zeros: float = 0.2) -> tuple[Fraction, ...]:
    """Exact weights over four orders of magnitude."""
    parts = [
        rng.choice([1, 1, 10, 100, 1000]) * rng.randrange(1, 50) * (rng.random() >= zeros)
        for _ in range(count)
    ]
    parts[0] += not any(parts)
    return tuple(Fraction(part, sum(parts)) for part in parts)


def some_pieces(rng: random.Random, count: int, knots: int, seq_len: int) -> list[Piece]:
    times = [0, *sorted(rng.sample(range(1, 300 * seq_len), knots - 1))]
    weights = [some_weights(rng, count) for _ in times]
    ends = [*times[1:], None]
    after = [*weights[1:], weights[-1]] if rng.random() < 0.6 else weights
    return [Piece(*piece) for piece in zip(times, ends, weights, after, strict=True)]


def integral(pieces: list[Piece], source: int, tokens: int) -> Fraction:
    """The reference: trapezoids, exact for weights that are linear over each piece."""
    area = Fraction()
    for piece in pieces:
        stop = tokens if piece.stop is None else min(piece.stop, tokens)
        if stop > piece.start:
            end = piece.first if piece.stop is None else piece.at(stop)
            area += (piece.first[source] + end[source]) / 2 * (stop - piece.start)
    return area


@pytest.mark.parametrize("trial", range(24))
def test_counts_stay_within_two_of_their_integrals_in_every_prefix(trial):
    """In exact arithmetic, under random schedules of 1 to 16 sources."""
    rng = random.Random(trial)
    count, seq_len = rng.choice([1, 2, 3, 5, 8, 13, 16]), rng.choice([1, 7, 16])
    pieces = some_pieces(rng, count, rng.choice([1, 1, 2, 3, 5]), seq_len)
    assignment = Assignment(pieces, seq_len)
    assert assignment.bound <= 2
    sources, indices = assignment.sequences(0, 400)
    counts = [0] * count
    for n, (source, index) in enumerate(zip(sources.tolist(), indices.tolist(), strict=True), 1):
        assert index == counts[source], "each source's rows are read in order, none left out"
        counts[source] += 1
        if n % 57 == 0:
            assert assignment.counts(n) == counts
            for i, of_source in enumerate(assignment.integrals):
                exact = integral(pieces, i, n * seq_len) / seq_len
                assert Fraction(of_source.scaled(n), of_source.scale) == exact
        for i, of_source in enumerate(assignment.integrals):
            away = counts[i] - Fraction(of_source.scaled(n), of_source.scale)
            assert abs(away) <= assignment.bound
    begin = rng.randrange(300)
    part = assignment.sequences(begin, begin + 50)
    assert np.array_equal(part, (sources[begin : begin + 50], indices[begin : begin + 50]))


def test_the_inverse_of_an_integral_is_exact():
    """Against a search, at and around every value that the integral takes."""
    rng = random.Random(2)
    for _ in range(6):
        pieces = some_pieces(rng, 4, rng.choice([1, 2, 4]), 1)
        for of_source in Assignment(pieces, 1).integrals:
            values = [of_source.scaled(n) for n in range(400)]
            for value in {v + d for v in values[:320] for d in (-1, 0, 1) if v + d >= 0}:
                expected = sum(v <= value for v in values) - 1
                found = of_source.last_below(value)
                assert found == expected or (expected == 399 and (found is None or found > 399))


def test_any_number_of_sources_with_constant_weights_fits():
    rng = random.Random(1)
    for count in (17, 40, 100):
        for _ in range(4):
            weights = some_weights(rng, count, zeros=0)
            assert Assignment([Piece(0, None, weights, weights)], SEQ_LEN).bound < 2
    # Weights that halve make the deepest tree: the bound's worst case.
    halves = [Fraction(1, 2**i) for i in range(1, 30)]
    weights = (*halves, halves[-1])
    assignment = Assignment([Piece(0, None, weights, weights)], SEQ_LEN)
    assert assignment.bound < 2
    counts = assignment.counts(10**12)
    assert sum(counts) == 10**12
    assert all(abs(c - w * 10**12) < 2 for c, w in zip(counts, weights, strict=True))


def test_a_thousandth_is_not_starved():
    weights = (Fraction(1, 1000), Fraction(999, 1000))
    sources, _ = Assignment([Piece(0, None, weights, weights)], 128).sequences(0, 10_000)
    gaps = np.diff(np.flatnonzero(sources == 0))
    assert np.count_nonzero(sources == 0) == 10 and set(gaps) == {1000}


def test_seeking_far_takes_no_time():
    ramp = [(0, [0.999, 0.0005, 0.0005]), (10**12, [0.2, 0.3, 0.5])]
    began = time.perf_counter()
    assignment = Assignment(schedule(ramp, "abc", "linear"), 256)
    sources, _ = assignment.sequences(10**6 * 1024, (10**6 + 1) * 1024)
    assert time.perf_counter() - began < 1
    assert len(set(sources.tolist())) == 3


def test_a_ramp_to_nothing_gives_what_its_area_says():
    """Also where rounding leaves a node one sequence more than its weight ever was."""
    for knots in itertools.product(range(1, 12), (1, 3, 5)):
        ramp = [(0, [0.3, 0.3, 0.4]), (knots[0] * SEQ_LEN, [0, 0, 1]), (99 * SEQ_LEN, [0, 0, 1])]
        assignment = Assignment(schedule(ramp, "abc", "linear"), SEQ_LEN)
        counts = assignment.counts(1000)
        exact = [0.3 * knots[0] / 2, 0.3 * knots[0] / 2]
        assert all(abs(c - e) <= 2 for c, e in zip(counts, exact, strict=False))
        assert sum(counts) == 1000


# The mixtures of arXiv 2509.26625, in percent: web, encyclopedia, academic, literature, math, code.

MIX0, MIX6 = (50, 2.5, 2.5, 20, 5, 20), (40, 8, 5, 2, 10, 35)
NAMES = ("web", "encyclopedia", "academic", "literature", "math", "code")
REASONING, VISUAL = (10.0, 3.4, 83.3, 9.1, 92.9, 97.3), (26.9, 12.4, 5.3, 33.5, 8.0, 3.7)


@pytest.mark.parametrize(
    ("alpha", "reasoning", "visual"), [(0, 33.1, 21.7), (0.5, 42.6, 18.3), (1, 52.0, 14.8)]
)
def test_mixtures_of_the_paper(alpha, reasoning, visual):
    """The weights between, which the paper rounds, give its shares to 0.1."""
    digit = 0.05 if alpha in (0, 1) else 0.1
    mix0, mix6 = (
        {name: share / 100 for name, share in zip(NAMES, of, strict=True)} for of in (MIX0, MIX6)
    )
    weights = interpolate(mix0, mix6, alpha)
    parsed = parse_mixture(f"mix({weights!r})")
    found = np.array([float(weight) for weight in parsed.pieces[0].first])
    assert found @ REASONING == pytest.approx(reasoning, abs=digit)
    assert found @ VISUAL == pytest.approx(visual, abs=digit)
    sequences, _ = Assignment(parsed.pieces, 2048).sequences(0, 4000)
    realised = np.bincount(sequences, minlength=6) / 4000
    assert realised @ REASONING == pytest.approx(reasoning, abs=0.2)


def test_interpolation_joins_the_names_of_both():
    assert interpolate({"a": 1.0}, {"b": 1.0}, 0.25) == {"a": 0.75, "b": 0.25}
    with pytest.raises(DataError, match="alpha=1.5 is not between two mixtures"):
        interpolate({"a": 1.0}, {"b": 1.0}, 1.5)


# Through prepare and the reader


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of different text; every document of one begins with its letter."""
    root = tmp_path_factory.mktemp("texts")
    for name, count in (("a", 30), ("b", 12), ("c", 5)):
        (root / name).mkdir()
        for number in range(count):
            (root / name / f"{number}.txt").write_text(f"{name}{number} " * 12)
    return root


def config(root, text: str, **options) -> DataConfig:
    corpus = text.format(**{name: f"{name}={root}/{name}" for name in "abc"})
    return DataConfig(corpus, seq_len=SEQ_LEN, validation=0.3, cache_dir=f"{root}/cache", **options)


WEIGHTS = "mix({{'{a}': 0.6, '{b}': 0.3, '{c}': 0.1}})"
RAMP = (
    "mix({{0: {{'{a}': 0.8, '{b}': 0.2}}, 400: {{'{b}': 0.5, '{c}': 0.5}}, 900: {{'{a}': 1}}}}, "
    "schedule='linear')"
)


@pytest.mark.parametrize("text", [WEIGHTS, RAMP], ids=["constant", "linear"])
def test_order_is_that_of_one_host_for_any_number_of_hosts(text, folders):
    """Also after a resume, and with an empty cache."""
    data = prepare(config(folders, text))
    again = prepare(config(folders, text))
    assert data.fingerprint == again.fingerprint
    whole = MixtureReader(data, 8, seed=3)
    letters = np.frombuffer(b"abc", np.uint8)
    for hosts in (1, 2, 4):
        local = np.arange(8).reshape(hosts, -1)
        readers = [MixtureReader(again, 8, 3, local_rows=rows) for rows in local]
        for step in (0, 7, 10**6):
            batch = whole.batch(step)
            for name, values in batch.items():
                parts = [reader.batch(step)[name] for reader in readers]
                assert np.array_equal(np.concatenate(parts), values)
            # Rows come from the source that they are said to come from.
            for tokens, source in zip(batch["tokens"], batch["source"], strict=True):
                assert (tokens == letters[source]).any()
                assert not np.isin(tokens, np.delete(letters, source)).any()
        resumed = readers[-1].iterate(start_step=7)
        expected = whole.batch(7)["tokens"][local[-1]]
        assert np.array_equal(next(resumed)["tokens"], expected)
        resumed.close()


def test_every_row_of_a_source_is_read_once_an_epoch(folders):
    data = prepare(config(folders, WEIGHTS))
    reader, size = MixtureReader(data, 5, seed=0), len(data.parts["b"].train)
    batches = [reader.batch(step) for step in range(3 * size)]
    source, rows = (np.concatenate([b[name] for b in batches]) for name in ("source", "rows"))
    of_b = rows[source == 1][: 4 * size].reshape(4, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in of_b.tolist())
    assert len({tuple(epoch) for epoch in of_b.tolist()}) == 4
    other = np.concatenate([MixtureReader(data, 5, seed=1).batch(s)["rows"] for s in range(9)])
    assert not np.array_equal(other, rows[:45])


def test_other_weights_leave_the_order_within_a_source_alone(folders):
    orders = []
    for text in (WEIGHTS, RAMP):
        reader = MixtureReader(prepare(config(folders, text)), 5, seed=0)
        batches = [reader.batch(step) for step in range(8)]
        rows = np.concatenate([b["rows"][b["source"] == 0] for b in batches])
        orders.append(rows[:10].tolist())
    assert orders[0] == orders[1]


def test_one_source_is_a_mixture_of_one(folders):
    alone = prepare(config(folders, "mix({{'{a}': 1}})"))
    plain = prepare(config(folders, f"{folders}/a"))
    assert alone.parts["a"].fingerprint == plain.fingerprint != alone.fingerprint
    size = len(plain.train)
    for reader in (MixtureReader(alone, size, 0), TrainReader(plain.train, size, 0)):
        assert sorted(reader.batch(1)["rows"]) == list(range(size))


# Exhausted sources


def test_repeats_are_counted_and_warned_of(folders):
    data = prepare(config(folders, WEIGHTS))
    size = len(data.parts["c"].train)
    shares = data.progress(100 * size)
    assert shares["c"][0] == pytest.approx(0.1, abs=2 / (100 * size))
    assert shares["c"][1] == pytest.approx(10, abs=2 / size)
    assert any("warning: c is read 10.0 times over" in line for line in data.outlook(100 * size))
    assert len(data.outlook(10)) == 1
    assert MixtureReader(data, 8, 0).end is None


def test_stop_ends_before_a_row_is_read_twice(folders):
    data = prepare(config(folders, WEIGHTS.replace(")", ", exhausted='stop')")))
    assert data.end is not None
    counts = data.assignment.counts(data.end)
    assert all(count <= size for count, size in zip(counts, data.sizes, strict=True))
    more = data.assignment.counts(data.end + 1)
    assert any(count > size for count, size in zip(more, data.sizes, strict=True))
    reader = MixtureReader(data, 4, 0)
    assert reader.end == data.end // 4 == len(list(reader.iterate()))
    assert "the run ends there" in data.outlook(10**4)[-1]
    with pytest.raises(DataError, match=rf"rows for {data.end} sequences, a batch has 100000"):
        MixtureReader(data, 100_000, 0)


@pytest.mark.parametrize("text", [WEIGHTS, RAMP], ids=["constant", "linear"])
def test_renormalise_gives_the_weight_to_the_others(text, folders):
    given_up = "bc" * (text is RAMP)  # their weight ends before their rows do
    data = prepare(config(folders, text[:-1] + ", exhausted='renormalise')"))
    assert data.end is not None
    counts = data.assignment.counts(data.end)
    assert sum(counts) == data.end
    # Every source is read but for the rows that the guarantee needs, none is read twice.
    for name, count, size in zip("abc", counts, data.sizes, strict=True):
        assert count <= size and (count >= size - 6 or name in given_up)
    for piece in data.pieces[:-1]:
        assert sum(piece.first) == sum(piece.last) == 1
    reader = MixtureReader(data, 4, 0)
    batches = list(reader.iterate())
    source, rows = (np.concatenate([b[name] for b in batches]) for name in ("source", "rows"))
    for number, size in enumerate(data.sizes):
        of_source = rows[source == number]
        assert len(set(of_source.tolist())) == len(of_source) <= size


def test_weights_of_the_others_are_divided_by_their_sum():
    pieces = schedule([(0, [0.5, 0.3, 0.2]), (100, [0.2, 0.2, 0.6])], "abc", "linear")
    changed, end = without(pieces, 2, 50)
    assert end is None and [piece.start for piece in changed] == [0, 50, 100]
    assert changed[0].last == tuple(Fraction(n, 100) for n in (35, 25, 40))
    assert changed[1].first == (Fraction(35, 60), Fraction(25, 60), 0)
    assert changed[2].first == (Fraction(1, 2), Fraction(1, 2), 0)
    alone, end = without(schedule([(0, [0.5, 0.5]), (100, [0, 1])], "ab", "constant"), 1, 50)
    assert end == 100 and alone[1].first == (1, 0)


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mix()", r"corpus 'mix\(\)': write mix\(\{\"stdlib\": 0.6"),
        ("mix({})", "no source at token 0"),
        ("mix({'a': open('b')})", "write mix"),
        ("mix({'a': 0.6, 'b': 0.3})", r"sum to 0.9, not to 1, at token 0 \(\"a\" 0.6, \"b\" 0.3\)"),
        ("mix({'a': 0, 'b': 0})", "sum to 0, not to 1.*give one of them a weight"),
        ("mix({'a': 1.5, 'b': -0.5})", 'the weight of "b" is -0.5'),
        ("mix({'a': 1e999})", 'the weight of "a" is inf'),
        ("mix({'a': 'b'})", "the weight of \"a\" is 'b'"),
        ("mix({'a': 1, 'b': 0})", '"b" has weight 0 at every knot'),
        ("mix({'a': 0.5, 'a': 0.5})", '"a" is named twice: add its weights up'),
        ("mix({'a': 0.5, 'x=a/': 0.5})", '"a" and "x=a/" are one source'),
        ("mix({'x=a': 0.5, 'x=b': 0.5})", '"x=a" and "x=b" share a name'),
        ("mix({'mix({\"a\": 1})': 1})", r"mix\(.*\) is a mixture within one"),
        ("mix({0: {'a': 1}, 9: {'b': 1}, 5: {'a': 1}})", "goes back from token 9 to token 5"),
        ("mix({5: {'a': 1}})", "begins at token 5: its first knot is token 0"),
        ("mix({'a': 1}, schedule='cosine')", "schedule='cosine': choose one of constant, linear"),
        ("mix({'a': 1}, exhausted='go')", "exhausted='go': choose one of repeat, stop, renorm"),
        ("mix({'a': 1}, seed=3)", "unknown option seed"),
    ],
)
def test_a_mistake_is_one_line(text, message):
    with pytest.raises(DataError, match=message) as error:
        parse_mixture(text)
    assert "\n" not in str(error.value)


def test_mistakes_that_the_sources_show(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty: no text file"):
        prepare(config(folders, f"mix({{{{'{{a}}': 0.5, '{tmp_path}/empty': 0.5}}}})"))
    shutil.copytree(folders / "a", tmp_path / "copy")
    with pytest.raises(DataError, match="a and copy hold the same text: add their weights up"):
        prepare(config(folders, f"mix({{{{'{{a}}': 0.5, 'copy={tmp_path}/copy': 0.5}}}})"))
    with pytest.raises(DataError, match="is a mixture, which pretraining alone takes"):
        open_corpus("mix({'a': 1})", 0.3, tmp_path)
    parts = prepare(config(folders, WEIGHTS)).parts
    shorter = dataclasses.replace(config(folders, "mix({{'{b}': 1}})"), seq_len=4)
    two = parse_mixture("mix({'a': 0.5, 'b': 0.5})")
    with pytest.raises(DataError, match="rows of a have 8 targets, those of b 4"):
        mix(two, {"a": parts["a"], "b": prepare(shorter).parts["b"]})

    class Other(ByteTokenizer):
        fingerprint = "other"

    other = dataclasses.replace(parts["b"], tokenizer=Other())
    with pytest.raises(DataError, match="a and b have different vocabularies .*: pack them"):
        mix(two, {"a": parts["a"], "b": other})


def test_too_many_sources_that_lead_in_turn_are_refused():
    """What no tree keeps within 2 is refused, with the number."""
    count, rest = 32, 0.0005
    knots = [
        (token * 10_000, [1 - rest * (count - 1) if i == token else rest for i in range(count)])
        for token in range(count)
    ]
    text = {token: {f"s{i}": w for i, w in enumerate(weights)} for token, weights in knots}
    mixture = parse_mixture(f"mix({text!r})")
    assert Assignment(mixture.pieces[:1], 8).bound < 2
    with pytest.raises(DataError, match="its 32 sources may stray 2.5 sequences .*, 2 are allowed"):
        check_bound(mixture.pieces, 8)


def test_schedules_of_many_computed_knots_are_quick():
    """Weights of seventeen digits do not give each knot a denominator of its own."""
    ends = {"a": 0.331, "b": 0.217, "c": 0.452}, {"a": 0.52, "b": 0.148, "c": 0.332}
    knots = [(1000 * at, list(interpolate(*ends, at / 99).values())) for at in range(100)]
    pieces = schedule(knots, ("a", "b", "c"), "linear")
    for piece in pieces:
        assert sum(piece.first) == 1 and all(10**9 % w.denominator == 0 for w in piece.first)
    began = time.perf_counter()
    Assignment(pieces, 512).sequences(40, 552)
    assert time.perf_counter() - began < 10, "it took minutes with 300 knots"


@pytest.mark.parametrize("weights", ["1e308, 'b': 1e308", f"{10**400}", "1e999"])
def test_huge_weights_are_one_line(weights: str):
    with pytest.raises(DataError, match="the weight of .* choose a number from 0 to 1") as error:
        parse_mixture(f"mix({{'a': {weights}}})")
    assert len(str(error.value)) < 120
    with pytest.raises(DataError, match="write mix"):
        parse_mixture("mix({0: {'a': 1}, 1e999: {'b': 1}})")
    with pytest.raises(DataError, match="write mix"):
        parse_mixture("mix({'a': 1})({'b': 1})")


def test_a_curriculum_goes_on_with_its_next_stage():
    """Where an exhausted source is alone, the next knot with others takes over."""
    stages = schedule([(0, [1, 0]), (100, [0, 1])], "ab", "constant")
    pieces, end = without(stages, 0, 40)
    assert end is None
    assert [(p.start, p.stop, [*map(float, p.first)]) for p in pieces] == [
        (0, 40, [1, 0]),
        (40, 100, [0, 1]),
        (100, None, [0, 1]),
    ]
    _, end = without(stages, 1, 150)
    assert end == 150
