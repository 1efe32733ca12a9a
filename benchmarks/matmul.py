"""The arithmetic of a decoder's linear layers, and nothing else: how fast this machine could evaluate prompts.

    python matmul.py TOKENS LAYERS OUTxIN...

multiplies `[TOKENS, IN]` by each matrix, `LAYERS` times over, in float32 and in bfloat16, and prints the seconds of
each: `{"float32": S, "bfloat16": S}`. torch is loaded before the clock starts.
"""

import json
import sys
import time

import torch


def seconds(dtype: torch.dtype, tokens: int, layers: int, shapes: list[tuple[int, int]]) -> float:
    """The time that `layers` layers of matrices of `shapes` take."""
    pairs = [(torch.randn(tokens, k).to(dtype), torch.randn(n, k).to(dtype)) for n, k in shapes]
    for x, weight in pairs:
        x @ weight.T  # the first product of a shape pays for choosing how to compute it
    started = time.perf_counter()
    for _ in range(layers):
        for x, weight in pairs:
            x @ weight.T
    return time.perf_counter() - started


def main() -> None:
    tokens, layers, *matrices = sys.argv[1:]
    shapes = [(int(n), int(k)) for n, k in (matrix.split("x") for matrix in matrices)]
    with torch.inference_mode():
        result = {
            name: seconds(dtype, int(tokens), int(layers), shapes)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
