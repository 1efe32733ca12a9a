"""How large everything is: the text, the models, how long they are trained, and what they are judged by."""

from __future__ import annotations

from dataclasses import dataclass

DOMAINS = ("Python", "C++", "English", "YAML")

VARIANTS = ("MLPs", "all weights")
"""What of an expert is trained. Everything that is not an MLP is the base's in the first."""


def file_name(name: str) -> str:
    """A name for files: in the name of a model, what follows a plus is an adapter."""
    return name.lower().replace("+", "p").replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Settings:
    """`domain_chars` of text a domain, of which the share `held_out` is never trained on.

    A window is what models are trained on and judged by: the BOS token and the `window` - 1 tokens of a text after it.
    An expert's prompts are `num_prompts` texts of `prompt_tokens` tokens, its passages `gate_tokens` tokens of the
    domain's text, its samples `num_samples` texts that it writes itself. Training has `num_cores` threads at work.
    """

    domain_chars: int = 720_000
    held_out: float = 0.2
    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 6
    num_heads: int = 6
    num_key_value_heads: int = 6
    window: int = 256
    batch: int = 8
    base_steps: int = 800
    base_learning_rate: float = 2e-3
    expert_steps: int = 40
    expert_learning_rate: float = 1e-3
    num_windows: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    num_prompts: int = 8
    prompt_tokens: int = 32
    gate_tokens: int = 4096
    num_samples: int = 16
    num_cores: int = 2
    variants: tuple[str, ...] = VARIANTS


FULL = Settings()

SMOKE = Settings(
    domain_chars=60_000,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    window=64,
    batch=4,
    base_steps=3,
    expert_steps=2,
    num_windows=4,
    seeds=(0,),
    num_prompts=2,
    prompt_tokens=8,
    gate_tokens=256,
    num_samples=2,
    num_cores=1,
    variants=VARIANTS[1:],
)
"""That everything runs, in less than a minute; every row is one of the variant where all weights are trained."""
