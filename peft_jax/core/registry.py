"""Registries: records that stand at the end of the files that they describe, found there.

A record is any object with a `name`. A file of one of the registry's packages holds it (or a tuple
of them) under the registry's attribute, an installed package offers it as an entry point of the
registry's group, and a program hands it to `register`.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Generic, Protocol, TypeVar

logger = logging.getLogger("peft_jax")


class Record(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Record)


class Registry(Mapping[str, R], Generic[R]):
    """name -> record, filled when it is first read.

    `kind` is what a record is called in messages, in the singular ("method"). `packages` are
    searched for modules with the attribute `attribute`, in the order of their names; `group` is the
    group of entry points of other packages, "peft_jax.methods".
    """

    def __init__(self, kind: str, packages: Sequence[str], attribute: str, group: str) -> None:
        self.kind, self.packages, self.attribute, self.group = kind, packages, attribute, group
        self._records: dict[str, R] = {}
        self._found = False

    def register(self, record: R) -> R:
        """Add a record. Raises ValueError for a name that is taken by another one."""
        known = self._records.setdefault(record.name, record)
        if known is not record:
            raise ValueError(f"there is a {self.kind} {record.name!r} already: choose another name")
        return record

    def find(self, name: str) -> R:
        """The record called `name`. Raises ValueError that names the nearest one."""
        if name not in self:
            raise ValueError(
                f"unknown {self.kind} {name!r}.{nearest(str(name), self)} "
                f"Those there are: {', '.join(self)}"
            )
        return self[name]

    def _read(self) -> dict[str, R]:
        if not self._found:
            self._found = True  # a record's module may ask for the registry while it is imported
            for package in self.packages:
                for module in _modules(package):
                    self._add(getattr(module, self.attribute, ()))
            for point in sorted(entry_points(group=self.group), key=lambda p: p.name):
                try:
                    self._add(point.load())
                except Exception as error:  # a broken plug-in must not take the others along
                    logger.warning(
                        f"the {self.kind} {point.name!r} of the entry point {point.value} "
                        f"cannot be used: {type(error).__name__}: {error}"
                    )
        return self._records

    def _add(self, found: Any) -> None:
        # a record may be a tuple itself
        for record in (found,) if hasattr(found, "name") else found:
            self.register(record)

    def __getitem__(self, name: str) -> R:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def _modules(package: str) -> Iterator[Any]:
    """A package's modules, private ones left out, and itself first."""
    home = importlib.import_module(package)
    yield home
    for found in pkgutil.iter_modules(home.__path__):
        if not found.name.startswith("_"):
            yield importlib.import_module(f"{package}.{found.name}")


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with a leading blank, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
