"""`import moeplan`: what it has, and what it raises."""

import pytest
from commands import outcome, start, write_config

import moeplan


def test_help_and_dir_have_what_is_not_imported_yet():
    shown = outcome(start(code="import moeplan; print(*dir(moeplan)); help(moeplan)")).stdout
    names, _, page = shown.partition("\n")
    assert set(moeplan.__all__) <= set(names.split())
    assert "-> 'MergeResult'" in page
    assert "class MergeConfig(" in page


def test_a_run_that_fails_is_told_from_input_that_is_wrong(checkpoint, tmp_path):
    base = checkpoint("llama-plain")
    config = moeplan.load_config(write_config(tmp_path / "config.yml", base, [base, checkpoint("llama-plain", 1)]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(moeplan.UserError) as wrong:
        moeplan.merge(config, tmp_path / "full")
    assert not isinstance(wrong.value, moeplan.RunError)

    def fill(plan: moeplan.MergePlan) -> None:
        (tmp_path / "out").touch()

    with pytest.raises(moeplan.RunError):
        moeplan.merge(config, tmp_path / "out", on_plan=fill)
