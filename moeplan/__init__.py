"""moeplan: a DAG-planned streaming tensor compiler for Mixture-of-Experts merges.

    import moeplan

    config = moeplan.load_config("config.yml")
    print(moeplan.plan(config).disk_nbytes)
    moeplan.merge(config, "out", moeplan.Options(max_memory="2GiB"))

What is wrong with the input is a `UserError` whose message says what to do; what only deserves a word is a
`MoeplanWarning`.
"""

from moeplan.config import Expert, MergeConfig, load_config
from moeplan.errors import MoeplanWarning, UserError
from moeplan.merging import MergePlan, MergeResult, merge, plan
from moeplan.options import Options

__all__ = [
    "Expert",
    "MergeConfig",
    "MergePlan",
    "MergeResult",
    "MoeplanWarning",
    "Options",
    "UserError",
    "load_config",
    "merge",
    "plan",
]
