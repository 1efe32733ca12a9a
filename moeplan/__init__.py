"""moeplan: a DAG-planned streaming tensor compiler for Mixture-of-Experts merges.

    import moeplan

    config = moeplan.load_config("config.yml")
    print(moeplan.plan(config).disk_nbytes)
    moeplan.merge(config, "out", moeplan.Options(max_memory="2GiB"))

What is wrong with the input is a `UserError` whose message says what to do; a run that fails, for a full disk, say, is
a `RunError`, which is one, too; what only deserves a word is a `MoeplanWarning`. (A `MergeConfig` that is made in
Python is pydantic's, and so are its errors.)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from executor.errors import RunError
    from moeplan.config import Expert, MergeConfig, load_config
    from moeplan.errors import MoeplanWarning, UserError
    from moeplan.merging import MergeResult, merge
    from moeplan.options import Options
    from moeplan.planning import MergePlan, plan
else:
    _MODULES = {
        "executor.errors": ("RunError",),
        "moeplan.config": ("Expert", "MergeConfig", "load_config"),
        "moeplan.errors": ("MoeplanWarning", "UserError"),
        "moeplan.merging": ("MergeResult", "merge"),
        "moeplan.options": ("Options",),
        "moeplan.planning": ("MergePlan", "plan"),
    }

    def __getattr__(name: str) -> Any:
        """Imports what is used, when it is: the command has to heed Ctrl-C before it imports all that."""
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                globals()[name] = getattr(import_module(module), name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """What is there also before it is imported: for `help`, and for a shell that completes names."""
        return sorted({*globals(), *__all__})


__all__ = [
    "Expert",
    "MergeConfig",
    "MergePlan",
    "MergeResult",
    "MoeplanWarning",
    "Options",
    "RunError",
    "UserError",
    "load_config",
    "merge",
    "plan",
]
