"""Merging models on the Hub, from a server that behaves like it: what is moved, what is kept, what goes wrong."""

import errno
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from commands import moeplan, outcome, snapshot, sparse_llama, start, write_config
from hub_server import TOKEN, Fault, Hub, serving
from huggingface_hub import constants, file_download
from huggingface_hub.errors import HfHubHTTPError
from rich.filesize import decimal

import moeplan as api
from executor import patience
from executor.engine import Progress
from moeplan import fetching, planning
from moeplan.checkpoint import open_checkpoint
from moeplan.hub_download import plainly
from moeplan.hub_errors import breaks_off, is_busy
from moeplan.staging import PARTIAL
from moeplan.tokenizer_files import MAX_READ_NBYTES
from planner.schedule import COPYING

MIB = 1 << 20
ABOUT = ("README.md", "moeplan.json", "moeplan_config.yml")
BASE, EXPERT, OTHER = "org/base", "org/expert", "org/other"
WEIGHTS = (".safetensors", ".bin")
FOREVER = 10**9
MEASURED = """
import atexit, sys
atexit.register(lambda: sys.stderr.write(next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))))
from moeplan.__main__ import main
main()
"""
"""The command, which says at last how much memory it had resident at most."""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hub"


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does where it is set before huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # the older versions have it in both
        monkeypatch.setattr(
            module, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}", raising=False
        )


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.001)
    with serving() as hub:
        set_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        yield hub


@pytest.fixture
def models(hub: Hub, checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """What the hub has under which name: three models of one shape."""
    models = {BASE: checkpoint("llama-plain", 0), EXPERT: checkpoint("llama-plain", 1), OTHER: checkpoint("llama-f16")}
    for name, directory in models.items():
        hub.add(name, directory)
    return models


def written(out: Path) -> dict[str, bytes | None]:
    """The model's files, without those that say what it was made of."""
    result = snapshot(out)
    assert result
    return {name: content for name, content in result.items() if name not in ABOUT}


@pytest.fixture
def local(models: dict[str, Path], tmp_path: Path) -> dict[str, bytes | None]:
    """What the merge of the same models gives from their directories."""
    config = write_config(tmp_path / "local.yml", models[BASE], [models[EXPERT], models[OTHER]], gate_mode="hidden")
    assert moeplan(config, tmp_path / "local").status == 0
    return written(tmp_path / "local")


@pytest.fixture
def config(tmp_path: Path, models: dict[str, Path]) -> Path:
    return write_config(tmp_path / "hub.yml", BASE, [EXPERT, OTHER], gate_mode="hidden")


def data(*args: object) -> dict[str, Any]:
    ran = moeplan(*args, "--json")
    assert ran.status == 0, ran.stderr
    return json.loads(ran.stdout)


def large_models(hub: Hub, tmp_path: Path, num_layers: int) -> tuple[list[str], list[Path]]:
    """The names and directories of two models of 60 MB a layer, which differ, and take little space on the disk."""
    sizes = {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": num_layers}
    names, directories = [], []
    for number in range(2):
        path = sparse_llama(tmp_path / f"model-{number}", **sizes, num_attention_heads=16)
        with (path / "model.safetensors").open("r+b") as file:
            for place in range(1, file.seek(0, os.SEEK_END) // MIB):
                file.seek(place * MIB)
                file.write(bytes([number, place % 256]))
        names.append(f"org/model-{number}")
        directories.append(path)
        hub.add(names[-1], path)
    return names, directories


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """For a process of its own, which finds `hub`, and has an empty cache."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}


def large_files(cache: Path) -> list[Path]:
    return [file for file in cache.rglob("*") if file.is_file() and file.suffix in WEIGHTS]


def test_a_plan_counts_the_disk_that_downloads_take_where_the_output_will_be(
    config: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ([], [tmp_path / "out"]):
        downloading, streaming = (data(config, *out, "--plan", *how)["plan"] for how in ([], ["--stream"]))
        needed = {each["disk"]["needed_nbytes"] - each["hub"]["download_nbytes"] for each in (downloading, streaming)}
        assert len(needed) == 1
        assert downloading["hub"]["download_nbytes"] > streaming["hub"]["download_nbytes"] + 10**6
    monkeypatch.setattr(planning, "on_one_disk", lambda first, second: False)
    elsewhere = data(config, tmp_path / "out", "--plan")["plan"]["disk"]["needed_nbytes"]
    assert elsewhere == downloading["disk"]["needed_nbytes"] - downloading["hub"]["download_nbytes"]


def test_a_directory_that_must_not_be_looked_at_is_none_of_the_hub_s_models(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lstat = os.lstat

    def refusing(path: Any, **how: Any) -> os.stat_result:
        if os.fspath(path) == "locked/model":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return lstat(path, **how)

    monkeypatch.setattr(os, "lstat", refusing)
    message = refused(write_config(tmp_path / "config.yml", "locked/model", ["locked/model"] * 2))
    assert "locked/model" in message
    assert hub.requests == []


def test_streaming_gives_what_local_directories_give_moves_what_is_planned_and_stores_no_weights(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path, cache: Path
) -> None:
    planned = data(config, "--plan", "--stream")["plan"]
    heads = hub.weights_moved()
    result = data(config, tmp_path / "out", "--stream")
    assert written(tmp_path / "out") == local
    assert hub.weights_moved() - 2 * heads == planned["read"]["nbytes"] == planned["hub"]["needed_nbytes"]
    assert result["result"]["read_nbytes"] == planned["read"]["nbytes"] < planned["hub"]["nbytes"]
    assert large_files(cache) == []


def test_downloading_gives_the_same_and_fills_the_cache(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path, cache: Path, models: dict[str, Path]
) -> None:
    planned = data(config, tmp_path / "out")["plan"]
    assert written(tmp_path / "out") == local
    sizes = [(directory / "model.safetensors").stat().st_size for directory in models.values()]
    assert planned["hub"]["nbytes"] == sum(sizes)
    assert sorted(file.stat().st_size for file in large_files(cache)) == sorted(sizes)
    moved = hub.weights_moved()
    again = data(config, tmp_path / "again")["plan"]
    assert hub.weights_moved() == moved
    assert again["hub"] is None
    assert written(tmp_path / "again") == local


@pytest.mark.parametrize("is_shared", [False, True])
def test_weights_that_another_commit_has_in_the_cache_are_read_there(
    hub: Hub,
    config: Path,
    local: dict[str, bytes | None],
    models: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_shared: bool,
) -> None:
    """Also where huggingface_hub has put them into the store that models share."""
    data(config, tmp_path / "out")
    for name, model in models.items():
        later = shutil.copytree(model, tmp_path / "later" / name)
        (later / "README.md").write_text("An edit.")
        hub.add(name, later)
    if is_shared:
        for number, blob in enumerate(list(cache.glob("models--*/blobs/*"))):
            store = cache / "blobs" / f"{number:02}"
            store.mkdir(parents=True)
            blob.symlink_to(blob.rename(store / blob.name))
    moved = hub.weights_moved()
    for how in ([], ["--stream"]):
        assert data(config, "--plan", *how)["plan"]["hub"] is None
    data(config, tmp_path / "again")
    assert hub.weights_moved() == moved
    assert written(tmp_path / "again") == local
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert moeplan(config, "--plan").status == 0


def test_weights_that_two_revisions_share_are_downloaded_once_and_are_enough_for_both_offline(
    hub: Hub, models: dict[str, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = shutil.copytree(models[BASE], tmp_path / "older")
    (older / "README.md").write_text("Before an edit.")
    hub.add(BASE, older, revision="v1")
    config = write_config(tmp_path / "config.yml", BASE, [f"{BASE}@v1", EXPERT])
    data(config, tmp_path / "out")
    assert len({file.resolve() for file in large_files(cache)}) == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data(config, tmp_path / "offline")
    assert written(tmp_path / "offline") == written(tmp_path / "out")


def large_tokenizer(path: Path) -> int:
    """Put a tokenizer.json of as many tokens as Llama 3's there; returns its size."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {"prompt": 0, "?": 1, **{f"a-word-{n:06}-{n * 7919 % 128_000:x}": n for n in range(2, 128_256)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return (path / "tokenizer.json").stat().st_size


@pytest.mark.parametrize("gate_mode", ["random", "hidden"])
def test_planning_four_models_of_a_billion_parameters_moves_less_than_a_megabyte_and_prompts_need_the_tokenizer_once(
    hub: Hub, tmp_path: Path, cache: Path, gate_mode: str
) -> None:
    for number in range(4):
        sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        path = sparse_llama(tmp_path / f"model-{number}", **sizes, num_attention_heads=32, num_key_value_heads=8)
        with (path / "model.safetensors").open("r+b") as file:
            file.seek(MIB)
            file.write(bytes([number]))
        tokenizer_nbytes = large_tokenizer(path)
        hub.add(f"org/model-{number}", path)
    names = [f"org/model-{n}" for n in range(4)]
    config = write_config(tmp_path / "config.yml", names[0], names, gate_mode=gate_mode)
    planned = data(config, "--plan")["plan"]
    assert planned["hub"]["nbytes"] > 4 * 2_400_000_000
    assert planned["hub"]["needed_nbytes"] == planned["read"]["nbytes"] < planned["hub"]["nbytes"]
    assert hub.moved.pop("tokenizer.json", 0) == (tokenizer_nbytes if gate_mode == "hidden" else 0)
    assert sum(hub.moved.values()) < 1_000_000
    cached = sum(file.lstat().st_size for file in cache.rglob("*") if file.is_file())
    assert cached < 1_000_000 + (tokenizer_nbytes if gate_mode == "hidden" else 0)
    data(config, "--plan")
    assert "tokenizer.json" not in hub.moved
    assert sum(hub.moved.values()) < 2_000_000


def test_the_plan_says_what_would_be_downloaded_from_where_and_how_much_of_it_is_needed(
    hub: Hub, config: Path, cache: Path
) -> None:
    told = moeplan(config, "--plan").stdout
    assert "on the Hub" in told
    assert f"to be downloaded from {hub.url}" in told
    assert f"to {cache}" in told
    assert "of it is needed; --stream reads no more" in told
    assert f"to be streamed from {hub.url}" in moeplan(config, "--plan", "--stream").stdout


def test_a_plan_keeps_no_connections_open(hub: Hub, config: Path) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", ResourceWarning)
        api.plan(api.load_config(config))
        gc.collect()
    assert given == []


def test_a_model_under_two_names_is_read_once(hub: Hub, tmp_path: Path, models: dict[str, Path], cache: Path) -> None:
    hub.add("copy/base", models[BASE])
    config = write_config(tmp_path / "config.yml", BASE, [BASE, "copy/base"])
    args = (config, "--plan", "--i-understand-this-is-not-useful-without-training")
    planned = data(*args)["plan"]
    assert [source["used_as"] for source in planned["sources"]] == [["base", "expert 0", "expert 1"]]
    assert planned["hub"]["nbytes"] == (models[BASE] / "model.safetensors").stat().st_size
    data(*args[:1], tmp_path / "out", *args[2:])  # now the first name is in the cache
    assert data(*args)["plan"]["hub"] is None
    assert len(large_files(cache)) == 1


def test_a_revision_is_what_it_says(
    hub: Hub, models: dict[str, Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    old = checkpoint("llama-plain", 5)
    commit = hub.add(EXPERT, old, revision="v1.0")
    expected = tmp_path / "expected"
    assert moeplan(write_config(tmp_path / "a.yml", models[BASE], [old, models[OTHER]]), expected).status == 0
    for number, revision in enumerate(["v1.0", commit]):
        config = write_config(tmp_path / "b.yml", BASE, [f"{EXPERT}@{revision}", OTHER])
        out = tmp_path / f"out-{number}"
        assert moeplan(config, out, "--stream").status == 0
        assert written(out) == written(expected)
        card = (out / "README.md").read_text()
        assert f"[{EXPERT}@{revision}](https://huggingface.co/{EXPERT}/tree/{revision})" in card


def test_a_branch_that_moves_meanwhile_changes_nothing(
    hub: Hub, tmp_path: Path, models: dict[str, Path], cache: Path
) -> None:
    """A merge that downloads plans twice, and both times with the commit that the branch was at first."""
    config = write_config(tmp_path / "config.yml", BASE, [BASE, EXPERT])
    later = shutil.copytree(models[BASE], tmp_path / "later")
    (later / "README.md").write_text("An edit.")

    def push(plan: api.MergePlan) -> None:
        hub.add(BASE, later)
        hub.add(BASE, models[BASE], revision="before")

    api.merge(api.load_config(config), tmp_path / "out", on_plan=push)
    local = write_config(tmp_path / "local.yml", models[BASE], [models[BASE], models[EXPERT]])
    assert moeplan(local, tmp_path / "local").status == 0
    assert written(tmp_path / "out") == written(tmp_path / "local")
    assert not any("/resolve/" in request.path and hub.commit(BASE, "main") in request.path for request in hub.requests)


def left_unfinished(config: Path, out: Path, **options: Any) -> None:
    """Have a merge be interrupted when it has written something."""

    fetched = [0]

    def stop(progress: Progress) -> None:
        if progress.doing == "fetching":
            fetched.append(progress.written_nbytes)
        elif progress.written_nbytes > fetched[-1] + 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.merge(api.load_config(config), out, api.Options(**options), on_progress=stop)
    assert [path.name for path in out.iterdir()] == [PARTIAL]


@pytest.mark.parametrize("args", [(), ("--stream",)])
def test_an_unfinished_merge_goes_on_with_the_commits_that_it_was_begun_with(
    hub: Hub,
    config: Path,
    local: dict[str, bytes | None],
    models: dict[str, Path],
    tmp_path: Path,
    args: tuple[str, ...],
) -> None:
    """Where the Hub has such a commit no more, with what is in the cache; what was streamed is not."""
    left_unfinished(config, tmp_path / "out", stream=bool(args))
    later = shutil.copytree(models[BASE], tmp_path / "later")
    (later / "README.md").write_text("An edit.")
    hub.add(BASE, later)
    if args:
        gone = refused(config, tmp_path / "out", *args)
        assert gone.endswith("an unfinished merge was begun with it: --restart starts afresh")
        hub.add(BASE, models[BASE], revision="before")
    ran = moeplan(config, tmp_path / "out", *args)
    assert ran.status == 0
    assert ("; what is in the cache is taken" in ran.stderr) == (not args)
    assert written(tmp_path / "out") == local


def test_an_unfinished_stream_goes_on_where_its_weights_have_come_into_the_cache_meanwhile(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path
) -> None:
    left_unfinished(config, tmp_path / "out", stream=True)
    assert moeplan(config, tmp_path / "other").status == 0
    result = data(config, tmp_path / "out", "--stream")["result"]
    assert result["nbytes_by_path"]["resumed"] > 0
    assert written(tmp_path / "out") == local


def test_an_unfinished_stream_goes_on_from_a_mirror(
    hub: Hub, config: Path, models: dict[str, Path], local: dict[str, bytes | None], tmp_path: Path, cache: Path
) -> None:
    left_unfinished(config, tmp_path / "out", stream=True)
    assert moeplan(config, tmp_path / "other").status == 0  # the weights are in the cache
    with serving() as mirror, pytest.MonkeyPatch.context() as patch:
        for name, directory in models.items():
            mirror.add(name, directory)
        set_endpoint(patch, mirror.url)
        result = data(config, tmp_path / "out", "--stream")["result"]
        assert mirror.weights_moved() > 0
    assert result["nbytes_by_path"]["resumed"] > 0
    assert written(tmp_path / "out") == local


def test_nothing_is_downloaded_where_something_else_was_left_unfinished(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path
) -> None:
    left_unfinished(config, tmp_path / "out", stream=True)
    message = refused(config, tmp_path / "out")
    assert "an unfinished merge is there, of something else: option --stream was True and is absent. Undo" in message
    assert "option --random-seed was 0 and is 1" in refused(config, tmp_path / "out", "--random-seed", "1")
    assert large_files(Path(constants.HF_HUB_CACHE)) == []
    assert moeplan(config, tmp_path / "out", "--stream").status == 0
    assert written(tmp_path / "out") == local


def test_a_plan_reads_prompts_with_every_file_that_names_a_token(
    hub: Hub, config: Path, models: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    named = shutil.copytree(models[BASE], tmp_path / "named")
    (named / "added_tokens.json").write_text("{}")
    hub.add(BASE, named)
    assert moeplan(config, "--plan").status == 0
    assert len(list(cache.rglob("added_tokens.json"))) == 1


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_the_base_is_fetched_for_prompts_where_it_is_trusted_alone(
    hub: Hub, models: dict[str, Path], tmp_path: Path, cache: Path, trusted: bool
) -> None:
    own = shutil.copytree(models[BASE], tmp_path / "own")
    (own / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nfrom .words import ids\n\n"
        "class Own(PreTrainedTokenizerFast):\n    encode = ids\n"
    )
    (own / "words.py").write_text("def ids(self, text, **options):\n    return [5] * len(text)\n")
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    hub.add("org/own", own)
    config = write_config(tmp_path / "own.yml", "org/own", ["org/own", EXPERT], gate_mode="cheap_embed")
    assert moeplan(config, "--plan", *["--trust-remote-code"] * trusted).status == 0
    assert {file.name for file in cache.rglob("*.py")} == ({"tokenization_own.py", "words.py"} if trusted else set())


def test_a_local_base_may_have_experts_on_the_hub(
    hub: Hub, models: dict[str, Path], local: dict[str, bytes | None], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yml", models[BASE], [EXPERT, OTHER], gate_mode="hidden")
    for number, args in enumerate((["--stream"], [])):
        assert moeplan(config, tmp_path / f"out-{number}", *args).status == 0
        assert written(tmp_path / f"out-{number}") == local


def test_a_local_directory_of_that_name_wins(
    hub: Hub, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path(BASE).symlink_to(models[BASE])
    Path(EXPERT).symlink_to(models[EXPERT])
    assert data(write_config(tmp_path / "config.yml", BASE, [BASE, EXPERT]), "--plan")["plan"]["hub"] is None
    assert hub.requests == []


def test_of_shards_only_those_are_downloaded_that_are_needed(
    hub: Hub, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    base, expert = checkpoint("llama-sharded", 0), checkpoint("llama-sharded", 1)
    hub.add(BASE, base)
    hub.add(EXPERT, expert)
    config = write_config(tmp_path / "hub.yml", BASE, [EXPERT, EXPERT], gate_mode="random")
    flag = "--i-understand-this-is-not-useful-without-training"
    planned = data(config, tmp_path / "out", flag)["plan"]
    count = len(list(base.glob("*.safetensors")))
    assert count < len(planned["hub"]["files"]) < 2 * count
    assert len(large_files(cache)) == len(planned["hub"]["files"])
    config = write_config(tmp_path / "local.yml", base, [expert, expert])
    assert moeplan(config, tmp_path / "local", flag).status == 0
    assert written(tmp_path / "out") == written(tmp_path / "local")
    heads = [request for request in hub.requests if request.headers.get("Range", "").startswith("bytes=0-")]
    assert {request.server for request in heads} == {"hub", "cdn"}


def test_an_adapter_on_the_hub_is_added_to_a_model_on_the_hub(
    hub: Hub, models: dict[str, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[BASE])
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    hub.add("org/lora", tmp_path / "lora")
    for name, base, adapter in (("a", models[BASE], tmp_path / "lora"), ("b", BASE, "org/lora")):
        config = write_config(tmp_path / f"{name}.yml", base, [f"{base}+{adapter}", base])
        ran = moeplan(config, tmp_path / name, "--stream")
        assert ran.status == 0, ran.stderr
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert f"{BASE}+org/lora" in moeplan(config, "--plan").stdout


@pytest.mark.parametrize("num_shards", [1, 3], ids=["single", "sharded"])
def test_bin_files_on_the_hub_are_read_range_by_range_and_give_what_local_ones_give(
    hub: Hub, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path, num_shards: int
) -> None:
    from models import as_bin

    directories = [as_bin(checkpoint("llama-bf16", n), tmp_path / f"bin-{n}", num_shards) for n in range(2)]
    names = [BASE, EXPERT]
    for name, directory in zip(names, directories, strict=True):
        hub.add(name, directory)
    config = write_config(tmp_path / "local.yml", directories[0], directories, gate_mode="hidden")
    assert moeplan(config, tmp_path / "local").status == 0
    config = write_config(tmp_path / "hub.yml", BASE, names, gate_mode="hidden")
    planned = data(config, "--plan")["plan"]
    heads = hub.weights_moved()
    data(config, tmp_path / "streamed", "--stream")
    assert hub.weights_moved() - 2 * heads == planned["read"]["nbytes"] < planned["hub"]["nbytes"]
    assert large_files(cache) == []
    data(config, tmp_path / "downloaded")
    assert written(tmp_path / "streamed") == written(tmp_path / "downloaded") == written(tmp_path / "local")


def test_planning_with_bin_files_moves_what_says_where_tensors_lie_and_no_more(hub: Hub, tmp_path: Path) -> None:
    import torch

    model = sparse_llama(tmp_path / "model", num_hidden_layers=22)
    shapes = {name: read.shape for name, read in open_checkpoint(model).tensors.items()}
    (model / "model.safetensors").unlink()
    torch.save({name: torch.ones(shape).bfloat16() for name, shape in shapes.items()}, model / "pytorch_model.bin")
    hub.add(BASE, model)
    flag = "--i-understand-this-is-not-useful-without-training"
    data(write_config(tmp_path / "config.yml", BASE, [BASE, BASE]), "--plan", flag)
    assert hub.moved["pytorch_model.bin"] < 100_000 + 300 * len(shapes)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._path), "w")


def test_a_malicious_pickle_on_the_hub_is_refused_and_does_not_run(
    hub: Hub, tmp_path: Path, models: dict[str, Path]
) -> None:
    import torch

    evil, victim = tmp_path / "evil", tmp_path / "victim"
    evil.mkdir()
    (evil / "config.json").write_bytes((models[BASE] / "config.json").read_bytes())
    torch.save({"model.norm.weight": Malicious(victim)}, evil / "pytorch_model.bin")
    hub.add("org/evil", evil)
    config = write_config(tmp_path / "config.yml", BASE, [BASE, "org/evil"])
    for args in (["--plan"], [tmp_path / "out", "--stream"], [tmp_path / "out"]):
        message = refused(config, *args)
        assert "experts[1].source_model: " in message
        assert "org/evil/pytorch_model.bin: has a pickle that would call or use " in message
        assert "nothing of it was executed" in message
    assert not victim.exists()
    assert not (tmp_path / "out").exists()
    torch.load(evil / "pytorch_model.bin", weights_only=False)
    assert victim.exists()


def test_a_file_that_is_not_whole_in_the_cache_is_told_with_what_to_remove(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path, cache: Path
) -> None:
    data(config, tmp_path / "out")
    pointer = next(file for file in large_files(cache) if "models--org--expert" in str(file))
    blob, size = pointer.resolve(), pointer.stat().st_size
    os.truncate(blob, 100_000)
    message = refused(config)
    assert f"{EXPERT}/model.safetensors: has {size:,} bytes on the Hub, and 100,000 in the cache: remove" in message
    assert f"remove {blob}, and" in message
    blob.unlink()
    data(config, tmp_path / "again")
    assert written(tmp_path / "again") == local


def test_the_cache_may_be_anywhere(hub: Hub, config: Path, tmp_path: Path, cache: Path) -> None:
    assert moeplan(config, tmp_path / "out", "--transformers-cache", tmp_path / "elsewhere").status == 0
    assert len(large_files(tmp_path / "elsewhere")) == 3
    assert not cache.exists()


def test_what_is_in_the_cache_is_enough_offline(
    hub: Hub, config: Path, tmp_path: Path, local: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data(config, tmp_path / "out")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data(config, tmp_path / "offline")
    assert len(hub.requests) == asked
    assert written(tmp_path / "offline") == local


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Within, nobody can write to the directory."""
    for how in (["--bind", path], ["-o", "remount,bind,ro"]):
        if subprocess.run(["mount", *how, path], capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a directory read-only here")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_cache_that_cannot_be_written_to_is_enough_with_what_transformers_has_put_there(
    hub: Hub, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """Which loads no cards, and of two kinds of weights those alone that it prefers."""
    models = [shutil.copytree(checkpoint("llama-sharded", number), tmp_path / f"{number}") for number in range(2)]
    for name, model in zip((BASE, EXPERT), models, strict=True):
        hub.add(name, model)
    config = write_config(tmp_path / "config.yml", BASE, [BASE, EXPERT])
    data(config, tmp_path / "out")
    for model in models:
        (model / "README.md").write_text("A model.")
        (model / "pytorch_model.bin.index.json").write_text("{}")
    with read_only(cache):
        ran = moeplan(config, tmp_path / "again")
    assert ran.status == 0, ran.stderr
    assert re.search(rf"{BASE}/README.md: .* cannot be written: .*; so its licence is not known", ran.stderr)
    assert written(tmp_path / "again") == written(tmp_path / "out")


def test_what_is_in_the_cache_is_enough_where_the_hub_cannot_be_reached(
    hub: Hub, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data(config, tmp_path / "out")
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    ran = moeplan(config, tmp_path / "again")
    assert ran.status == 0
    assert f"{BASE}: http://127.0.0.1:9 cannot be reached" in ran.stderr
    assert "what is in the cache is taken" in ran.stderr


def test_a_hub_that_stays_busy_is_waited_for_once_and_then_what_is_in_the_cache_is_taken(
    hub: Hub, config: Path, tmp_path: Path
) -> None:
    data(config, tmp_path / "out")
    hub.requests.clear()
    hub.faults.append(Fault("hub", "/api/models", status=503, times=FOREVER))
    ran = moeplan(config, tmp_path / "again")
    assert ran.status == 0
    assert ran.stderr.count("what is in the cache is taken") == 3
    assert len(hub.requests) == patience.ATTEMPTS + 2


def refused(config: Path, *args: object, status: int = 2) -> str:
    """The error message, which must be one line that begins with the config's."""
    ran = moeplan(config, *(args or ("--plan",)))
    assert ran.status == status
    assert "\n" not in ran.error
    return ran.error


def test_a_model_that_is_nowhere_is_one_message_with_the_name_that_was_meant(
    hub: Hub, models: dict[str, Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yml", BASE, [EXPERT, "org/exprt"])
    message = refused(config)
    assert message.startswith(f"{config}:1: experts[1].source_model: org/exprt: there is no such directory, and no ")
    assert f"no such model on {hub.url}; did you mean org/expert?; if it is private, set HF_TOKEN, or run" in message


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize("name", ["models/my--finetune", "models/llama-", f"models/{'a' * 100}", "modèles/base"])
def test_a_name_that_no_model_on_the_hub_can_have_is_one_message(
    hub: Hub, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, offline: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline == "1")
    config = write_config(tmp_path / "config.yml", models[BASE], [models[BASE], name])
    message = refused(config)
    assert f": {name}: there is no such directory, and no model on the Hub has such a name: " in message


def test_a_revision_that_is_not_there_is_one_message_with_those_that_are(
    hub: Hub, models: dict[str, Path], tmp_path: Path
) -> None:
    hub.add(EXPERT, models[OTHER], revision="v1.0")
    config = write_config(tmp_path / "config.yml", BASE, [BASE, f"{EXPERT}@v1"])
    assert "org/expert@v1: has no revision 'v1'; it has 'v1.0'" in refused(config)


def test_a_tokenizer_that_cannot_be_had_is_one_message_with_the_line_of_the_base(hub: Hub, config: Path) -> None:
    hub.faults.append(Fault("hub", "tokenizer.json", status=403, times=99))
    assert refused(config).startswith(f"{config}:1: base_model: {BASE}/tokenizer.json: {hub.url} refuses access")


@pytest.mark.parametrize("token", [None, "hf_of_another"])
def test_a_gated_model_is_one_message_with_what_to_do(
    hub: Hub, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    hub.repositories[EXPERT].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = refused(write_config(tmp_path / "config.yml", BASE, [BASE, EXPERT]))
    assert f"{EXPERT}/config.json: is gated: accept its licence at {hub.url}/{EXPERT}, then " in message
    assert ("see that HF_TOKEN is of an account" if token else "set HF_TOKEN, or run `hf auth login`") in message


def test_a_token_opens_private_and_gated_models_and_goes_to_the_hub_alone(
    hub: Hub,
    config: Path,
    local: dict[str, bytes | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.repositories[BASE].private = hub.repositories[EXPERT].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for out, *args in (["streamed", "--stream"], ["downloaded"]):
        assert TOKEN not in json.dumps(data(config, tmp_path / out, *args))
        assert written(tmp_path / out) == local
    authorized = {(request.server, "Authorization" in request.headers) for request in hub.requests} | {
        (request.server, "authorization" in request.headers) for request in hub.requests
    }
    assert ("cdn", True) not in authorized
    assert any(request.server == "cdn" for request in hub.requests)


def test_offline_weights_that_are_not_in_the_cache_are_missed_there(
    hub: Hub, config: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert moeplan(config, "--plan").status == 0  # which has configs come
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(config) == (
        f"{config}:1: base_model: {BASE}: has none of model.safetensors, model.safetensors.index.json, "
        f"pytorch_model.bin, pytorch_model.bin.index.json; not all of it is in the cache, {cache}, and HF_HUB_OFFLINE "
        "is set"
    )


def test_downloads_that_overlap_are_all_over_http_and_leave_the_setting_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    first, second = ExitStack(), ExitStack()
    first.enter_context(plainly)
    second.enter_context(plainly)
    first.close()
    assert constants.HF_HUB_DISABLE_XET is True
    second.close()
    assert constants.HF_HUB_DISABLE_XET is False


def test_a_model_without_files_is_named(hub: Hub, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    hub.add("org/empty", tmp_path / "empty")
    config = write_config(tmp_path / "config.yml", BASE, [BASE, "org/empty"])
    assert refused(config).endswith(f"experts[1].source_model: org/empty: has no files on {hub.url}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": None}, "`model_type` must be text, not None"),
        ({"num_attention_heads": "x"}, "`num_attention_heads` is 'x'; it must be a whole number"),
        (
            {"rope_scaling": {"rope_type": "unheard-of", "factor": 2.0}},
            "RoPE scaling of type 'unheard-of' cannot be held",
        ),
    ],
)
def test_what_a_config_says_wrong_is_told_with_what_the_yaml_calls_the_model(
    hub: Hub, models: dict[str, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    shutil.copytree(models[BASE], tmp_path / "odd")
    file = tmp_path / "odd" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    hub.add("org/odd", tmp_path / "odd", "v1")
    config = write_config(tmp_path / "config.yml", "org/odd@v1", [BASE, EXPERT])
    assert f"org/odd@v1/config.json: {message}" in refused(config)


def test_what_an_adapter_says_wrong_is_told_with_what_the_yaml_calls_it(
    hub: Hub, models: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "lora").mkdir()
    save_file({}, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    hub.add("org/lora", tmp_path / "lora")
    config = write_config(tmp_path / "config.yml", BASE, [BASE, f"{EXPERT}+org/lora"])
    assert ": org/lora/adapter_config.json: `peft_type` is 'LOHA'" in refused(config)


def test_offline_what_is_not_in_the_cache_is_one_message(
    hub: Hub, config: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(config)
    assert message.endswith(
        f"base_model: {BASE}: is neither a directory nor in the cache, {cache}, and HF_HUB_OFFLINE is set"
    )
    assert hub.requests == []


def test_a_directory_that_was_meant_is_named_where_the_hub_has_no_such_model(
    hub: Hub, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "assistant").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "config.yml", models[BASE], [models[BASE], "models/assistent"])
    assert refused(config).endswith("; did you mean models/assistant?")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (
            "https://huggingface.co/mistralai/Mistral-7B-v0.1/tree/main?library=transformers",
            ", mistralai/Mistral-7B-v0.1",
        ),
        ("https://huggingface.co", ""),
        ("hf://mistralai/Mistral-7B-v0.1", ""),
        ("http://[::1", ""),
    ],
)
def test_a_model_called_by_its_address_is_refused_with_its_name(
    hub: Hub, models: dict[str, Path], tmp_path: Path, address: str, name: str
) -> None:
    config = write_config(tmp_path / "config.yml", models[BASE], [models[BASE], address])
    assert refused(config).endswith(f"{address}: is an address: a model on the Hub is named ORG/NAME{name}")


@pytest.mark.parametrize("address", ["http://[::1", "http://hub.example:99999"])
def test_an_address_that_is_none_is_one_message(config: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert f"base_model: {BASE}: HF_ENDPOINT is '{address}', which is no address (" in refused(config)


def test_an_address_with_a_password_is_refused_without_being_shown(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be shown with every file of the model, and published in moeplan.json."""
    monkeypatch.setenv("HF_ENDPOINT", "https://me:word@hub.example")
    message = refused(config)
    assert f"base_model: {BASE}: HF_ENDPOINT has a user's name in it" in message
    assert "word@" not in message


def test_a_hub_that_cannot_be_reached_is_one_message(hub: Hub, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    message = refused(config)
    assert f"base_model: {BASE}: http://127.0.0.1:9 cannot be reached, or breaks off (" in message
    assert "if this is meant as a directory, there is none" in message


def test_a_hub_that_takes_a_request_and_says_nothing_is_not_waited_for_without_end(
    hub: Hub, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeplan.hub.TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        set_endpoint(monkeypatch, url)
        assert f"base_model: {BASE}: {url} cannot be reached, or breaks off ('timed out')" in refused(config)


@pytest.mark.parametrize("part", ["/api/models/org/base", "config.json", "model.safetensors"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again_when_planning(hub: Hub, config: Path, part: str, status: int) -> None:
    hub.faults.append(Fault("hub", part, status=status, headers={"Retry-After": "0"}))
    assert moeplan(config, "--plan").status == 0


def test_a_busy_hub_is_waited_for_as_long_as_it_says_or_longer_each_time(
    hub: Hub, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("moeplan.hub.Hub._pause", lambda self, seconds: pauses.append(seconds))
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 1)
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    limit = {"RateLimit": '"api";r=0;t=250', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    for asked in ({"Retry-After": "200"}, {"Retry-After": "1000"}, {"Retry-After": at}, limit):
        hub.faults.append(Fault("hub", "/api/models/org/base", status=429, headers=asked))
    unspent = {"RateLimit": '"api";r=499;t=250'}
    hub.faults.append(Fault("hub", "/api/models/org/base", status=425, headers=unspent))
    hub.faults.append(Fault("hub", "/api/models/org/base", status=503, times=patience.ATTEMPTS - 6))
    assert moeplan(config, "--plan").status == 0
    assert pauses[:2] == [200, patience.LONGEST_PAUSE_SECONDS]
    assert 60 < pauses[2] <= 100
    assert pauses[3] == 250
    assert all(2**failures / 2 <= pause <= 2**failures for failures, pause in enumerate(pauses[4:], 4))
    assert len(pauses) == patience.ATTEMPTS - 1


def test_an_error_without_an_answer_says_nothing_of_a_busy_hub() -> None:
    """huggingface_hub 0 has such: that a file is neither there nor in the cache."""
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = None
    assert not is_busy(error)
    assert not breaks_off(error)


def test_who_waits_for_long_is_told(hub: Hub, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.append(Fault("hub", "/api/models/org/base", status=429, headers={"Retry-After": "1"}))
    for module in ("moeplan.hub", "executor.remote"):
        monkeypatch.setattr(f"{module}.SILENT_SECONDS", 0.9)
    told = f"warning: {hub.url} is busy, or breaks off: it is asked again in 1 seconds"
    assert told in moeplan(config, "--plan").stderr
    # The first is of the plan, which reads the header alone.
    hub.faults.append(Fault("cdn", ".safetensors", status=429, headers={"Retry-After": "1"}, spared=3))
    assert told in moeplan(config, tmp_path / "out", "--stream").stderr


def test_a_hub_that_stays_busy_is_one_message(hub: Hub, config: Path) -> None:
    hub.faults.append(Fault("hub", "/api/models", status=503, headers={"Retry-After": "0"}, times=99))
    assert f"{hub.url} answers with HTTP 503: it is busy, try again later" in refused(config)


def test_connections_that_are_cut_change_nothing(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path
) -> None:
    planned = data(config, "--plan")["plan"]
    heads = hub.weights_moved()
    hub.faults.append(Fault("cdn", "model.safetensors", cut_after=10_001, times=8))
    hub.faults.append(Fault("cdn", "model.safetensors", status=503, headers={"Retry-After": "0"}, times=3))
    data(config, tmp_path / "streamed", "--stream")
    assert written(tmp_path / "streamed") == local
    assert hub.weights_moved() == 2 * heads + planned["read"]["nbytes"]
    hub.faults.append(Fault("cdn", "model.safetensors", cut_after=100_001, times=2))
    data(config, tmp_path / "downloaded")
    assert written(tmp_path / "downloaded") == local


def test_a_download_whose_connection_is_reset_is_begun_again_and_progress_says_so(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    data(config, "--plan")
    heads = hub.asked("cdn")
    hub.faults.append(Fault("cdn", "model.safetensors", cut_after=250_000, reset=True, spared=heads, times=4))
    plans: list[api.MergePlan] = []
    seen: list[Progress] = []
    api.merge(api.load_config(config), tmp_path / "out", api.Options(), plans.append, seen.append)
    assert written(tmp_path / "out") == local
    assert max(state.written_nbytes for state in seen) == plans[0].moved_nbytes


def test_a_download_that_breaks_off_for_good_says_so_and_can_be_gone_on_with(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # what huggingface_hub does before it goes on
    data(config, "--plan")
    heads = hub.asked("cdn")
    hub.faults.append(Fault("cdn", "model.safetensors", cut_after=10_001, spared=heads, times=FOREVER))
    ran = moeplan(config, tmp_path / "out")
    assert ran.status == 1
    assert f"{hub.url} cannot be reached, or breaks off (" in ran.error
    assert ran.error.endswith("files that came whole are kept: run the same command again to go on")
    hub.faults.clear()
    data(config, tmp_path / "out")
    assert written(tmp_path / "out") == local


@pytest.mark.parametrize("is_one_disk", [True, False])
def test_nothing_is_downloaded_where_there_is_no_space_for_it(
    hub: Hub, config: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, is_one_disk: bool
) -> None:
    """A byte too few are free; on one disk the output needs its space, too."""
    monkeypatch.setattr(fetching, "on_one_disk", lambda first, second: is_one_disk)
    planned = data(config, tmp_path / "out", "--plan", "--no-copy-tokenizer")["plan"]
    needed = planned["disk"]["needed_nbytes"] if is_one_disk else planned["hub"]["download_nbytes"]
    monkeypatch.setattr(fetching, "free_nbytes", lambda directory: needed - 1)
    ran = moeplan(config, tmp_path / "out", "--no-copy-tokenizer")
    assert ran.status == 1
    assert ran.error.startswith(
        f"{cache}: the models to download and what is made of them take {decimal(needed)}, and "
    )
    assert large_files(cache) == []
    monkeypatch.setattr(fetching, "free_nbytes", lambda directory: needed)
    assert moeplan(config, tmp_path / "out", "--no-copy-tokenizer").status == 0


def test_a_cache_on_a_full_disk_is_one_message(
    hub: Hub, config: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data(config, "--plan")

    def on_full_disk(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as writing to a file does, without its name

    monkeypatch.setattr(file_download, "http_get", on_full_disk)
    ran = moeplan(config, tmp_path / "out", "--no-copy-tokenizer")
    assert ran.status == 1
    assert f"/model.safetensors: cannot be stored: the disk of the cache, {cache}, is full; files that" in ran.error


def test_a_file_that_is_too_large_to_be_downloaded_is_refused_by_the_plan_and_can_be_streamed(
    hub: Hub, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 100_000)
    message = refused(config)
    assert f"{BASE}/model.safetensors: is larger than the 0 GB that can be downloaded: use --stream" in message
    assert message.endswith(f"or run `hf download {BASE}` first")
    assert moeplan(config, "--plan", "--stream").status == 0


def test_a_stream_that_loses_the_hub_for_good_goes_on_later_with_what_is_missing(
    hub: Hub, config: Path, local: dict[str, bytes | None], tmp_path: Path
) -> None:
    planned = data(config, "--plan", "--stream")["plan"]
    heads = hub.weights_moved()
    hub.faults.append(Fault("cdn", "", cut_after=0, spared=hub.asked("cdn") + 30, times=FOREVER))
    ran = moeplan(config, tmp_path / "out", "--stream")
    assert ran.status == 1
    assert "could not be read in 8 attempts: the connection was closed before anything came; " in ran.error
    assert ran.error.endswith("what is finished is kept: run the same command again to go on")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PARTIAL]
    before = hub.weights_moved()
    moved = before - 2 * heads
    hub.faults.clear()
    result = data(config, tmp_path / "out", "--stream")["result"]
    assert written(tmp_path / "out") == local
    assert hub.weights_moved() - before - heads == result["read_nbytes"]
    assert result["read_nbytes"] < planned["read"]["nbytes"] - moved / 2  # what was under way when it ended is lost


def test_a_stream_whose_process_is_killed_goes_on_with_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    names, directories = large_models(hub, tmp_path, num_layers=1)
    config = write_config(tmp_path / "hub.yml", names[0], names)
    command = (config, tmp_path / "out", "--stream", "--max-memory", "512MiB", "--json")
    planned = data(config, "--plan", "--stream")["plan"]["read"]["nbytes"]
    heads = hub.weights_moved()
    busy = Fault("cdn", "", status=503, headers={"Retry-After": "300"}, spared=hub.asked("cdn") + 8, times=FOREVER)
    hub.faults.append(busy)
    process = start(*command, env=environment(hub, tmp_path))
    deadline = time.monotonic() + 60
    while FOREVER - busy.times < COPYING.workers:  # as many as ask at once: then nothing is under way any more
        assert process.poll() is None, outcome(process).stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    outcome(process)
    lost = hub.weights_moved() - 2 * heads
    hub.faults.clear()
    ran = outcome(start(*command, env=environment(hub, tmp_path)))
    assert ran.status == 0, ran.stderr
    result = json.loads(ran.stdout)["result"]
    missing = hub.weights_moved() - 3 * heads - lost
    assert 0 < lost < planned
    assert missing == result["read_nbytes"] == planned - lost
    assert moeplan(write_config(tmp_path / "local.yml", directories[0], directories), tmp_path / "local").status == 0
    for name, content in written(tmp_path / "local").items():
        assert content == (tmp_path / "out" / name).read_bytes(), name


def test_a_model_that_changes_while_it_is_streamed_is_refused_and_leaves_nothing(
    hub: Hub, config: Path, tmp_path: Path
) -> None:
    def change(plan: api.MergePlan) -> None:
        hub.salt = "another"

    loaded = api.load_config(config)
    with pytest.raises(
        api.UserError, match=r"model.safetensors: the file was changed since the merge was planned"
    ) as e:
        api.merge(loaded, tmp_path / "out", api.Options(stream=True), on_plan=change)
    assert e.value.exit_status == 1
    assert not (tmp_path / "out").exists()


def test_a_download_that_fails_is_one_message_and_leaves_nothing(
    hub: Hub, config: Path, tmp_path: Path, cache: Path
) -> None:
    def break_down(plan: api.MergePlan) -> None:
        hub.faults.append(Fault("cdn", "model.safetensors", status=404, times=99))

    with pytest.raises(api.UserError, match=r"/model.safetensors: .* answers with HTTP 404") as e:
        api.merge(api.load_config(config), tmp_path / "out", on_plan=break_down)
    assert e.value.exit_status == 1
    assert not (tmp_path / "out").exists()
    assert large_files(cache) == []


@pytest.mark.parametrize("stream", [False, True])
def test_progress_goes_from_nothing_to_all_that_is_moved(hub: Hub, config: Path, tmp_path: Path, stream: bool) -> None:
    plans: list[api.MergePlan] = []
    seen: list[Progress] = []
    options = api.Options(stream=stream)
    api.merge(api.load_config(config), tmp_path / "out", options, plans.append, seen.append)
    moved = [state.written_nbytes for state in seen]
    assert moved == sorted(moved)
    assert moved[-1] == plans[0].moved_nbytes
    assert {state.doing for state in seen} >= {"fetching", "", "syncing"}
    fetched = [state.written_nbytes for state in seen if state.doing == "fetching"]
    assert (fetched[0], fetched[-1]) == (sum(plans[0].missing.values()), plans[0].download_nbytes)


def test_files_that_no_honest_model_has_are_refused_before_they_are_fetched(
    hub: Hub, tmp_path: Path, models: dict[str, Path], cache: Path
) -> None:
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_bytes(b" " * (2 * MIB))
    (evil / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    hub.add("org/evil", evil)
    config = write_config(tmp_path / "config.yml", BASE, [BASE, "org/evil"])
    assert "org/evil/config.json: is larger than 1,048,576 bytes" in refused(config)
    assert hub.moved["config.json"] < 100_000
    (evil / "config.json").write_bytes((models[BASE] / "config.json").read_bytes())
    hub.salt = "corrected"
    assert "its header would take 1,099,511,627,776 bytes" in refused(config)


def test_a_tokenizer_on_the_hub_that_is_a_sentencepiece_model_alone_is_known_without_being_fetched(
    hub: Hub, models: dict[str, Path], configure: Callable[..., Any], tmp_path: Path
) -> None:
    slow = shutil.copytree(models[BASE], tmp_path / "slow")
    (slow / "tokenizer.json").rename(slow / "tokenizer.model")
    hub.add("org/slow", slow)
    for base, expected in (("org/slow", "LlamaTokenizer"), (BASE, "PreTrainedTokenizerFast")):
        config, options = configure(base, [EXPERT] * 2, architecture="deepseek")
        assert api.plan(config, options=options).model_config["tokenizer_class"] == expected
    config, options = configure("org/slow", [EXPERT] * 2)
    with pytest.warns(api.MoeplanWarning, match="org/slow has a tokenizer.model and no tokenizer.json"):
        api.plan(config, options=options)
    assert hub.moved["tokenizer.model"] == hub.moved["tokenizer.json"] == 0


def test_a_tokenizer_of_more_than_prompts_are_read_with_is_refused_before_it_is_fetched(
    hub: Hub, tmp_path: Path, models: dict[str, Path]
) -> None:
    large = shutil.copytree(models[BASE], tmp_path / "large")
    os.truncate(large / "tokenizer.json", MAX_READ_NBYTES + 1)
    hub.add("org/large", large)
    experts = ["org/large", EXPERT]
    config = write_config(tmp_path / "config.yml", "org/large", experts, gate_mode="cheap_embed")
    assert f"org/large/tokenizer.json: is larger than {MAX_READ_NBYTES:,} bytes" in refused(config)
    assert hub.moved["tokenizer.json"] == 0
    assert moeplan(write_config(tmp_path / "random.yml", "org/large", experts), "--plan").status == 0


def test_a_model_without_weights_on_the_hub_is_refused_by_what_it_holds(
    hub: Hub, tmp_path: Path, models: dict[str, Path]
) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").touch()
    hub.add("org/gguf", tmp_path / "gguf")
    message = refused(write_config(tmp_path / "config.yml", BASE, [BASE, "org/gguf"]))
    assert "org/gguf: has none of model.safetensors" in message
    assert "there is 'model.gguf': give the model that the GGUF was converted from" in message


@pytest.mark.parametrize("args", [["--stream"], []])
def test_a_merge_of_models_on_the_hub_keeps_its_memory_cap(hub: Hub, tmp_path: Path, args: list[str]) -> None:
    names, _ = large_models(hub, tmp_path, num_layers=4)
    config = write_config(tmp_path / "config.yml", names[0], names)
    command = (config, tmp_path / "out", "--max-memory", "512MiB", "--json", *args)
    ran = outcome(start(*command, code=MEASURED, env=environment(hub, tmp_path)))
    assert ran.status == 0, ran.stderr
    peak_nbytes = 1024 * int(ran.stderr.split()[-2])
    told = json.loads(ran.stdout)
    assert told["plan"]["hub"]["nbytes"] > 500_000_000
    assert peak_nbytes <= 512 * MIB
    assert peak_nbytes <= told["plan"]["memory"]["forecast_nbytes"]


@pytest.mark.parametrize(("args", "buffers"), [(["--stream"], 2), ([], 40)])
def test_the_smallest_cap_that_works_holds_while_models_are_downloaded(
    hub: Hub, tmp_path: Path, args: list[str], buffers: int
) -> None:
    names, _ = large_models(hub, tmp_path, num_layers=2)
    command = (write_config(tmp_path / "config.yml", names[0], names), tmp_path / "out", "--quiet", *args)
    env = environment(hub, tmp_path)
    refused = outcome(start(*command, "--max-memory", "1MiB", code=MEASURED, env=env))
    smallest = int(re.search(r"the smallest that works is --max-memory (\d+)MiB", refused.stderr)[1])
    assert f"{buffers} MiB for buffers" in refused.stderr
    ran = outcome(start(*command, "--max-memory", f"{smallest}MiB", code=MEASURED, env=env))
    assert ran.status == 0, ran.stderr
    assert 1024 * int(ran.stderr.split()[-2]) <= smallest * MIB
