"""The data by which a device tokenizes class names for a bundle's text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from comkd_cli.bundles.bundle import MERGES, TEXT_VOCABULARY, TOKENIZER
from comkd_cli.edge.json_tokenizer import JsonTokenizer, TokenizerRules
from comkd_cli.errors import ExportError
from comkd_cli.files import write_text
from comkd_cli.models.backbones import Clip, bpe_merges, has_bpe_merges, json_definition

MOST_NAMED = 3


@dataclass(frozen=True)
class ClipTokenizerData:
    """Of CLIP's tokenizer, which predict.py contains."""

    merges: str
    vocabulary: Sequence[int] | None = None
    """The tokens of CLIP that the encoder has, if its vocabulary was pruned."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files; returns their fields in the manifest."""
        write_text(folder / MERGES, self.merges)
        if self.vocabulary is None:
            return {"merges": MERGES}
        np.save(folder / TEXT_VOCABULARY, np.asarray(self.vocabulary, dtype=np.int32))
        return {"merges": MERGES, "vocabulary": TEXT_VOCABULARY}


@dataclass(frozen=True)
class JsonTokenizerData:
    """Of any other tokenizer, which predict.py reads with the tokenizers library."""

    definition: str
    """The content of a tokenizer.json."""
    context_length: int
    rules: TokenizerRules

    def write(self, folder: Path) -> dict[str, Any]:
        """As ClipTokenizerData.write."""
        write_text(folder / TOKENIZER, self.definition)
        return {"merges": None, "tokenizer": {"file": TOKENIZER, **asdict(self.rules)}}

    def check(self, tokenize: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> None:
        """Raise ExportError if a device would compute different tokens from the teacher's own tokenizer."""
        device = JsonTokenizer(self.definition, self.context_length, self.rules)
        differing = np.flatnonzero((device(texts) != tokenize(list(texts)).numpy()).any(axis=1))
        if differing.size:
            raise ExportError(
                "predict.py would not tokenize as the teacher does",
                path=TOKENIZER,
                found=", ".join(repr(texts[i]) for i in differing[:MOST_NAMED]),
                remedy="export without --text",
            )


TokenizerData = ClipTokenizerData | JsonTokenizerData


def tokenizer_data(clip: Clip, context_length: int) -> TokenizerData:
    """The data of a CLIP's tokenizer. Raises ModelError for one that a bundle cannot contain."""
    if has_bpe_merges(clip):
        return ClipTokenizerData(bpe_merges(clip))
    definition, rules = json_definition(clip)
    return JsonTokenizerData(definition, context_length, rules)
