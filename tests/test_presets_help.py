"""Presets in `--help`: each has a line, and the line says what it changes."""

from train.cli.command import with_architecture
from train.cli.presets_help import differences, presets_text
from train.pretraining.presets import PRESETS


def test_a_run_of_another_architecture_has_a_folder_of_its_own():
    """Else the next run of the preset would be refused as another run's."""
    tiny = PRESETS["tiny"]
    for text, out in (
        ("hatchling(num_layers=2)", "runs/tiny_hatchling"),
        ("hatchling", "runs/tiny_hatchling"),
        ("thoughtbubbles(vocab_size=320, embed_dim=8, num_layers=1, num_heads=1)", tiny.out),
    ):
        words = ["--steps", "1", "--architecture", text]
        assert with_architecture(tiny, words).out == out and words == ["--steps", "1"]


def test_every_preset_has_a_line_that_fits():
    heading, *lines = presets_text(PRESETS, width=100).splitlines()
    assert heading.startswith("presets")
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert max(map(len, lines)) <= 100
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert shown["tiny"] == "the default"
    assert shown["tiny_plain"] == "model.fork_layers=()"
    assert "model.policy=TopK(ratio=2.0" in shown["tiny_topk"]
    assert "model.score_originals=True" in shown["tiny_topk"]
    assert shown["hatchling_tiny"].startswith("model=HatchlingConfig(")
    assert "model.embed_dim=768" in shown["150m"] and shown["150m"].endswith(" more")


def test_what_does_not_fit_is_counted():
    narrow, wide = (presets_text(PRESETS, width=width).splitlines()[-1] for width in (60, 10_000))
    options = len(list(differences(PRESETS["tiny"], PRESETS["1_9b"])))
    shown = narrow.count(", ")
    assert 0 < shown < options and narrow.endswith(f", and {options - shown} more")
    assert " more" not in wide and "out=" not in wide
