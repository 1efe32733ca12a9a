"""What a YAML file may call a model."""

from pathlib import Path

import pytest

from moeplan.model_ref import ModelRef, parse_model_ref

TEXTS = {
    "models/base": ("models/base", None),
    "models/base+models/lora": ("models/base", "models/lora"),
    "org/base@v1.0+org/lora@main": ("org/base@v1.0", "org/lora@main"),
    # What has nothing on one side names one thing, which will be said not to be there.
    "base+": ("base+", None),
    "+lora": ("+lora", None),
    "+": ("+", None),
    # Of these directories exist c++, c++/base, c++/lora, and a+b+c.
    "c++/base": ("c++/base", None),
    "c++/base+c++/lora": ("c++/base", "c++/lora"),
    "c+++lora": ("c", "++lora"),
    "c+++c++/lora": ("c++", "c++/lora"),
    "a+b+c": ("a+b+c", None),
    "a+b+c+c++": ("a+b+c", "c++"),
    "x+y+z": ("x", "y+z"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_plus_parts_a_model_and_its_adapter_unless_it_is_in_a_path_that_exists(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c++/base", "c++/lora", "a+b+c"):
        Path(name).mkdir(parents=True)
    model, adapter = TEXTS[text]
    ref = parse_model_ref(text)
    assert ref == ModelRef(model, adapter)
    assert str(ref) == text
