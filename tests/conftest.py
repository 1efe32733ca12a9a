"""Fixtures that make checkpoints and file systems, and that merge as a user does: from YAML, through the Python API."""

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No test asks the real Hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("HF_TOKEN", None)

# Models this small gain nothing from threads, and test workers that fight for cores lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A script's background job ignores Ctrl-C, what nohup starts the end of its terminal; and so would the programs that
# tests start to send them that. What has a handler of its own starts programs that have none.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# How long an example takes is a matter of what else the machine does.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(recipe, seed=0)`: the directory of a checkpoint, made on first use. Tests must not write to it."""
    from models import MISFITS, RECIPES, save_checkpoint  # here, because transformers takes seconds that few tests need

    root = tmp_path_factory.mktemp("checkpoints")

    def make(recipe: str, seed: int = 0) -> Path:
        path = root / f"{recipe}-{seed}"
        if not path.exists():
            save_checkpoint((RECIPES | MISFITS)[recipe], path, seed)
        return path

    return make


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Any]:
    """`configure(base, experts, **settings)`: a merge's `MergeConfig`, through a YAML file, and its `Options`.

    An expert is a source's path or a mapping as in the YAML. A setting that `moeplan.Options` has is an option, every
    other is a key of the YAML.
    """
    import moeplan

    option_names = moeplan.Options.__dataclass_fields__

    def write(base: Path, experts: list[Path | dict[str, Any]], **settings: Any) -> Any:
        config = tmp_path / f"{len(list(tmp_path.glob('*.yml')))}.yml"
        options = {key: settings.pop(key) for key in list(settings) if key in option_names}
        entries = [expert if isinstance(expert, dict) else {"source_model": expert} for expert in experts]
        document = {"base_model": base, "gate_mode": "random", "experts": entries, **settings}
        config.write_text(json.dumps(document, default=str))  # JSON is YAML
        return moeplan.load_config(config, allow_all_same=True), moeplan.Options(**options)

    return write


@pytest.fixture
def merge(configure: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`merge(base, experts, **settings)`, as for `configure`: the directory of a merged model."""
    import moeplan

    def run(base: Path, experts: list[Path | dict[str, Any]], **settings: Any) -> Path:
        config, options = configure(base, experts, **settings)
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        moeplan.merge(config, out, options)
        return out

    return run


@pytest.fixture
def plan(configure: Callable[..., Any]) -> Callable[..., Any]:
    """`plan(base, experts, **settings)`, as for `configure`: the `MergePlan`."""
    import moeplan

    def run(base: Path, experts: list[Path | dict[str, Any]], **settings: Any) -> Any:
        config, options = configure(base, experts, **settings)
        return moeplan.plan(config, options=options)

    return run


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def reflinking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a real file system with reflinks, in a file behind a loop device."""
    mkfs = shutil.which(f"mkfs.{request.param}")
    if os.geteuid() != 0 or mkfs is None:
        pytest.skip(f"needs root and mkfs.{request.param}")
    place = tmp_path_factory.mktemp(request.param)
    image, mount = place / "image", place / "mount"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(512 << 20)
    subprocess.run([mkfs, "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a loop device here")
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """A low limit, which may be raised again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
