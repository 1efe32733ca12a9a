"""Makes the models of the table's rows, with the programs' command lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Program
from benchmarks.measure import Limits, measure
from benchmarks.programs import Programs
from benchmarks.results import Measurement
from benchmarks.routing.rows import Given, Row
from benchmarks.routing.settings import Settings, file_name
from benchmarks.routing.tokens import ANYWHERE, BEGINNINGS, Corpus, prompts
from benchmarks.routing.training import Models

LIMIT_SECONDS = 600.0
KEEP_FREE_NBYTES = 10**9


@dataclass(frozen=True, slots=True)
class Merge:
    """A row's merge of one variant with one seed."""

    row: Row
    variant: str
    seed: int


@dataclass(frozen=True, slots=True)
class Workshop:
    """All that merges are made of. `directory` is for their configs, and for the experts' text."""

    directory: Path
    settings: Settings
    corpus: Corpus
    models: Models
    programs: Programs

    def merge(self, merge: Merge, out: Path) -> Measurement:
        """Write the merged model to `out`, which must not be there."""
        config = self.directory / "merge.yml"
        config.write_text(json.dumps(self._config(merge), indent=2), encoding="utf-8")  # JSON is YAML
        mergekit = merge.row.program is Program.MERGEKIT
        program = self.programs.mergekit if mergekit else self.programs.moeplan
        argv = [str(program), "--quiet", "--random-seed", str(merge.seed), str(config), str(out)]
        limits = Limits(self.directory, LIMIT_SECONDS, KEEP_FREE_NBYTES)
        return measure(argv, out, self.directory / "merge", limits)

    def _config(self, merge: Merge) -> dict[str, Any]:
        """The YAML: nothing but what the row needs, since mergekit-moe passes over keys that it does not know."""
        row = merge.row
        config: dict[str, Any] = {
            "base_model": str(self.models.base),
            "gate_mode": row.gate_mode,
            "dtype": "float32",
            "experts_per_token": 2,
        }
        if row.backbone != "base":
            config["backbone"] = row.backbone
        if row.given is Given.FILE:
            config["gate_tokens"] = self.settings.gate_tokens
        config["experts"] = [
            {"source_model": str(expert), **self._given(merge, number)}
            for number, expert in enumerate(self.models.experts[merge.variant])
        ]
        return config

    def _given(self, merge: Merge, expert: int) -> dict[str, Any]:
        """What the entry of an expert says beside its model."""
        text = self.corpus.texts[expert]
        match merge.row.given:
            case Given.NOTHING:
                return {}
            case Given.SAMPLES:
                return {"positive_samples": self.settings.num_samples}
            case Given.FILE:
                file = self.directory / f"{file_name(text.domain)}.txt"
                file.write_text("".join(text.train), encoding="utf-8")
                return {"positive_files": [str(file)]}
            case Given.BEGINNINGS | Given.PASSAGES as given:
                after = BEGINNINGS if given is Given.BEGINNINGS else ANYWHERE
                return {"positive_prompts": prompts(text, self.corpus.tokenizer, self.settings, merge.seed, after)}
