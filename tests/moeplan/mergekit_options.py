"""The options of mergekit-moe, as its own command line declares them.

Run by the Python of an environment with mergekit, this prints them as JSON. `OPTIONS` is what 0.1.5 prints.
"""

import json


def declared() -> dict[str, str]:
    """Each spelling of each option, and what it takes: a value's type, or nothing (flag, count)."""
    from mergekit.scripts.moe import main

    return {
        spelling: "flag" if option.is_flag else "count" if option.count else option.type.name
        for option in main.params
        if option.param_type_name == "option"
        for spelling in (*option.opts, *option.secondary_opts)
    }


OPTIONS = {
    "--load-in-4bit": "flag",
    "--load-in-8bit": "flag",
    "--i-understand-this-is-not-useful-without-training": "flag",
    "--allow-crimes": "flag",
    "--no-allow-crimes": "flag",
    "--unsafe-truncate-embeddings": "flag",
    "--no-unsafe-truncate-embeddings": "flag",
    "--transformers-cache": "text",
    "--lora-merge-cache": "text",
    "--lora-merge-dtype": "text",
    "--cuda": "flag",
    "--no-cuda": "flag",
    "--device": "text",
    "--low-cpu-memory": "flag",
    "--no-low-cpu-memory": "flag",
    "--out-shard-size": "size",
    "--copy-tokenizer": "flag",
    "--no-copy-tokenizer": "flag",
    "--clone-tensors": "flag",
    "--no-clone-tensors": "flag",
    "--trust-remote-code": "flag",
    "--no-trust-remote-code": "flag",
    "--random-seed": "integer",
    "--lazy-unpickle": "flag",
    "--no-lazy-unpickle": "flag",
    "--write-model-card": "flag",
    "--no-write-model-card": "flag",
    "--safe-serialization": "flag",
    "--no-safe-serialization": "flag",
    "-v": "count",
    "--quiet": "flag",
    "--no-quiet": "flag",
    "--read-to-gpu": "flag",
    "--no-read-to-gpu": "flag",
    "--multi-gpu": "flag",
    "--no-multi-gpu": "flag",
    "--num-threads": "integer",
    "-j": "integer",
    "--gpu-rich": "flag",
    "--async-write": "flag",
    "--no-async-write": "flag",
    "--write-threads": "integer",
}

if __name__ == "__main__":
    print(json.dumps(declared(), indent=4))
