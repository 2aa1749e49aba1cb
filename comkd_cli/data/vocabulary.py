"""Names to distil a text encoder on: of the run, of files, of datasets, of ImageNet and of WordNet."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from comkd_cli.data.class_names import class_key, read_class_names
from comkd_cli.data.prompts import zero_shot_metadata
from comkd_cli.data.split_files import read_splits
from comkd_cli.edge.class_names import clean_class_name
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.recipe.catalog import CATALOG

LEMMAS = "_info/imagenet_synset_to_lemma.txt"  # in timm/data
LISTED_IN_FILES = ("split", "aircraft")  # layouts whose class names are read without listing images


@dataclass(frozen=True)
class Vocabulary:
    """Distinct names, and where they come from."""

    origin_of: Mapping[str, str]
    """By name, the first origin that has it."""

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of their origins."""
        return tuple(self.origin_of)

    @property
    def origins(self) -> dict[str, int]:
        """By origin, how many of the names come from it first."""
        return dict(Counter(self.origin_of.values()))

    def where(self, keeps: Callable[[str], bool]) -> Vocabulary:
        """The names for which `keeps` is true."""
        return Vocabulary({name: origin for name, origin in self.origin_of.items() if keeps(name)})

    def divided(self, held_out_percent: float) -> tuple[list[str], list[str]]:
        """The names to train on and the held-out ones; which side a name is on depends on the name alone."""
        trained: list[str] = []
        held: list[str] = []
        for name in self.names:
            (held if is_held_out(name, held_out_percent) else trained).append(name)
        return trained, held


def is_held_out(name: str, percent: float) -> bool:
    """Whether the first 64 bits of the digest of a name, as a fraction of 2^64, are below a share.

    All spellings of a name are on one side.
    """
    digest = hashlib.sha256(class_key(name).encode()).digest()
    return int.from_bytes(digest[:8], "big") < int(percent / 100 * 2**64)


def build_vocabulary(
    class_names: Sequence[str],
    name_files: Sequence[Path],
    data_root: Path | None,
    report: Report = ignore_event,
) -> Vocabulary:
    """The names of a run, of files with one a line, and unless data_root is None, of everything on this machine.

    That is: the datasets of the suite below data_root, ImageNet's classes as open_clip lists them, and the nouns of
    WordNet that ImageNet-21k has, as timm lists them. Raises DataError for a file that cannot be used.
    """
    sources: list[tuple[str, Iterable[str]]] = [("the run", class_names)]
    sources += [(str(path), read_class_names(path)) for path in name_files]
    if data_root is not None:
        sources += [*_suite_names(data_root, report), ("ImageNet", imagenet_names()), ("WordNet", wordnet_names())]
    keys: set[str] = set()
    origin_of: dict[str, str] = {}
    for origin, found in sources:
        for name in _usable(found):
            key = class_key(name)
            if key not in keys:
                keys.add(key)
                origin_of[name] = origin
    return Vocabulary(origin_of)


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet, as openai/CLIP names them and open_clip lists them."""
    return tuple(zero_shot_metadata().IMAGENET_CLASSNAMES)


def wordnet_names() -> tuple[str, ...]:
    """The first lemma of each of WordNet's nouns in ImageNet-21k, about 21,000.

    timm, which open_clip needs, has them in a file: `n02119789<tab>kit fox, Vulpes macrotis`.
    """
    package = importlib.util.find_spec("timm")  # not importlib.resources, which would import timm, and that torch
    assert package is not None  # a dependency of open_clip
    assert package.origin is not None  # it is a package with an __init__.py
    lines = Path(package.origin).with_name("data").joinpath(LEMMAS).read_text(encoding="utf-8").splitlines()
    return tuple(line.partition("\t")[2].partition(",")[0].strip() for line in lines if "\t" in line)


def _usable(names: Iterable[str]) -> Iterator[str]:
    """The names that prompts can have; older versions stored some that are refused now."""
    for name in names:
        with suppress(ValueError):
            yield clean_class_name(name)


def _suite_names(data_root: Path, report: Report) -> list[tuple[str, tuple[str, ...]]]:
    """The class names of the datasets of the suite that are below a folder."""
    found = []
    for dataset in CATALOG.values():
        if dataset.layout not in LISTED_IN_FILES or not (data_root / dataset.folder).is_dir():
            continue
        try:
            found.append((dataset.name, tuple(read_splits(dataset, data_root).class_names.values())))
        except DataError as error:
            report(Notice(f"without the class names of {dataset.name}: {error}"))
    return found
