"""The experiment that merges languages: what a language is, and its table."""

import numpy as np
import pytest

from train.experiments import merge_languages as study


def test_languages_are_one_text_in_other_letters():
    text = np.frombuffer(b"def Read(self): return self._zip[42]", np.uint8)
    tables = [study.cipher(language) for language in study.LANGUAGES]
    assert (tables[0] == np.arange(320)).all() and (tables[1] != tables[2]).any()
    for table in tables[1:]:
        told = bytes(table[text].tolist())
        assert sorted(table) == list(range(320))
        assert told != text.tobytes() and told[3:4] == b" " and told[4:5].isupper()
        letters = {byte for byte in range(320) if table[byte] != byte}
        assert letters <= set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_the_table_has_means_by_model_and_language():
    setting = dict.fromkeys(study.KEY[1:], 8)
    results = [
        setting
        | {"seed": seed, "losses": {"base": [1.0 + seed, 2.0, 3.0], "merged": [4.0, 5.0, 6.0]}}
        for seed in (0, 1)
    ]
    shown = study.report(results)
    assert "| base | 1.500 ± 0.500 | 2.000 ± 0.000 | 3.000 ± 0.000 |" in shown
    assert shown.endswith("seeds 0 1")
    with pytest.raises(ValueError, match="results of 2 settings"):
        study.report([results[0], results[1] | {"steps": 9}])
