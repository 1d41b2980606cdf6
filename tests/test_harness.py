"""The evaluation harness's adapter: what it is asked, and a task from disk, end to end."""

import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx
from letters import language_model
from tiny import BASE, heavy_model

from thoughtbubbles import PrefixRank
from thoughtbubbles.decoding import generate
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train import harness
from train.cli import config_json
from train.cli.config_json import as_json
from train.data import ByteTokenizer
from train.data.chat_templates import chat_ids
from train.evaluation import lm_eval_model
from train.evaluation.lm_eval_model import Decoding, HarnessModel, cut
from train.evaluation.scoring import Scorer
from train.evaluation.task_files import read_task
from train.evaluation.task_scores import answers, summary
from train.models.load import load_weights
from train.runs.checkpoint import Checkpointer

MODEL = str(Path(__file__).parent / "fixtures/pretrained/llama")
PLAIN = dataclasses.replace(BASE, fork_layers=(), num_layers=2)
LENGTH = 16


def test_generation_options_are_those_of_the_harness():
    assert Decoding.from_options({}, 7) == Decoding(max_new_tokens=7)
    assert Decoding.from_options({"until": "\n", "max_new_tokens": 3}, 7) == Decoding(("\n",), 3)
    both = {"until": ["a", "", "b"], "max_gen_toks": 5, "max_tokens": 6}
    assert Decoding.from_options(both, 7) == Decoding(("a", "b"), 5)
    greedy = {"do_sample": False, "temperature": 0.7, "top_p": 0.5}
    assert Decoding.from_options(greedy, 7) == Decoding(max_new_tokens=7)
    assert Decoding.from_options({"temperature": 0.0}, 7).temperature == 0
    sampled = Decoding.from_options({"temperature": 0.7, "top_k": 5}, 7)
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.7, 5, None)
    assert Decoding.from_options({"do_sample": True}, 7).temperature == 1
    with pytest.raises(ValueError, match="option num_beams is not supported: choose of until"):
        Decoding.from_options({"num_beams": 2}, 7)


def test_texts_are_cut_before_the_first_stop_string():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["two"]) == cut("one", []) == "one"


def test_without_the_harness_there_is_one_line(monkeypatch):
    monkeypatch.setattr(lm_eval_model, "harness", None)
    for use in (lambda: HarnessModel(model="smollm2"), harness.main):
        with pytest.raises(ValueError, match="is not installed: pip install lm_eval"):
            use()


@pytest.fixture
def installed():
    """The real package and its tasks, where they are."""
    package = pytest.importorskip("lm_eval", reason="pip install lm_eval")
    return package, pytest.importorskip("lm_eval.tasks")


class Request:
    """What an instance of the harness is to a model."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture
def standing_in(monkeypatch):
    """A harness of two attributes, so that the adapter's own work is tested without the real one.

    `HarnessModel` is then a class of its own that nobody registers.
    """
    if lm_eval_model.harness is None:
        monkeypatch.setattr(lm_eval_model, "harness", types.SimpleNamespace())
        hook = types.SimpleNamespace(add_partial=lambda kind, args, result: None)
        monkeypatch.setattr(HarnessModel, "cache_hook", hook, raising=False)


def test_requests_are_answered_in_their_order(standing_in):
    loaded = language_model(PLAIN)
    model = HarnessModel(lm=loaded, batch_size=4, max_length=LENGTH)
    pairs = [("abc", " d"), ("", "efghijklm"), ("a", "b")]
    scores = Scorer(loaded, 4, LENGTH)(pairs)
    found = model.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    assert found == [(score.log_prob, score.greedy) for score in scores]
    texts = ["abc", "abcdefghijklmnoabcdefghij", ""]
    found = model.loglikelihood_rolling([Request(text) for text in texts])
    assert found == [score.log_prob for score in Scorer(loaded, 4, LENGTH).rolling(texts)]


def test_texts_are_generated_in_groups_and_cut(standing_in):
    loaded = language_model(PLAIN)
    model = HarnessModel(lm=loaded, batch_size=2, max_length=LENGTH, max_gen_toks=8)
    contexts = ["abc", "b", "cab abc abc abc abc abc", "abc"]
    plain = []
    for context in contexts:
        prompt = loaded.prompt(context)[-(LENGTH - 8) :]
        new, _ = generate(loaded.model, [prompt] * 2, 8, stop=loaded.stop_ids, valid_vocab_size=17)
        plain.append(loaded.tokenizer.decode(new))
    assert all(plain)
    assert model.generate_until([Request(context, {}) for context in contexts]) == plain
    stop = plain[0][2]  # a token of its own; two of them are none
    wanted = [cut(text, [stop]) for text in plain]
    options = {"until": [stop]}
    assert model.generate_until([Request(context, options) for context in contexts]) == wanted
    assert model._stop_ids(stop) == loaded.tokenizer.encode(stop)[0].tolist()
    pair = plain[0][1:3]
    mixed = [Request(contexts[0], {"until": pair}), Request(contexts[0], {"max_gen_toks": 3})]
    assert model.generate_until(mixed) == [cut(plain[0], [pair]), plain[0][:3]]
    sampled = {"do_sample": True, "temperature": 3.0}
    several = model.generate_until([Request("abc", sampled)] * 4)
    assert len(set(several)) > 1, "equal requests get samples of their own"
    with pytest.raises(ValueError, match="max_gen_toks=16 of max_length=16 leaves no tokens"):
        model.generate_until([Request("a", {"max_gen_toks": 16})])


def test_chats_are_rendered_and_encoded_with_their_special_tokens(standing_in):
    loaded = load_weights(MODEL)
    model, plain = HarnessModel(lm=loaded, chat=True), HarnessModel(lm=loaded)
    chat = [{"role": "user", "content": "the end"}]
    text = model.apply_chat_template(chat)
    assert text.endswith("<|im_start|>assistant\n") and "the end" in text
    begun = [*chat, {"role": "assistant", "content": "then "}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("\nthen")
    ids = model._scorer.encode("<|im_end|>")
    assert len(ids) == 1 and model._scorer.encode("") == plain._scorer.encode("")
    assert model.chat_template(True) and model.chat_template(False) is None
    assert plain.chat_template(False) is None
    for use in (plain.chat_template, plain.apply_chat_template):
        with pytest.raises(ValueError, match="was loaded with chat=False: add chat=True"):
            use(chat)
    assert len(plain._scorer.encode("<|im_end|>")) > 1, "refusing changes nothing either"
    with pytest.raises(ValueError, match="letters has no chat template"):
        HarnessModel(lm=language_model(PLAIN), chat=True)
    with pytest.raises(ValueError, match="model=None checkpoint=None: pass one of them"):
        HarnessModel()


def test_a_benchmark_item_ends_no_turn_by_spelling_its_end(standing_in):
    loaded = load_weights(MODEL)
    model, tokenizer = HarnessModel(lm=loaded, chat=True), loaded.tokenizer
    assert isinstance(tokenizer, PretrainedTokenizer)
    chat = [
        {"role": "system", "content": "is <|im_start|>"},
        {"role": "user", "content": "the <|im_end|> end"},
        {"role": "assistant", "content": "then"},
        {"role": "user", "content": "<|im_end|>"},
    ]
    for messages in (chat, chat[1:2], chat[:1] + chat[3:]):  # one meaning of signs for all texts
        text = model.apply_chat_template(messages)
        assert model._scorer.encode(text) == chat_ids(tokenizer, messages)
    opened = model.apply_chat_template(chat, add_generation_prompt=False)
    prompt = chat_ids(tokenizer, chat)
    found = model._scorer.encode(opened)
    assert found == prompt[: len(found)]
    sign = opened[-1]
    with pytest.raises(ValueError, match="a message has the character .*, which stands for <.im_"):
        model.apply_chat_template([{"role": "assistant", "content": f"a {sign}"}])


PLUGIN = """
import dataclasses
from thoughtbubbles import PrefixRank
from train.cli.config_json import POLICIES

class Mine(PrefixRank):
    pass

POLICIES["{name}"] = dataclasses.dataclass(frozen=True)(Mine)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> str:
    """A module in the working directory that adds a policy."""
    name = "mine_for_harness"
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(config_json.POLICIES, name, None)  # so that it is taken out again
    monkeypatch.delitem(config_json.POLICIES, name)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def save_run(folder: Path, policy: str, plugin: str) -> None:
    """The folder of a run whose policy comes from a plugin."""
    config = dataclasses.replace(BASE, vocab_size=320, num_layers=2, fork_layers=(1,))
    params = nnx.to_pure_dict(nnx.state(heavy_model(config)))
    meta = {
        "config": {
            "model": as_json(config) | {"policy": policy},
            "data": {"seq_len": LENGTH},
            "plugin": [plugin],
        },
        "resolved": {},
        "tokenizer": ByteTokenizer().to_json(),
        "step": 1,
        "data_fingerprint": "",
    }
    with Checkpointer(folder, save_interval=1) as checkpointer:
        checkpointer.save(1, params, {"unread": jnp.zeros(1)}, meta)


def test_a_run_with_the_policy_of_a_plugin_is_scored(standing_in, plugin, tmp_path):
    run = str(tmp_path / "run")
    save_run(tmp_path / "run", f"{plugin}(ratio=1.5)", plugin)
    with pytest.raises(ValueError, match=f"was made with --plugin {plugin}: pass it here too"):
        HarnessModel(checkpoint=run)
    model = HarnessModel(checkpoint=run, plugin=plugin, batch_size=2)
    policy = model._lm.model.config.policy
    assert type(policy).__name__ == "Mine" and policy.ratio == 1.5
    own = model._lm.model.with_policy(PrefixRank(1.5))
    pairs = [("abc", " d"), ("a", "b")]
    expected = Scorer(dataclasses.replace(model._lm, model=own), 2)(pairs)
    found = model.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    assert found == [(score.log_prob, score.greedy) for score in expected]


def test_the_command_loads_plugins_before_the_harness_reads_its_options(monkeypatch, plugin):
    asked = []
    registered = lambda name: lambda model: asked.append((name, model))  # noqa: E731
    modules = {
        "lm_eval": {},
        "lm_eval.__main__": {"cli_evaluate": lambda: asked.append(sys.argv[1:])},
        "lm_eval.api": {},
        "lm_eval.api.registry": {"register_model": registered},
    }
    for name, attributes in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**attributes))
    monkeypatch.setattr(lm_eval_model, "harness", types.SimpleNamespace())
    words = ["run", "--plugin", plugin, "--model", "thoughtbubbles"]
    monkeypatch.setattr(sys, "argv", ["harness", *words])
    harness.command()
    assert asked == [("thoughtbubbles", HarnessModel), ["run", "--model", "thoughtbubbles"]]
    assert plugin in config_json.POLICIES
    monkeypatch.setattr(sys, "argv", ["harness", "--plugin", "nowhere_at_all"])
    with pytest.raises(SystemExit):
        harness.command()


WORDS = ["cat", "dog", "tree", "sea", "sun", "then", "hat"]
RECORDS = {
    "hellaswag": [
        {
            "activity_label": "making tea",
            "ctx_a": f"[header] the {word} [title] on it [step] and  in",
            "ctx_b": "a Cup",
            "endings": [f"the {word} [substeps] is on.", "is", "it is in the end", "é a"],
            "label": str(index % 4),
        }
        for index, word in enumerate(WORDS)
    ],
    "piqa": [
        {"goal": f"open the {word} ", "sol1": "turn it", "sol2": "the end", "label": index % 2}
        for index, word in enumerate(WORDS)
    ],
    "blimp": [
        {"sentence_good": f"the {word} is here", "sentence_bad": f"the {word} are here"}
        for word in WORDS
    ],
    "lambada": [{"text": f"in the {word} was  the {word}"} for word in WORDS],
}
THEIRS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "blimp": "blimp/_template_yaml",
    "lambada": "lambada/lambada_openai.yaml",
}
ON_DISK = """task: on_disk_{name}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
training_split: null
validation_split: null
test_split: test
"""
GENERATED = """output_type: generate_until
doc_to_text: goal
doc_to_target: goal
generation_kwargs: {until: ["e"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: goal
metric_list: [{metric: bits_per_byte}]
"""


@pytest.mark.filterwarnings("ignore")  # the harness's, and of what it imports
def test_the_harness_finds_what_our_command_finds(installed, tmp_path, monkeypatch):
    """Its own HellaSwag, PIQA, BLiMP and LAMBADA over files on disk, item by item."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    package, package_tasks = installed
    folder = Path(package_tasks.__file__).parent
    bodies = {name: f"include: {folder / file}\n" for name, file in THEIRS.items()}
    for name, body in {**bodies, "generated": GENERATED, "rolling": ROLLING}.items():
        file = tmp_path / f"{name if name in RECORDS else 'piqa'}.jsonl"
        if name in RECORDS:
            file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[name]))
        head = ON_DISK.format(name=name, file=file, cache=tmp_path / "cache")
        (tmp_path / f"{name}.yaml").write_text(head + body)
    found = package.simple_evaluate(
        HarnessModel(model=MODEL, batch_size=4),
        tasks=[f"on_disk_{name}" for name in (*THEIRS, "generated", "rolling")],
        task_manager=package_tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    loaded = load_weights(MODEL)
    for name in THEIRS:
        task = read_task(str(tmp_path / f"{name}.jsonl"))
        [ours] = answers(Scorer(loaded, 4), [task])
        metrics, theirs = summary(task, ours), found["results"][f"on_disk_{name}"]
        names = [name for name in metrics if not name.endswith("stderr")]
        compared = [metric for metric in names if f"{metric},none" in theirs]
        assert "acc" in compared and len(compared) == (1 if name == "blimp" else 2)
        for metric in compared:
            assert theirs[f"{metric},none"] == pytest.approx(metrics[metric])
        samples = sorted(found["samples"][f"on_disk_{name}"], key=lambda sample: sample["doc_id"])
        for sample, answer in zip(samples, ours, strict=True):
            their_scores = [response[0] for response in sample["resps"]]
            assert [score[0] for score in their_scores] == pytest.approx(
                [score.log_prob for score in answer.scores], abs=1e-5
            )
    scores = [a["acc_norm,none"] for a in found["results"].values() if "acc_norm,none" in a]
    assert any(0 < score < 1 for score in scores)
    texts = [record["goal"] for record in RECORDS["piqa"]]
    nats = -sum(score.log_prob for score in Scorer(loaded, 4).rolling(texts))
    bits = nats / sum(map(len, texts)) / math.log(2)
    rolling = found["results"]["on_disk_rolling"]
    assert rolling["bits_per_byte,none"] == pytest.approx(bits)
    generated = [sample["resps"][0][0] for sample in found["samples"]["on_disk_generated"]]
    assert len(generated) == len(WORDS) and all("e" not in text for text in generated)
