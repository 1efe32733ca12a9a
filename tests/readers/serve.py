"""The far end of a reader: a process that answers each request, a line of JSON, with a line of JSON.

A request names a model's directory, token ids, and the file to save the logits to. The answer is `{}`, or an `error`.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np


def serve(compute_logits: Callable[[Path, list[int]], np.ndarray]) -> None:
    """Answer requests on stdin until it ends. `compute_logits` returns `[num_tokens, vocab_size]`, or raises."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        answer = {}
        try:
            np.save(request["logits"], compute_logits(Path(request["model"]), request["tokens"]))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
