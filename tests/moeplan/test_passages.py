"""Passages of files: what is drawn, from how much of a file, and which files are refused."""

import json
import time
from pathlib import Path

import pytest

from moeplan.gates import passages as module
from moeplan.gates.passages import MOST_SLICES, NBYTES, SLICE_NBYTES, PassageError, passages

EVERYTHING = 1 << 30


@pytest.fixture
def file(tmp_path: Path):
    def write(content: str | bytes, name: str = "text.txt") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_all_passages_together_are_the_text(file):
    words = [f"word{number}" for number in range(5_000)]
    drawn = passages(file(" ".join(words)), "seed", EVERYTHING)
    assert sorted(word for passage in drawn for word in passage.split()) == sorted(words)
    assert all(len(passage.encode()) <= NBYTES for passage in drawn)
    assert min(map(len, sorted(drawn, key=len)[1:])) > NBYTES - 20


def test_a_passage_keeps_the_white_space_within_it(file):
    text = "def f(x):\n    return x\n\n\ndef g():\n\tpass"
    assert passages(file(text), "seed", EVERYTHING) == [text]


def test_so_much_text_is_drawn_and_no_more_but_one_passage_at_least(file):
    path = file("a word " * 10_000)
    assert sum(map(len, passages(path, "seed", 5 * NBYTES))) <= 5 * NBYTES
    assert len(passages(path, "seed", 5 * NBYTES)) == 5
    assert len(passages(path, "seed", 1)) == 1


def test_the_seed_decides(file):
    path = file(" ".join(map(str, range(20_000))))
    first, again, other = (passages(path, seed, 4 * NBYTES) for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize("slice_nbytes", [SLICE_NBYTES, 500])
def test_text_without_white_space_is_cut_at_characters(slice_nbytes, file, monkeypatch):
    monkeypatch.setattr(module, "SLICE_NBYTES", slice_nbytes)
    drawn = passages(file("今天天气很好" * 1_000), "seed", EVERYTHING)
    assert set("".join(drawn)) == set("今天天气很好")


def test_all_of_a_small_file_without_white_space_is_drawn(file):
    text = "今天天气很好" * 1_000
    drawn = passages(file(text), "seed", EVERYTHING)
    assert sorted("".join(drawn)) == sorted(text)


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.ndjson", "lines.JSON"])
def test_each_line_of_json_is_a_text_of_its_own(name, file):
    texts = ["one\ntwo", "drei", "vier \u2028 fünf"]
    content = "\n\n".join(json.dumps({"id": 1, "text": text}) for text in texts)
    assert sorted(passages(file(content, name), "seed", EVERYTHING)) == sorted(texts)


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_may_be_as_long_as_the_message_about_longer_ones_says(end, file):
    line = '{"text": "' + "x " * ((1 << 19) - 6) + '"}'
    assert len(line) == 1 << 20
    drawn = passages(file(line + end, "a.jsonl"), "seed", EVERYTHING)
    assert sum(passage.count("x") for passage in drawn) == (1 << 19) - 6
    with pytest.raises(PassageError, match="line 1 is longer than 1 MiB"):
        passages(file(" " + line + end, "a.jsonl"), "seed", EVERYTHING)


def test_a_byte_order_mark_before_all_is_no_text(file):
    """Within a text the same character is one of its own."""
    content = '\n{"text": "\ufeffone"}\n{"text": "two"}\n'
    assert passages(file("\ufeffone \ufefftwo"), "seed", EVERYTHING) == ["one \ufefftwo"]
    for lines in (content, content.lstrip()):
        assert sorted(passages(file("\ufeff" + lines, "lines.jsonl"), "seed", EVERYTHING)) == ["two", "\ufeffone"]
    with pytest.raises(PassageError, match="there is no text in it"):
        passages(file("\ufeff"), "seed", EVERYTHING)


@pytest.mark.parametrize("kind", ["text", "json"])
def test_of_a_large_file_slices_at_random_places_are_read(kind, file, monkeypatch):
    monkeypatch.setattr(module, "SLICE_NBYTES", 4096)
    words = [f"w{number:07}" for number in range(40_000)]
    if kind == "text":
        path = file(" ".join(words))
    else:
        path = file("".join(json.dumps({"text": word}) + "\n" for word in words), "words.jsonl")
    drawn = [word for passage in passages(path, "seed", EVERYTHING) for word in passage.split()]
    assert set(drawn) <= set(words)  # none is cut
    places = {int(word[1:]) // (len(words) // MOST_SLICES) for word in drawn}
    assert len(places) > MOST_SLICES * 0.9
    assert len(drawn) * 9 < 2 * MOST_SLICES * 4096


@pytest.mark.parametrize("count", [4, 40])
def test_lines_that_are_longer_than_slices_are_drawn_from_and_none_twice(count, file, monkeypatch):
    monkeypatch.setattr(module, "SLICE_NBYTES", 4096)
    lines = [json.dumps({"text": f"w{number} " * 15_000}) for number in range(count)]
    path = file("\n".join(lines), "lines.jsonl")
    for seed in "abcdef":
        drawn = [word for passage in passages(path, seed, EVERYTHING) for word in passage.split()]
        assert len(set(drawn)) >= min(count, MOST_SLICES) // 2
        assert {drawn.count(word) for word in set(drawn)} == {15_000}


def test_a_file_of_any_size_is_read_in_bounded_time_and_memory(tmp_path):
    with open(tmp_path / "large.txt", "wb") as sparse:
        sparse.truncate(1 << 42)
    with pytest.raises(PassageError, match="is not text"):
        passages(str(tmp_path / "large.txt"), "seed", EVERYTHING)
    assert MOST_SLICES * SLICE_NBYTES <= 2 << 20


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.txt", "there is no text in it"),
        (b" \n ", "a.txt", "there is no text in it"),
        (b"\n\n", "a.jsonl", "there is no text in it"),
        (b"a\0b", "a.txt", "is not text"),
        (b"gr\xfc\xdfe", "a.txt", r"is not UTF-8 text \(near byte 2\)"),
        (b'{"text": "a"}\n{"text"\n', "a.jsonl", "line 2 is not JSON"),
        (b"[1]\n", "a.jsonl", "line 1 is not a JSON object"),
        (b'\n{"content": "a"}\n', "a.jsonl", "line 2 has no `text`; write a JSON object with a `text` on each line"),
        (b'{"text": null}\n', "a.jsonl", "line 1 has no `text`"),
        (b'{"text": 7}\n', "a.jsonl", "line 1: `text` is 7"),
        (b'{"text": 7}\n' * 200_000, "a.jsonl", r"the line at byte \d[\d,]*: `text` is 7"),
        (b'{"text": "' + b"x" * (1 << 20) + b'"}', "a.jsonl", "longer than 1 MiB"),
        (b"[" * 100_000, "a.jsonl", "nested more than"),
    ],
)
def test_what_is_no_text_is_refused_by_name_and_place(content, name, message, file):
    path = file(content, name)
    with pytest.raises(PassageError, match=message) as refused:
        passages(path, "seed", EVERYTHING)
    assert str(refused.value).startswith(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(PassageError, match="cannot be read: No such file"):
        passages(str(tmp_path / "none"), "seed", EVERYTHING)
    with pytest.raises(PassageError, match="is not a regular file"):
        passages(str(tmp_path), "seed", EVERYTHING)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
@pytest.mark.parametrize("after", ["", "the end"])
def test_much_white_space_takes_no_time_and_is_no_passage(after, name, file):
    nbytes = 1 << 21 if name == "text.txt" else 1 << 19  # a line of JSON is shorter, and a line end two bytes of it
    text = "the beginning" + "\n" * (nbytes - 32) + after
    path = file(text if name == "text.txt" else json.dumps({"text": text}), name)
    started = time.process_time()
    drawn = passages(path, "seed", EVERYTHING)
    assert time.process_time() - started < 1
    assert sorted(passage.strip() for passage in drawn) == ["the beginning", *["the end"] * bool(after)]
