"""Opens the images and classes that a recipe names."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from comkd_cli.data.catalogued import catalogued_source
from comkd_cli.data.class_names import missing_text, read_class_names
from comkd_cli.data.contents import FileContents
from comkd_cli.data.digits import digits_source
from comkd_cli.data.folder import folder_source, open_below
from comkd_cli.data.held_out import hold_out, hold_out_again
from comkd_cli.data.holdout import Holdout
from comkd_cli.data.label_file import read_label_file
from comkd_cli.data.prompts import Prompts, openai_templates, read_prompts
from comkd_cli.data.shards import ShardStore
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.edge.images import Conversion
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.model import DEFAULT_TEMPLATE, OPENAI_TEMPLATES, Data

INDEX = "image_digests.sqlite"


def open_source(
    data: Data,
    data_root: Path,
    runs: Path = Path("runs"),
    report: Report = lambda event: None,
    fetch: bool = False,
) -> Source:
    """The images and classes that a recipe names.

    Relative paths are looked for in the current directory, then in the data root. runs: below it are kept the digests
    of image contents, and in shards/ the index of shards and fetched shards. fetch: fetch remote shards now, which for
    `pipe:` runs a command: only for a recipe that the user runs. Skipped files and classes without images are
    reported. If there are no test images, `data.holdout_percent` of the training images become them. Raises
    DataError.
    """
    source = _with_remembered_contents(data, data_root, runs, report, fetch)
    # A single image cannot be divided, and no run starts with it.
    if source.test is not None or not data.holdout_percent or len(source.train) < 2:
        return source
    return hold_out(source, data.holdout_percent, data.fingerprint, report)


def reopen_source(
    data: Data, holdout: Holdout | None, data_root: Path, runs: Path, report: Report = lambda event: None
) -> Source:
    """The data of a finished student, where no image is held out that the student was trained on.

    holdout: of the student's record; None if it was trained on every training image. Otherwise as `open_source`.
    """
    if holdout is not None:
        data = data.model_copy(update={"fingerprint": holdout.fingerprint})
    source = _with_remembered_contents(data, data_root, runs, report, fetch=False)
    return source if holdout is None or source.test is not None else hold_out_again(source, holdout)


def _with_remembered_contents(data: Data, data_root: Path, runs: Path, report: Report, fetch: bool) -> Source:
    source = _with_prompts(_open_source(data, data_root, runs, report, fetch), data, data_root)
    labelled, images = source.train.labelled_count, len(source.train)
    partly = 0 < labelled < images
    if partly:
        report(Notice(f"{source.name}: {labelled:,} of {images:,} training images have labels"))
    labels = {
        "labelled training" if partly else "training": source.train.labelled.labels,
        "validation": source.val.labels if source.val else None,
        "test": source.test.labels if source.test else None,
    }
    if missing := missing_text(source.class_names, labels):
        report(Notice(f"{source.name}: {missing}"))

    def remembered(images: ImageSet) -> ImageSet:
        if not isinstance(images.contents, FileContents):
            return images
        contents = FileContents(images.contents.root, data.fingerprint, runs / INDEX, report)
        conversion = Conversion(**data.images.model_dump())
        limited = partial(open_below, contents.root, most_pixels=data.image_limit_pixels, conversion=conversion)
        return replace(images, contents=contents, open_key=limited, conversion=conversion)

    return replace(
        source,
        train=remembered(source.train),
        test=remembered(source.test) if source.test else source.test,
        val=remembered(source.val) if source.val else source.val,
    )


def _open_source(data: Data, data_root: Path, runs: Path, report: Report, fetch: bool) -> Source:
    if data.dataset == "digits":
        return digits_source(data.template)
    if data.dataset is not None:
        return catalogued_source(CATALOG[data.dataset], data_root, data.template, report)
    folder = None if data.folder is None else locate(data.folder, data_root, "data.folder")
    names: list[str] | None
    if isinstance(data.classes, str):
        names = read_class_names(locate(data.classes, data_root, "data.classes"))
    elif data.classes is not None:
        names = list(data.classes)
    else:
        names = None
    template = data.template or DEFAULT_TEMPLATE
    if folder is not None:
        labels = None if data.labels is None else read_label_file(locate(data.labels, data_root, "data.labels", folder))
        return folder_source(folder, names, template, report, labels)
    assert data.shards is not None  # the recipe has one of the three
    assert names is not None  # and with shards it has classes
    store = ShardStore(runs / "shards", data_root, report, fetch, data.fingerprint, data.image_limit_pixels)
    return store.source(data.shards, names, template)


def _with_prompts(source: Source, data: Data, data_root: Path) -> Source:
    """The source with the templates and the descriptions of a recipe, if it has any. Raises DataError."""
    templates: tuple[str, ...] = (source.template,)
    if data.templates is not None:
        templates = openai_templates() if data.templates == OPENAI_TEMPLATES else tuple(data.templates)
    descriptions = {}
    if data.prompts is not None:
        descriptions = read_prompts(locate(data.prompts, data_root, "data.prompts"), source.class_names)
    ensemble = Prompts(templates, descriptions) if len(templates) > 1 or descriptions else None
    return replace(source, template=templates[0], ensemble=ensemble)


def locate(path: str, data_root: Path, field: str, folder: Path | None = None) -> Path:
    """An existing path, from the current directory, the data root or then the folder. Raises DataError."""
    candidates = [Path(path).expanduser(), data_root / path, *([] if folder is None else [folder / path])]
    for candidate in candidates:
        with suppress(OSError, ValueError):  # a path that no file system accepts: too long, or with a NUL
            if candidate.exists():
                return candidate
    raise DataError(
        "no such file or folder",
        field=field,
        found=", ".join(dict.fromkeys(map(str, candidates))),
        remedy="correct the path, or set --data-root",
    )
