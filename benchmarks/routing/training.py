"""Trains the base on all domains, and from it, in each variant, an expert for each domain.

All is seeded, and so many threads are at work whatever the machine has, so that it makes the same models each time: all
for the base, one for each of as many experts at a time. They are kept: under the digest of what they follow from, this
file included.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.prompts import save_tokenizer
from benchmarks.routing.settings import VARIANTS, Settings, file_name
from benchmarks.routing.tokens import BOS, Corpus, Ids, with_bos

disable_progress_bar()

SEED = 40_000
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
WARMUP_SHARE = 0.1
CONTEXT = 256
"""What the models are made for. Passages and samples that routers are made from are no longer than that."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Models:
    """Where the checkpoints are: `experts[variant]` has one for each domain."""

    base: Path
    experts: dict[str, tuple[Path, ...]]


def trained_models(corpus: Corpus, settings: Settings, directory: Path, say: Say) -> Models:
    """The checkpoints below `directory`, trained where they are not there yet."""
    root = directory / _key(corpus, settings)
    base = root / "base"
    experts = {
        variant: tuple(root / file_name(f"{text.domain} {variant}") for text in corpus.texts)
        for variant in settings.variants
    }
    missing = [
        (path, base, tokens.train, variant, settings)
        for variant, paths in experts.items()
        for path, tokens in zip(paths, corpus.tokens, strict=True)
        if not path.exists()
    ]
    with _processes(settings.num_cores) as pool:
        if not base.exists():
            say("training the base")
            trains = [tokens.train for tokens in corpus.tokens]
            pool.submit(_make_base, base, trains, corpus.tokenizer.to_str(), settings).result()
        made = [pool.submit(_make_expert, *expert) for expert in missing]
        for done, future in enumerate(as_completed(made), start=1):
            future.result()
            say(f"trained {done} of {len(missing)} experts")
    return Models(base, experts)


@contextmanager
def _processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes to train in, since torch's number of threads is a process's. They end with who waits for them, also on
    an interruption, which is for nobody else."""
    context, ignored = get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(number, context, initializer=signal.signal, initargs=ignored) as pool:
        try:
            yield pool
        except BaseException:
            for process in active_children():
                process.kill()
            raise


def _key(corpus: Corpus, settings: Settings) -> str:
    """Changes where another model would be trained."""
    judged = replace(settings, seeds=(), num_prompts=0, prompt_tokens=0, gate_tokens=0, num_samples=0, variants=())
    code = Path(__file__).read_text(encoding="utf-8")
    parts = (corpus.tokenizer.to_str(), repr(judged), torch.__version__, transformers.__version__, code)
    whole = hashlib.sha256("\n".join(parts).encode())
    for tokens in corpus.tokens:
        whole.update(tokens.train.tobytes())
    return whole.hexdigest()[:16]


def _make_base(path: Path, texts: list[Ids], tokenizer: str, settings: Settings) -> None:
    torch.set_num_threads(settings.num_cores)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    _train(model, list(model.parameters()), texts, settings, settings.base_steps, settings.base_learning_rate)
    _save(model, Tokenizer.from_str(tokenizer), path)


def _make_expert(path: Path, base: Path, tokens: Ids, variant: str, settings: Settings) -> None:
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(variant != VARIANTS[0] or ".mlp." in name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps, learning_rate = settings.expert_steps, settings.expert_learning_rate
    _train(model, parameters, [tokens], settings, steps, learning_rate, decays=True)
    _save(model, Tokenizer.from_file(str(base / "tokenizer.json")), path)


def _save(model: LlamaForCausalLM, tokenizer: Tokenizer, path: Path) -> None:
    """Whole, or not at all: a run may be stopped."""
    unfinished = path.with_name(f"{path.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    save_tokenizer(unfinished, tokenizer)
    unfinished.rename(path)


def _train(
    model: LlamaForCausalLM,
    parameters: list[torch.nn.Parameter],
    texts: list[Ids],
    settings: Settings,
    steps: int,
    learning_rate: float,
    *,
    decays: bool = False,
) -> None:
    """AdamW, with a warm-up, after which the learning rate stays or goes down to nothing, by a cosine. Each batch has
    windows from anywhere in each of the texts.

    The base's stays: as in Branch-Train-Merge (Li et al., 2022, arXiv 2208.03306), experts branch off a model that is
    being trained, and come to an end by themselves.
    """
    random = np.random.default_rng(SEED)
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    warmup = max(1, round(WARMUP_SHARE * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) if decays else 1.0),
    )
    model.train()
    for _ in range(steps):
        batch = torch.from_numpy(_batch(texts, settings, random))
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()


def _batch(texts: list[Ids], settings: Settings, random: np.random.Generator) -> Ids:
    """[batch, window]: windows that begin with the BOS token."""
    length = settings.window - 1
    rows = []
    for number in range(settings.batch):
        text = texts[number % len(texts)]
        start = random.integers(len(text) - length + 1)
        rows.append(text[start : start + length])
    return with_bos(np.stack(rows))
