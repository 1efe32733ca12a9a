"""What it takes to add a gate mode."""

from pathlib import Path

import pytest
from commands import MAIN, outcome, sparse_llama, start, write_config

from moeplan.gate_modes import MODES
from moeplan.gates import GateMode, gate_mode

# It has the kernels of random routers.
NEW_MODE = """\
import sys, types
from moeplan import gate_modes
gate_modes.MODES["new"] = gate_modes.ModeSpec("new", reads_text=False)

from dataclasses import replace
from moeplan.gates import GateMode, random
module = types.ModuleType("moeplan.gates.new")
module.MODE = GateMode(lambda request: random.routers(replace(request, mode="random")), random.MODE.kernels, imports=())
sys.modules[module.__name__] = module
"""


def test_a_new_mode_is_a_file_and_an_entry(tmp_path: Path) -> None:
    models = [sparse_llama(tmp_path / name) for name in ("base", "other")]
    experts = [{"source_model": model, "positive_prompts": []} for model in models]
    config = write_config(tmp_path / "config.yml", models[0], experts, gate_mode="new")
    merged = outcome(start(config, tmp_path / "out", code=NEW_MODE + MAIN))
    assert (merged.status, (tmp_path / "out" / "config.json").exists()) == (0, True), merged.stderr
    wrong = write_config(tmp_path / "wrong.yml", models[0], models, gate_mode="news")
    message = outcome(start(wrong, "--plan", code=NEW_MODE + MAIN)).error
    assert message.endswith(
        "gate_mode: must be hidden, hidden_avg, hidden_last, ridge, cheap_embed, random, "
        'uniform_random or new, not "news", did you mean new?'
    )


@pytest.mark.parametrize("name", MODES)
def test_each_mode_has_a_file(name: str) -> None:
    assert isinstance(gate_mode(name), GateMode)
