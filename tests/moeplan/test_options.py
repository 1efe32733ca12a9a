"""The sizes that people write, and options that cannot be meant."""

import os

import pytest

from moeplan.errors import UserError
from moeplan.options import OptionError, Options, memory_nbytes, shard_nbytes

MACHINE = 64 << 30


@pytest.mark.parametrize(
    ("typed", "nbytes"),
    [
        ("2GiB", 2 << 30),
        ("512MB", 512_000_000),
        ("512MiB", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        (" 300 kb ", 300_000),
        ("1TiB", 1 << 40),
        ("2G", 2 << 30),
        ("600m", 600 << 20),
        ("1.5 t", 3 << 39),
        ("99000K", 99_000 << 10),
        ("4194304", 4 << 20),
        ("4096B", 4096),
        (4 << 20, 4 << 20),
        ("50%", MACHINE // 2),
        ("12.5 %", MACHINE // 8),
        ("100%", MACHINE),
    ],
)
def test_memory_is_a_number_of_bytes_or_a_share_of_the_machine_s(typed, nbytes):
    assert memory_nbytes(typed, MACHINE) == nbytes


@pytest.mark.parametrize(
    "typed", ["much", "", "2 GiB RAM", "-2GiB", "2GiBs", "1e9", "5P", "%", "nan", -5, True, "9" * 400]
)
def test_memory_that_is_no_size_is_refused_with_examples(typed):
    with pytest.raises(OptionError, match=r"--max-memory: .* is not a size; write one such as 2GiB, 512MB or 50%"):
        memory_nbytes(typed, MACHINE)


@pytest.mark.parametrize("typed", ["0%", "101%", "1000%"])
def test_a_share_of_the_memory_is_above_0_and_at_most_100_percent(typed):
    with pytest.raises(OptionError, match=f"--max-memory: {typed} is not between 0% and 100%"):
        memory_nbytes(typed, MACHINE)


@pytest.mark.parametrize(
    ("typed", "meant"), [("50", "50% or 50GiB"), (" 8 ", "8% or 8GiB"), (64, "64% or 64GiB"), ("512", "512MiB")]
)
def test_a_number_that_is_too_small_for_bytes_is_asked_about(typed, meant):
    with pytest.raises(OptionError, match=rf"^--max-memory: \d+ without a unit is so many bytes; write {meant} if"):
        memory_nbytes(typed, MACHINE)


@pytest.mark.parametrize("typed", [0, "0", "0GiB", "0.1B"])
def test_no_memory_at_all_is_refused(typed):
    with pytest.raises(OptionError, match=r"--max-memory: .* is not above zero"):
        memory_nbytes(typed, MACHINE)


@pytest.mark.parametrize(
    ("typed", "nbytes"),
    [
        ("5B", 10_000_000_000),
        ("1.5b", 3_000_000_000),
        ("300M", 600_000_000),
        ("20 k", 40_000),
        ("1000", 2000),
        (1000, 2000),
        ("500MB", 500_000_000),
        ("2GiB", 2 << 30),
    ],
)
def test_a_shard_s_size_is_a_number_of_parameters_or_of_bytes(typed, nbytes):
    assert shard_nbytes(typed, itemsize=2) == nbytes


@pytest.mark.parametrize("typed", ["large", "", "5 billion", "-5B", "50%", "5G", -1, False, "9" * 400, "9" * 400 + "B"])
def test_a_shard_size_that_is_none_is_refused_with_examples(typed):
    message = r"--out-shard-size: .* is not a size; write one such as 5B \(parameters\), 500MB or 2GiB"
    with pytest.raises(OptionError, match=message):
        shard_nbytes(typed, itemsize=2)


@pytest.mark.parametrize("typed", ["0", "0B", "0MB", 0])
def test_a_shard_of_no_size_is_refused(typed):
    with pytest.raises(OptionError, match=r"--out-shard-size: .* is not above zero"):
        shard_nbytes(typed, itemsize=2)


def test_a_seed_below_zero_is_refused():
    with pytest.raises(OptionError, match="--random-seed: -1 is below zero"):
        Options(random_seed=-1)


def test_wrong_options_are_the_user_s_to_mend():
    assert issubclass(OptionError, UserError)
    assert OptionError.exit_status == 2


def test_a_base_is_quantised_to_one_number_of_bits():
    assert [Options().bits, Options(load_in_8bit=True).bits, Options(load_in_4bit=True).bits] == [0, 8, 4]
    with pytest.raises(OptionError, match="--load-in-8bit and --load-in-4bit: only one"):
        Options(load_in_8bit=True, load_in_4bit=True)


def test_as_many_threads_compute_as_there_are_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= Options().threads <= os.cpu_count()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [Options().threads, Options(num_threads=5).threads] == [3, 5]
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert Options().threads == 4096
    for number in (0, 4097):
        with pytest.raises(OptionError, match=f"--num-threads: {number} is not from 1 to 4,096"):
            Options(num_threads=number)
