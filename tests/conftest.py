"""Fixtures that make checkpoints, and that merge as a user does: from a YAML file, through the Python API."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Models this small gain nothing from threads, and test workers that fight for cores lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(recipe, seed=0)`: the directory of a checkpoint, made on first use. Tests must not write to it."""
    from models import RECIPES, save_checkpoint  # here, because transformers takes seconds that few tests need

    root = tmp_path_factory.mktemp("checkpoints")

    def make(recipe: str, seed: int = 0) -> Path:
        path = root / f"{recipe}-{seed}"
        if not path.exists():
            save_checkpoint(RECIPES[recipe], path, seed)
        return path

    return make


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., Path]:
    """`merge(base, experts, **settings)`: the directory of a merged model.

    An expert is a source's path or a mapping as in the YAML. A setting that `moeplan.Options` has is an option, every
    other is a key of the YAML.
    """
    import moeplan

    option_names = moeplan.Options.__dataclass_fields__

    def run(base: Path, experts: list[Path | dict[str, Any]], **settings: Any) -> Path:
        number = len(list(tmp_path.glob("*.yml")))
        config, out = tmp_path / f"{number}.yml", tmp_path / f"out-{number}"
        options = {key: settings.pop(key) for key in list(settings) if key in option_names}
        entries = [expert if isinstance(expert, dict) else {"source_model": expert} for expert in experts]
        document = {"base_model": base, "gate_mode": "random", "experts": entries, **settings}
        config.write_text(json.dumps(document, default=str))  # JSON is YAML
        moeplan.merge(moeplan.load_config(config, allow_all_same=True), out, moeplan.Options(**options))
        return out

    return run
