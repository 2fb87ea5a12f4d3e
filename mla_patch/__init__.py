"""Swap the MLA kernels of an installed inference engine, without forking it.

``apply(*features)``, ``restore(*features)`` and ``report()`` are the whole programming interface;
kernels are documented on their own in ``mla_patch.kernels``. Nothing is imported until a name is used.
"""

TYPE_CHECKING = False  # typing itself would cost a millisecond in every interpreter
if TYPE_CHECKING:
    from typing import Any

    from mla_patch.startup import apply, report, restore

__version__ = "0.1.0"
# every word for "off"; mla_patch.pth has the same list, since a line that runs at every start cannot import
OFF = ("", "0", "off", "false", "no", "none", "disable", "disabled", "n", "f")
__all__ = ["__version__", "apply", "report", "restore"]


def __getattr__(name: str) -> "Any":
    if name in ("apply", "report", "restore"):
        from mla_patch import startup

        return getattr(startup, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
