"""Names in prompts: one object for prompt and target, draws without memory, responses and back."""

import itertools
import math

import numpy as np
import pytest

from train.data.everyday_words import EVERYDAY_WORDS
from train.data.semantic_maps import MapSampler, PromptTemplate, SemanticMap
from train.data.verbalise import Trace, answer_in, verbalise

CONCEPTS = ("Up", "Down", "Left", "Right")
WORDS = tuple(f"w{number}" for number in range(20))
TEMPLATE = PromptTemplate(
    "steps", ("{answers}|{gloss}|{board}{{}}", "{Up} or {Down}: {board}"), CONCEPTS, ("board",)
)
LETTERS = SemanticMap("letters", dict(zip(CONCEPTS, "ABCD", strict=True)))


def sampler(**changes) -> MapSampler:
    return MapSampler(CONCEPTS, WORDS, **changes)


def test_prompt_and_target_come_from_one_map():
    prompt = TEMPLATE.render(LETTERS, board="{Up}")
    assert prompt.text == "A, B, C, D| A is Up, B is Down, C is Left, D is Right.|{Up}{}"
    assert [prompt.target(concept) for concept in CONCEPTS] == list("ABCD")
    assert prompt.is_valid("C") and not prompt.is_valid("Left") and not prompt.is_valid("")
    assert TEMPLATE.render(LETTERS, 1, board="x").text == "A or B: x"
    plain = SemanticMap("plain", LETTERS.names, gloss=False)
    assert TEMPLATE.render(plain, board="").text == "A, B, C, D||{}"
    assert LETTERS.concept_of("D") == "Right" and LETTERS.concept_of("Right") is None


def test_mistakes_in_templates_are_one_line():
    short = SemanticMap("short", {"Up": "A", "Down": "B", "Left": "C"})
    for make, message in (
        (lambda: TEMPLATE.render(short, board=""), "map short has no name for Right: give one to"),
        (lambda: TEMPLATE.render(LETTERS), "no value for the slot {board}"),
        (lambda: TEMPLATE.render(LETTERS, 2, board=""), "has 2 wordings, not one of index 2"),
        (lambda: PromptTemplate("t", ("{upp}",), CONCEPTS), "slot {upp}: choose from Up, Down"),
        (lambda: PromptTemplate("t", ("{",), CONCEPTS), "double its braces"),
        (lambda: PromptTemplate("t", (), CONCEPTS), "has no wording"),
        (lambda: sampler(held_out=17), "held_out=17 of 20 words: leave 4 or more on both sides"),
        (lambda: sampler(held_out=2), "held_out=2 of 20 words"),
        (lambda: sampler(distinct=10**6), "maps of 20 words: choose 116280 or fewer"),
        (lambda: sampler(paraphrases=0), "paraphrases=0: choose 1 or more"),
        (lambda: sampler().held_out_map(0), "held_out=0: no words are held out"),
        (lambda: MapSampler(CONCEPTS), "has words or maps: give one of them"),
        (lambda: MapSampler(("a",), ("x", "y", "x")), "hold 'x', which is empty, repeated, or"),
        (lambda: MapSampler(("a",), ("x", "")), "hold '', which is empty"),
        (lambda: MapSampler(("a",), ("x", " y")), "hold ' y', which is empty"),
        (lambda: verbalise(Trace("", ""), "both?"), "choose from answer, thoughts, both"),  # pyright: ignore
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_draws_depend_on_seed_epoch_and_index_alone():
    """So a run that resumes, or reads in another order, sees the same prompts."""
    indices = [*range(50), 2**40]
    forward = [sampler(seed=3).map(1, index) for index in indices]
    again = sampler(seed=3)
    assert [again.map(1, index) for index in reversed(indices)] == forward[::-1]
    assert [sampler(seed=4).map(1, index) for index in indices] != forward
    assert [again.map(2, index) for index in indices] != forward
    fixed = sampler(seed=3, resample=False)
    assert [fixed.map(7, index) for index in indices] == [again.map(0, index) for index in indices]
    for drawn in forward:
        assert len(set(drawn.answers)) == 4 and set(drawn.answers) <= set(WORDS)


def test_number_of_maps_held_out_words_and_wordings():
    for count in (1, 2, 8):
        drawn = {sampler(distinct=count).map(e, i).answers for e in (0, 1) for i in range(60)}
        assert len(drawn) == count
    one, two = ({sampler(distinct=k).map(0, i).answers for i in range(60)} for k in (1, 2))
    assert one < two, "the frozen map is one of each larger number"
    split = sampler(held_out=6)
    seen = set(itertools.chain(*(split.map(0, i).answers for i in range(60))))
    unseen = set(itertools.chain(*(split.held_out_map(i).answers for i in range(40))))
    assert len(seen) == 14 and len(unseen) == 6 and not seen & unseen
    assert sampler(held_out=6, seed=9).held_out_pool == split.held_out_pool
    two = sampler(paraphrases=2)
    wordings = [two.paraphrase(0, i) for i in range(200)]
    assert 60 < sum(wordings) < 140
    maps = [two.map(0, i).answers for i in range(200)]
    assert maps == [sampler().map(0, i).answers for i in range(200)], "apart from maps"
    whole = MapSampler(CONCEPTS, maps=(LETTERS, LETTERS, SemanticMap("z", {})), held_out=1)
    assert {whole.map(0, i).name for i in range(20)} == {"letters"}
    assert whole.held_out_map(3).name == "z"
    assert whole.held_out_pool == whole.maps[2:] and whole.training_pool == whole.maps[:2]


def test_drawn_words_are_uniform():
    counts = np.bincount(
        [WORDS.index(name) for i in range(500) for name in sampler().map(0, i).answers]
    )
    expected, share = 100, 4 / 20
    assert np.abs(counts - expected).max() < 5 * math.sqrt(500 * share * (1 - share))


def test_the_pool_of_words_has_no_names_of_test_variants():
    assert len(EVERYDAY_WORDS) == len(set(EVERYDAY_WORDS)) == 207
    taken = {"up", "down", "left", "right", "north", "south", "west", "east", "a", "b", "c", "d"}
    assert not {word.lower() for word in EVERYDAY_WORDS} & taken


@pytest.mark.parametrize("form", ["answer", "thoughts", "both"])
def test_answers_are_found_in_responses(form):
    for answer in ("A", "*", "1", "⬆️", '{"formula":"1+2"}'):
        trace = Trace(f"so it is {answer}", answer)
        assert answer_in(verbalise(trace, form)) == answer
    assert answer_in(f" {verbalise(Trace('x', 'B'), 'both')}\nmore") == "B"
    texts = {
        "answer": "<think></think><answer>B</answer>",
        "thoughts": "<think>so B</think>",
        "both": "<think>so B</think><answer>B</answer>",
    }
    assert verbalise(Trace("so B", "B"), form) == texts[form]


def test_answers_of_other_texts():
    for text, answer in (
        ("", ""),
        (" A \nB", "A"),
        ("<think></think>", ""),
        ("<think>a b</think> C\nd", "C"),
        ("<answer>A</answer><answer> B</answer>", "B"),
        ("<answer>A", "<answer>A"),
        ('<think></think>\n{"a":\n 1} so', '{"a":\n 1}'),
        ('```json\n{"a":\n 1}\n```', '{"a":\n 1}'),
        ('<answer>```\n{"a":\n 1}\n```</answer>', '{"a":\n 1}'),
        ("{a\n}", "{a"),
        ("{" * 10**5, "{" * 10**5),
        ("A</answer>", "A</answer>"),
        ("</think></think>", "</think>"),
        ("<answer>" * 10**5, "<answer>" * 10**5),
    ):
        assert answer_in(text) == answer
