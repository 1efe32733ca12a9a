"""How well routers route is measured on text that nobody was trained on, from prompts that all programs share."""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.contenders import Program
from benchmarks.programs import Programs
from benchmarks.prompts import trained_tokenizer
from benchmarks.results import Machine
from benchmarks.routing import rows
from benchmarks.routing.__main__ import _Measuring
from benchmarks.routing.evaluation import losses
from benchmarks.routing.merging import Merge, Workshop
from benchmarks.routing.results import Reference, Report, Result, Run
from benchmarks.routing.settings import DOMAINS, FULL, SMOKE, VARIANTS, file_name
from benchmarks.routing.targets import target_rows
from benchmarks.routing.texts import _SOURCES, TooLittleTextError, texts
from benchmarks.routing.tokens import ANYWHERE, BEGINNINGS, BOS, Corpus, corpus, prompts
from benchmarks.routing.training import Models, _key
from benchmarks.targets import TargetRow
from moeplan import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small() -> Corpus:
    return corpus(texts(SMOKE), SMOKE)


@pytest.fixture
def config(small: Corpus, tmp_path: Path) -> Callable[[rows.Row], Path]:
    """`config(row)`: the file that a row's program gets. There are no models, and the programs do nothing."""
    models = Models(tmp_path / "base", {VARIANTS[0]: tuple(tmp_path / file_name(domain) for domain in DOMAINS)})
    workshop = Workshop(tmp_path, SMOKE, small, models, Programs(Path("/bin/false"), Path("/bin/false")))

    def written(row: rows.Row) -> Path:
        workshop.merge(Merge(row, VARIANTS[0], 0), tmp_path / "out")
        return tmp_path / "merge.yml"

    return written


def test_there_is_as_much_text_of_each_domain_and_none_is_both_trained_on_and_held_out(small: Corpus) -> None:
    assert [text.domain for text in small.texts] == list(DOMAINS)
    assert {sum(map(len, text.train + text.held_out)) for text in small.texts} == {SMOKE.domain_chars}
    for text in small.texts:
        trained = {line for block in text.train for line in block.split("\n\n") if len(line) > 200}
        held_out = {line for block in text.held_out for line in block.split("\n\n") if len(line) > 200}
        assert trained
        assert held_out
        assert trained.isdisjoint(held_out)


def test_text_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_SOURCES, DOMAINS[0], lambda: iter(["little"]))
    with pytest.raises(TooLittleTextError, match="characters of Python are missing here"):
        texts(SMOKE)


def test_windows_are_held_out_text_after_a_bos_token(small: Corpus) -> None:
    for text, tokens in zip(small.texts, small.tokens, strict=True):
        assert tokens.windows.shape == (SMOKE.num_windows, SMOKE.window)
        assert (tokens.windows[:, 0] == BOS).all()
        assert BOS not in tokens.train
        for window in tokens.windows:
            assert small.tokenizer.decode(window[1:].tolist()) in "".join(text.held_out)


@pytest.mark.parametrize("after", [BEGINNINGS, ANYWHERE], ids=["beginnings", "anywhere"])
def test_prompts_are_of_one_length_and_of_text_that_was_trained_on(small: Corpus, after: object) -> None:
    for text in small.texts:
        drawn = [prompts(text, small.tokenizer, SMOKE, seed, after) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        for prompt in drawn[0]:
            assert len(small.tokenizer.encode(prompt, add_special_tokens=False).ids) == SMOKE.prompt_tokens
            assert any(prompt in block for block in text.train)
            assert after is ANYWHERE or any(prompt in paragraph for paragraph in "".join(text.train).split("\n\n"))


def test_models_are_trained_again_where_the_tokenizer_is_another(small: Corpus) -> None:
    other = replace(small, tokenizer=trained_tokenizer(["other text"], SMOKE.vocab_size))
    assert _key(other, SMOKE) != _key(small, SMOKE)
    assert _key(small, replace(SMOKE, seeds=(7,))) == _key(small, SMOKE)


def test_mergekit_gets_the_prompts_that_moeplan_gets_and_no_key_that_it_does_not_know(
    config: Callable[[rows.Row], Path],
) -> None:
    theirs, ours = (json.loads(config(row).read_text()) for row in (rows.MERGEKIT_HIDDEN, rows.RIDGE))
    assert theirs["experts"] == ours["experts"]
    assert {key for key in theirs if theirs[key] != ours[key]} == {"gate_mode"}
    for row in (rows.MERGEKIT_HIDDEN, rows.MERGEKIT_RANDOM):
        written = json.loads(config(row).read_text())
        assert set(written) == {"base_model", "gate_mode", "dtype", "experts_per_token", "experts"}


@pytest.mark.parametrize("row", [row for row in rows.ROWS if row.program is Program.MOEPLAN], ids=lambda row: row.key)
def test_moeplan_knows_every_key_that_it_gets(config: Callable[[rows.Row], Path], row: rows.Row) -> None:
    with warnings.catch_warnings(action="error"):
        assert load_config(config(row)).gate_mode == row.gate_mode


# Base 3 nats, oracle 2: a loss of 2.5 is half of the way.
SCALE = Reference((2.0, 4.0), (1.0, 3.0), (0.9, 2.9))


def result(row: rows.Row, variant: str, *qualities: float) -> Result:
    runs = (Run(seed, (3 - quality / 100,) * 2) for seed, quality in enumerate(qualities))
    return Result(row.key, row.name, variant, tuple(runs))


def verdict(words: str, *results: Result, tiny: bool = False) -> TargetRow:
    machine = Machine("", 1, 1, "", "", 0.0, 0.0)
    report = Report("now", 1.0, tiny, FULL, 1, machine, (), dict.fromkeys(VARIANTS, SCALE), results)
    return next(row for row in target_rows(report) if words in row.target)


def test_the_scale_is_of_the_mean_over_domains() -> None:
    assert SCALE.quality((2.0, 4.0)) == pytest.approx(0)
    assert SCALE.quality((2.5, 2.5)) == pytest.approx(50)
    assert SCALE.quality((1.0, 3.0)) == pytest.approx(100)


@pytest.mark.parametrize(("worse", "holds"), [((40.0, 51.0, 52.0), True), ((49.0, 49.0, 60.0), False)])
def test_a_target_holds_by_the_median_in_both_variants(worse: tuple[float, ...], holds: bool) -> None:
    better = result(rows.RIDGE_FILE, VARIANTS[0], 70.0, 70.0, 70.0)
    judged = verdict("4096 tokens", better, result(rows.RIDGE_FILE, VARIANTS[1], *worse))
    assert judged.holds is holds
    assert judged.measured == f"70 % (MLPs), {sorted(worse)[1]:.0f} % (all weights)"


def test_rows_with_the_same_prompts_are_compared_seed_by_seed() -> None:
    # The medians, 30 and 12, are 18 points apart; each seed's own are 21.
    measured = [
        measured
        for variant in VARIANTS
        for measured in (
            result(rows.RIDGE, variant, 30.0, 33.0, 12.0),
            result(rows.MERGEKIT_HIDDEN, variant, 9.0, 12.0, -9.0),
            result(rows.EQUAL, variant, 29.0),
        )
    ]
    assert verdict("20 points", *measured).holds is True
    assert verdict("ahead of equal", *measured).measured == "1 points (MLPs), 1 points (all weights)"


def test_what_failed_misses_its_target_and_what_was_skipped_is_not_judged() -> None:
    failed = Result(rows.RIDGE_AVERAGE.key, "", VARIANTS[1], (Run(0, error="exit status 2: no"),))
    assert verdict("averaged", failed).holds is False
    skipped = [Result(rows.RIDGE_SAMPLES.key, "", variant, skipped="it is not there") for variant in VARIANTS]
    assert verdict("samples", *skipped).holds is None
    assert verdict("samples").measured == "not measured: ridge-samples was not run with MLPs"
    assert verdict("averaged", result(rows.RIDGE_AVERAGE, VARIANTS[1], 10.0), tiny=True).holds is None


def test_every_kind_of_row_runs_on_tiny_models_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    chosen = [rows.MERGEKIT_HIDDEN, rows.EQUAL, rows.RIDGE, rows.RIDGE_AVERAGE]
    command = [sys.executable, "-m", "benchmarks.routing", "--smoke", "--out", tmp_path, "--peer", tmp_path / "none"]
    command += [word for row in chosen for word in ("--only", row.key)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    report = json.loads((tmp_path / "report.json").read_text())
    assert [result["key"] for result in report["results"]] == [row.key for row in chosen]
    for result in report["results"]:
        if result["key"].startswith("mergekit-"):
            assert "python -m benchmarks.peer installs it" in result["skipped"]
        else:
            assert [run["error"] for run in result["runs"]] == [None]
            assert all(2 < loss < 10 for run in result["runs"] for loss in run["losses"])
    assert not any(target["holds"] is not None for target in report["targets"])

    text = (tmp_path / "report.md").read_text()
    assert all(f"| {row.name} |" in text for row in chosen)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == ({"routing.png"} if find_spec("matplotlib") is not None else set())
    assert {path.name for path in tmp_path.iterdir()} - drawn == {"models", "report.json", "report.md"}


def test_a_model_that_cannot_be_judged_has_failed(tmp_path: Path, small: Corpus) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nfor out; do :; done; mkdir "$out"; echo {} > "$out/config.json"\n')
    program.chmod(0o755)
    programs = Programs(program, program)
    measuring = _Measuring(SMOKE, programs, tmp_path, Console(quiet=True))
    models = Models(tmp_path / "base", {VARIANTS[0]: ()})
    run = measuring._run(
        Merge(rows.MERGEKIT_RANDOM, VARIANTS[0], 0), Workshop(tmp_path, SMOKE, small, models, programs)
    )
    assert run.error.startswith("ValueError: ")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("how", "amiss"), [("missing", "layers.1.mlp.experts"), ("unexpected", "more.weight")])
def test_a_model_without_all_its_tensors_is_not_judged(how: str, amiss: str, tmp_path: Path, small: Corpus) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=SMOKE.vocab_size, num_hidden_layers=2, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert len(losses(tmp_path, small.tokens)) == len(DOMAINS)
    tensors = load_file(tmp_path / "model.safetensors")
    if how == "missing":
        tensors = {name: tensor for name, tensor in tensors.items() if "layers.1.block_sparse_moe.experts" not in name}
    else:
        tensors["model.more.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{how} in .*{amiss}"):
        losses(tmp_path, small.tokens)


def test_training_ends_with_a_run_that_is_terminated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.routing", "--smoke", "--out", tmp_path, "--only", rows.EQUAL.key]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            next(line for line in running.stdout if "training the base" in line)
            running.terminate()
            running.communicate(timeout=60)  # it has an end when all who may write have ended
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130
    assert list((tmp_path / "models").glob("*/base")) == []
