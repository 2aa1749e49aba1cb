"""Keeps torch's compiler out of the imports of commands that compile nothing.

Two modules import torch._dynamo whenever torchvision or timm is imported, and with it sympy, torch._inductor and FSDP:
about half of the time of all imports. Neither needs it until the functions that use it are called.

The command line uses this module before torch is loaded, so it imports torch by name, within the functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
UTILITIES = f"{COMPILER}.utils"


def defer_compiler() -> None:
    """Let torchvision and timm be imported without torch._dynamo, which is then imported where it is used.

    Call it before they are imported; it changes nothing for modules that are imported already, and nothing if
    torch._dynamo is.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules of DEFERRING and gives them a loader with a context."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec with another loader; None for other modules."""
        if fullname not in DEFERRING or COMPILER in sys.modules:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        return spec_from_file_location(fullname, spec.origin, loader=_Loader(fullname, spec.loader.path))


class _Loader(SourceFileLoader):
    """Executes a module within its context of DEFERRING."""

    def exec_module(self, module: ModuleType) -> None:
        """As SourceFileLoader's."""
        with DEFERRING[module.__name__]():
            super().exec_module(module)


@contextmanager
def _placeholder() -> Iterator[None]:
    """A context in which a placeholder stands for torch._dynamo.utils."""
    placeholder = ModuleType(UTILITIES)

    def is_compile_supported(device_type: str) -> bool:
        return bool(import_module(UTILITIES).is_compile_supported(device_type))

    placeholder.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    sys.modules[UTILITIES] = placeholder
    try:
        yield
    finally:
        del sys.modules[UTILITIES]


@contextmanager
def _lazy_disable() -> Iterator[None]:
    """A context in which `torch.compiler.disable` is torch's own decorator, which imports the compiler when called."""
    torch = import_module("torch")
    disable = torch.compiler.disable
    torch.compiler.disable = getattr(torch, "_disable_dynamo", disable)
    try:
        yield
    finally:
        torch.compiler.disable = disable


DEFERRING: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "torchvision.ops.roi_align": _placeholder,  # imports one function, for box operators on a GPU
    "timm.layers.typing": _lazy_disable,  # the decorator is used at the import of timm.models.naflexvit
}


@contextmanager
def without_compiler() -> Iterator[None]:
    """A context for the meta device, whose operators in Python ask torch._dynamo not to compile them.

    A stand-in answers that, so that the module need not be imported; whoever asks it for anything else gets the real
    one. Nothing of the stand-in is left afterwards.
    """
    if COMPILER in sys.modules:
        yield
        return
    stand_in = _StandIn(COMPILER)
    sys.modules[COMPILER] = stand_in
    try:
        yield
    finally:
        stand_in.remove()


class _StandIn(ModuleType):
    """torch._dynamo with one function, until something else of it is used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.passed: list[Any] = []

    def disable(self, fn: Any, *_args: Any, **_settings: Any) -> Any:
        """The function as it is: nothing is compiled here."""
        self.passed.append(fn)
        return fn

    def remove(self) -> None:
        """Let the next import be of the real module, and torch ask that one about the functions that came here."""
        for fn in self.passed:
            vars(fn).pop("__dynamo_disable", None)  # where torch._compile keeps the answer
        self.passed.clear()
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # such as inspect's question for __file__
            raise AttributeError(name)
        self.remove()
        return getattr(import_module(COMPILER), name)
