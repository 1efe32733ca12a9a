"""Write GPT-2's tokenizer to a directory, from the vocabulary that llama.cpp's source holds for its own tests.

llama.cpp's converter takes a byte-level tokenizer only if it is one that it knows, so a made-up one will not do.
Runs in the environment that `make test-gguf` installs.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

sys.path.insert(0, str(Path(sys.prefix) / "source" / "vendor" / "llama.cpp" / "gguf-py"))
from gguf import GGUFReader  # found on the path that the line above extends

VOCABULARY = Path(sys.prefix) / "source" / "vendor" / "llama.cpp" / "models" / "ggml-vocab-gpt-2.gguf"
END_OF_TEXT = "<|endoftext|>"


def main(directory: Path) -> None:
    fields = GGUFReader(VOCABULARY).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=True)])
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
