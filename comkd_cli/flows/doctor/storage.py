"""Datasets and weights that are on this machine already."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import constants

from comkd_cli.flows.doctor.checks import Check
from comkd_cli.recipe.catalog import CATALOG

MOST_NAMED = 5


def check_data_root(data_root: Path) -> Check:
    """The datasets of the suite below a folder; their images are not looked at."""
    found = [name for name, dataset in CATALOG.items() if (data_root / dataset.folder).is_dir()]
    if found:
        return Check("datasets", f"{data_root}: {_some(found)}; `comkd datasets check` checks each")
    remedy = "not needed for `digits` or your own folders; otherwise set --data-root or COMKD_DATA to the folder"
    return Check("datasets", f"{data_root}: none of the suite", "ok", remedy)


def check_cached_weights() -> Check:
    """Repositories in the cache of the Hugging Face Hub, where open_clip and timm look first."""
    cache = Path(constants.HF_HUB_CACHE)
    names = sorted(path.name for path in cache.glob("models--*") if any(path.glob("snapshots/*/*")))
    repositories = [name.removeprefix("models--").replace("--", "/") for name in names]
    place = str(cache)
    if constants.HF_HUB_OFFLINE:
        place += ", HF_HUB_OFFLINE is set"
    if os.environ.get("HF_ENDPOINT"):
        place += f", HF_ENDPOINT={os.environ['HF_ENDPOINT']}"
    if repositories:
        return Check("cached weights", f"{place}: {_some(repositories)}")
    remedy = "pretrained models are downloaded on first use; `digits` and weights from local files need none"
    return Check("cached weights", f"{place}: none", "warning" if constants.HF_HUB_OFFLINE else "ok", remedy)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{len(names)} ({', '.join(names[:MOST_NAMED])}{more})"
