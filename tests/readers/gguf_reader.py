"""Reads models as llama.cpp's users do: its own converter, unchanged, makes a GGUF file, and llama.cpp runs it.

Runs in the environment that `make test-gguf` installs, with llama.cpp's source beside the packages.
"""

import sys
import tempfile
from ctypes import c_void_p
from pathlib import Path

import llama_cpp
import numpy as np
from serve import serve

sys.path.insert(0, str(Path(sys.prefix) / "source" / "vendor" / "llama.cpp"))
import convert_hf_to_gguf  # found on the path that the line above extends

log: list[str] = []


@llama_cpp.llama_log_callback
def keep(level: int, text: bytes, user_data: c_void_p) -> None:
    log.append(text.decode(errors="replace"))


llama_cpp.llama_log_set(keep, None)


def convert(model: Path, gguf: Path) -> None:
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outtype", "f32", "--outfile", str(gguf)]
    convert_hf_to_gguf.main()


def compute_logits(model: Path, tokens: list[int]) -> np.ndarray:
    """llama.cpp's logits `[num_tokens, vocab_size]`, computed in float32 throughout."""
    with tempfile.TemporaryDirectory() as directory:
        gguf = Path(directory) / "model.gguf"
        convert(model, gguf)
        log.clear()
        try:
            llama = llama_cpp.Llama(
                str(gguf),
                n_ctx=len(tokens),
                n_batch=len(tokens),
                n_threads=1,
                logits_all=True,
                type_k=llama_cpp.GGML_TYPE_F32,  # by default the keys and values are kept in float16
                type_v=llama_cpp.GGML_TYPE_F32,
            )
        except ValueError as error:  # it only says that loading failed; the log says why
            raise RuntimeError("".join(line for line in log if "error" in line)) from error
        llama.eval(tokens)
        logits = llama.scores[: len(tokens)].copy()
        llama.close()
        return logits


if __name__ == "__main__":
    serve(compute_logits)
