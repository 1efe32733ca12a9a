"""A tokenizer, run in a process of its own with little memory and little time. This file is that process's program.

A tokenizer.json is a program from a stranger: one of a kilobyte can multiply a prompt until all memory is taken, and
what is wrong in it makes the library panic. So it is loaded and run behind limits, and whatever it does there is a
message to the process that asked. Only the standard library and tokenizers are imported (transformers, where there is
the sentencepiece model alone), so it starts in 50 ms.

A request is a JSON object on standard input:

    file                  a descriptor of tokenizer.json; without it, transformers reads `directory`
    own_code              beside `directory`: whether to run the tokenizer code that is in it
    tokenizer_class       beside `directory`, without its code: the tokenizer's class, where its own config names none
    texts                 what to tokenise
    bos_token             beside `file`: the token whose id is wanted, or null; then
    bos_of_class          the one that it is where the tokenizer does not work on bytes, or null
    listed_tokens         beside `file`: the arguments of tokens that stand in for those of tokenizer.json; then
    added_tokens          those of tokens to add where there is none of that text
    split_special_tokens  beside `file`: whether special tokens are split like other text
    seconds, data_nbytes  the most processor time and memory to take
    most_tokens           the most tokens to answer with

The answer is `{"tokens": [[id, ...], ...], "bos_id": id or null}` or `{"error": text}`.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

Encode = Callable[[str], list[int]]


class _TakesCodeError(Exception):
    """transformers has no class for the tokenizer, but the model's directory has code."""


def main() -> None:
    request = json.load(sys.stdin.buffer)
    # At the end of its time the process is killed, wherever it is; Python's own handlers would wait for the library.
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = request["data_nbytes"] if hard == resource.RLIM_INFINITY else min(request["data_nbytes"], hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = _answer(request)
    except _TakesCodeError:
        answer = {
            "error": "only code that comes with it can read it; if you trust that code, --trust-remote-code runs it; "
            "or load it once with transformers, and save it: that makes a tokenizer.json"
        }
    except BaseException as error:  # a panic of the library is no Exception
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # nothing here needs an orderly end, which takes the library a while


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    encode, bos_id = _fast(request) if "file" in request else _with_transformers(request)
    tokens: list[list[int]] = []
    room = request["most_tokens"]
    for text in request["texts"]:
        tokens.append(encode(text))
        room -= len(tokens[-1])
        if room < 0:
            raise ValueError(f"the prompts become more than {request['most_tokens']:,} tokens")
    return {"tokens": tokens, "bos_id": bos_id}


def _fast(request: dict[str, Any]) -> tuple[Encode, int | None]:
    from tokenizers import AddedToken, Tokenizer

    with open(request["file"], "rb") as file:
        content = file.read()
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.add_tokens([AddedToken(**token) for token in request["listed_tokens"]])
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([AddedToken(**token) for token in request["added_tokens"] if token["content"] not in there])
    tokenizer.encode_special_tokens = request["split_special_tokens"]
    bos = request["bos_token"] or (None if b'"ByteLevel"' in content else request["bos_of_class"])
    bos_id = None if bos is None else tokenizer.token_to_id(bos)
    if bos_id is not None and bos not in there:
        tokenizer.add_special_tokens([bos])
    return _whole(tokenizer), bos_id


def _with_transformers(request: dict[str, Any]) -> tuple[Encode, int | None]:
    from transformers import AutoTokenizer, PretrainedConfig

    own_code, config = request["own_code"], None
    if not own_code:
        # One without a model type: for Mistral's and others, transformers 5 takes no class that is named, but one that
        # leaves out the space before a text, which sentencepiece adds.
        config = PretrainedConfig.from_dict({"tokenizer_class": request["tokenizer_class"]})
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            request["directory"], config=config, local_files_only=True, trust_remote_code=own_code
        )
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise _TakesCodeError from None
        raise
    if own_code:  # which may go about it in a way of its own
        return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id
    return _whole(tokenizer.backend_tokenizer), tokenizer.bos_token_id


def _whole(tokenizer: Any) -> Encode:
    """`tokenizer` of the tokenizers library, without truncation and padding."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    main()
