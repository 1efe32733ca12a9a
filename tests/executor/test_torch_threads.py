"""Getting torch ready while bytes move."""

import subprocess
import sys

import pytest

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
