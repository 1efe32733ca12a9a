"""Getting torch ready while bytes move."""

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import planned, source

from executor import chunk_ops
from executor.engine import RunResult, run
from executor.torch_threads import TorchThreads
from planner.expr import Opaque, add_low_rank

PROGRAM = """
import sys
from pathlib import Path
from executor.torch_threads import open_library
open_library()
print("libtorch_cpu" in Path("/proc/self/maps").read_text(), "torch" in sys.modules)
import torch
print(torch.ones(3).sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what code a process has loaded")
def test_torch_s_library_is_loaded_without_an_import_which_would_stop_all_threads() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False", "3.0"]


def load(tmp_path: Path, module: str) -> None:
    """Load a module as a run does that uses it, in the background, and wait for that."""
    read = source(tmp_path / "model.safetensors", {"x": torch.ones(4)})["x"]
    plan = planned({"y": Opaque("kernel", "{}", (read,), read.dtype, read.shape)})
    TorchThreads(plan, 1, (module,))
    for thread in threading.enumerate():
        if thread.name == "import torch":
            thread.join()


def test_a_product_is_computed_where_nothing_was_to_be_imported(tmp_path: Path) -> None:
    shapes = {"weight": (64, 32), "b": (64, 2), "a": (2, 32)}
    reads = source(tmp_path / "source.safetensors", {name: torch.ones(*shape) for name, shape in shapes.items()})
    plan = planned({"sum": add_low_rank(reads["weight"], reads["b"], reads["a"], 1.0)})
    done: list[RunResult] = []
    running = threading.Thread(target=lambda: done.append(run(plan, tmp_path, imports=())), daemon=True)
    running.start()
    running.join(20)
    assert [result.written_nbytes for result in done] == [plan.written_nbytes]


def test_each_worker_computes_products_in_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or as many threads as there are cores would work on each of the chunks under way."""
    shapes = {"weight": (64, 32), "b": (64, 2), "a": (2, 32)}
    reads = source(tmp_path / "source.safetensors", {name: torch.ones(*shape) for name, shape in shapes.items()})
    plan = planned({"sum": add_low_rank(reads["weight"], reads["b"], reads["a"], 1.0)})
    asked_for: dict[int, int] = {}
    seen: list[int | None] = []
    add_product = chunk_ops.add_product

    def noting(*args: Any) -> None:
        seen.append(asked_for.get(threading.get_ident()))
        add_product(*args)

    monkeypatch.setattr(torch, "set_num_threads", lambda count: asked_for.update({threading.get_ident(): count}))
    monkeypatch.setattr(chunk_ops, "add_product", noting)
    run(plan, tmp_path, threads=4)
    assert seen == [1]


def test_what_cannot_be_loaded_in_the_background_says_so_where_it_is_used_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_torch.py").write_text("raise OSError('libcublas.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    unhandled: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    load(tmp_path, "broken_torch")
    assert unhandled == []


def test_a_kernel_s_import_that_fails_in_the_background_meanwhile_is_told_by_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python gives a thread that waits for it what there is of the module, so that a name would be missing."""
    (tmp_path / "slow_and_broken.py").write_text(
        "import time; time.sleep(0.3); raise ImportError('libgomp.so.1: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    read = source(tmp_path / "model.safetensors", {"x": torch.ones(4)})["x"]
    plan = planned({"y": Opaque("kernel", "{}", (read,), read.dtype, read.shape)})

    def kernel(params: Any, inputs: Any, output: torch.Tensor) -> None:
        from slow_and_broken import function

        function(output)

    with pytest.raises(ImportError, match=r"^libgomp\.so\.1: cannot open shared object file$"):
        run(plan, tmp_path, {"kernel": kernel}, imports=("torch", "slow_and_broken"))


@pytest.mark.parametrize("collects", [True, False])
def test_loading_leaves_the_garbage_collector_as_it_was(tmp_path: Path, collects: bool) -> None:
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    if not collects:
        gc.disable()
    try:
        load(tmp_path, "torch")
        assert (gc.isenabled(), gc.get_freeze_count()) == (collects, 0)
    finally:
        gc.enable()


def test_what_was_exempt_from_collection_before_loading_stays_so(tmp_path: Path) -> None:
    gc.freeze()
    try:
        load(tmp_path, "torch")
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
