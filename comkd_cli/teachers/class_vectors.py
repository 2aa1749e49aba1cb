"""Class vectors of class names: prompts, their tokens, and what a short context cuts off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from comkd_cli.data.prompts import Prompts, as_prompts
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.method.teacher import encode_classes
from comkd_cli.models.backbones import Clip, context_length, tokens_cut

CLASSES_AT_ONCE = 256
MOST_NAMED = 5


@torch.no_grad()
def encode_prompts(
    clip: Clip,
    class_names: Sequence[str],
    prompts: Prompts | str,
    device: torch.device,
    report: Report = ignore_event,
) -> Tensor:
    """Class vectors (classes, dim), L2-normalised: those of the prompts, or `encode_ensemble` of several a class.

    prompts: a str is the only template. Single prompts are encoded in batches of CLASSES_AT_ONCE.
    """
    prompts = as_prompts(prompts)
    if not prompts.are_single(class_names):
        return encode_ensemble(clip, class_names, prompts, device, report)
    tokens = tokenize_prompts(clip, class_names, prompts, report).to(device)
    return torch.cat([encode_classes(clip.model, part) for part in torch.split(tokens, CLASSES_AT_ONCE)])


@torch.no_grad()
def encode_ensemble(
    clip: Clip, class_names: Sequence[str], prompts: Prompts, device: torch.device, report: Report = ignore_event
) -> Tensor:
    """Class vectors (classes, dim) of a prompt ensemble: the mean of the vectors of each class's prompts, normalised.

    As in openai/CLIP, Prompt_Engineering_for_ImageNet.ipynb. Raises DataError for two classes with the same tokens.
    """
    report_truncation(clip, class_names, prompts, report)
    vectors, tokens_of = [], []
    for name in class_names:
        tokens = clip.tokenize(list(prompts.of(name)))
        tokens_of.append(tuple(sorted(map(tuple, tokens.tolist()))))
        parts = torch.split(tokens.to(device), CLASSES_AT_ONCE)
        vectors.append(torch.cat([encode_classes(clip.model, part) for part in parts]).mean(0))
    _check_distinct(clip, class_names, tokens_of, [prompts.of(name)[0] for name in class_names])
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


def tokenize_prompts(
    clip: Clip, class_names: Sequence[str], prompts: Prompts | str, report: Report = ignore_event
) -> Tensor:
    """Token ids (classes, context) of the first prompt of each class, a different row for each class.

    prompts: a str is the only template. open_clip truncates long prompts silently; a notice names the classes. Raises
    DataError for two classes with the same tokens, which no model could tell apart.
    """
    first = as_prompts(prompts).first()
    texts = [first.of(name)[0] for name in class_names]
    tokens = clip.tokenize(texts)
    _check_distinct(clip, class_names, [(tuple(row),) for row in tokens.tolist()], texts)
    report_truncation(clip, class_names, first, report)
    return tokens


def _check_distinct(
    clip: Clip,
    class_names: Sequence[str],
    tokens: Sequence[tuple[tuple[int, ...], ...]],
    texts: Sequence[str],
) -> None:
    """Raise DataError for two classes whose prompts have the same tokens.

    tokens: of each class, those of all its prompts in a fixed order. texts: its first prompt, for the message.
    """
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    for label, rows in enumerate(tokens):
        other = first.setdefault(rows, label)
        if class_names[other] != class_names[label]:
            raise DataError(
                f"the prompts of two classes are identical in the {len(rows[0])} tokens that "
                f"{clip.origin.architecture} reads",
                field="data.template",
                found=f"{texts[other]!r}, {texts[label]!r}",
                remedy="shorten `data.template` or the class names, or raise context_length",
            )


def report_truncation(clip: Clip, class_names: Sequence[str], prompts: Prompts, report: Report) -> None:
    """Report the prompts that lose words because they are longer than the context of the text encoder."""
    written = [(name, text) for name in class_names for text in prompts.of(name)]
    lost = tokens_cut(clip, [text for _, text in written])
    truncated = Counter(name for (name, _), tokens in zip(written, lost, strict=True) if tokens)
    if not truncated:
        return
    # The name itself loses words if a prompt up to its end is too long.
    starts = [template.partition("{}")[0] for template in prompts.templates]
    heads = [(name, f"{start}{name}") for name in truncated if name not in prompts.descriptions for start in starts]
    lost = tokens_cut(clip, [head for _, head in heads])
    in_name = dict.fromkeys(name for (name, _), tokens in zip(heads, lost, strict=True) if tokens)
    single = len(written) == len(class_names)
    count = "the prompts" if single else f"{truncated.total()} of {len(written)} prompts"
    text = (
        f"{clip.origin.architecture} reads {context_length(clip)} tokens of a prompt: {count} of {len(truncated)} of "
        f"{len(class_names)} classes are truncated ({_first_of(list(truncated))})"
    )
    if in_name:
        text += f", and the name itself loses words in {len(in_name)} ({_first_of(list(in_name))})"
    remedy = "`data.template`" if single and not prompts.descriptions else "the prompts"
    report(Notice(f"{text}; shorten {remedy} or the class names, or use a model with a longer context"))


def _first_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(repr(name) for name in names[:MOST_NAMED]) + more
