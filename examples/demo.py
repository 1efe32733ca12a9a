"""What `make demo` runs: four small checkpoints are merged into one Mixtral, which then writes a line."""

import shutil
import subprocess
import sys
from pathlib import Path

from make_models import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

DEMO = Path(__file__).parents[1] / ".demo"
MOEPLAN = Path(sys.executable).parent / "moeplan"


def moeplan(*args: str) -> None:
    """Run moeplan in `DEMO`, after showing the command as one would type it."""
    print("\n$ moeplan", *args, flush=True)
    subprocess.run([MOEPLAN, *args], cwd=DEMO, check=True)


def main() -> None:
    """Make the experts, show the plan, merge, load, generate."""
    disable_progress_bar()
    shutil.rmtree(DEMO, ignore_errors=True)
    for seed, name in enumerate(("assistant", "doctor", "adventure", "german")):
        save_llama(DEMO / "models" / name, seed)

    moeplan("../examples/clown-car.yml", "--plan")
    moeplan("../examples/clown-car.yml", "out")

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "out")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "out")
    prompt = "The adventurer lit a torch"
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    print(f"\nWhat {type(model).__name__} makes of {prompt!r} (its weights are random, so it babbles):")
    print(repr(tokenizer.decode(tokens[0], skip_special_tokens=True)))


if __name__ == "__main__":
    main()
