"""How `moeplan --help` looks: options in groups, as people look for them, in 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from typer.core import TyperCommand

from moeplan.mergekit_flags import FLAGS, Fate

GROUPS = {
    "What to do": ("plan", "as_json", "verbose", "quiet", "show_version", "help"),
    "Memory and speed": ("max_memory", "num_threads", "device", "cuda", "gpu_rich", "max_device_memory"),
    "Output": ("out_shard_size", "expert_layout", "copy_tokenizer", "write_model_card", "clone_tensors"),
    "Interruptions": ("restart", "overwrite", "check_sources"),
    "Models on the Hub": ("stream", "transformers_cache"),
    "Gates and experts": ("random_seed", "load_in_8bit", "load_in_4bit", "trust_remote_code", "allow_all_same"),
}
"""The parameters of the command, by name, that each group shows, in this order."""

FROM_MERGEKIT = "From mergekit-moe (taken, and not needed here)"


class GroupedHelp(TyperCommand):
    """A command whose help has its options in `GROUPS`, and after them the flags of mergekit-moe that do nothing."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options. Every option that is not hidden is in a group."""
        parameters = {parameter.name: parameter for parameter in self.get_params(ctx)}
        arguments = [name for name, parameter in parameters.items() if parameter.param_type_name == "argument"]
        for title, names in ({"Arguments": tuple(arguments)} | GROUPS).items():
            records = [parameters[name].get_help_record(ctx) for name in names]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])
        with formatter.section(FROM_MERGEKIT):
            unneeded = [flag.spellings[0] for flag in FLAGS if flag.fate is Fate.UNNEEDED]
            indent = " " * formatter.current_indent
            lines = textwrap.wrap(" ".join(sorted(unneeded)), formatter.width - len(indent), break_on_hyphens=False)
            formatter.write("".join(f"{indent}{line}\n" for line in lines))
