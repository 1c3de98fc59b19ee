"""Every score and null model has words; every function of a score has an entry, and the reverse."""

from frankenmerge.analysis.align import FUNCTIONS
from frankenmerge.artefacts.scores import NULLS, SCORES, null_info, score_info


def test_every_score_has_one_function():
    assert sorted(FUNCTIONS) == sorted(SCORES)


def test_every_entry_has_words_of_its_own():
    entries = [*SCORES.values(), *NULLS.values()]
    for info in entries:
        assert all(info) and info.unit == info.unit.strip()
    for field in ("title", "explanation", "short_title"):
        assert len({getattr(info, field) for info in entries}) == len(entries)
    assert all(info.explanation.endswith(".") for info in SCORES.values())


def test_an_unknown_name_is_its_own_title():
    assert score_info("cka") is SCORES["cka"] and null_info("residual_law") is NULLS["residual_law"]
    assert score_info("new_score").title == score_info("new_score").short_title == "new score"
    assert null_info("new_null").explanation == ""
