"""Class vectors of class names: prompts, their tokens, and what a short context cuts off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.method.teacher import encode_classes
from comkd_cli.models.backbones import Clip, context_length, tokens_cut

CLASSES_AT_ONCE = 256
MOST_NAMED = 5


@torch.no_grad()
def encode_prompts(
    clip: Clip, class_names: Sequence[str], template: str, device: torch.device, report: Report = ignore_event
) -> Tensor:
    """Class vectors (classes, dim) of the class prompts, L2-normalised, computed in batches of CLASSES_AT_ONCE."""
    tokens = tokenize_prompts(clip, class_names, template, report).to(device)
    return torch.cat([encode_classes(clip.model, part) for part in torch.split(tokens, CLASSES_AT_ONCE)])


@torch.no_grad()
def encode_ensemble(
    clip: Clip,
    class_names: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    report: Report = ignore_event,
) -> Tensor:
    """Class vectors (classes, dim) of a prompt ensemble: the mean of the vectors of each class's prompts, normalised.

    As in openai/CLIP, Prompt_Engineering_for_ImageNet.ipynb.
    """
    report_truncation(clip, class_names, templates, report)
    vectors = []
    for name in class_names:
        tokens = clip.tokenize([template.replace("{}", name) for template in templates])
        vectors.append(encode_classes(clip.model, tokens.to(device)).mean(0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


def tokenize_prompts(clip: Clip, class_names: Sequence[str], template: str, report: Report = ignore_event) -> Tensor:
    """Token ids (classes, context) of the class prompts, a different row for each class.

    template: `{}` stands for the name. open_clip truncates long prompts silently; a notice names the classes. Raises
    DataError for two classes with the same tokens, which no model could tell apart.
    """
    prompts = [template.replace("{}", name) for name in class_names]
    tokens = clip.tokenize(prompts)
    first: dict[tuple[int, ...], str] = {}
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        if (other := first.setdefault(tuple(row), prompt)) != prompt:
            raise DataError(
                f"{clip.origin.architecture} reads {tokens.shape[1]} tokens, in which two prompts are the same",
                field="data.template",
                found=f"{other!r}, {prompt!r}",
                remedy="shorten `data.template` or the class names, or raise context_length",
            )
    report_truncation(clip, class_names, [template], report)
    return tokens


def report_truncation(clip: Clip, class_names: Sequence[str], templates: Sequence[str], report: Report) -> None:
    """Report the prompts that lose words because they are longer than the context of the text encoder."""
    truncated: Counter[str] = Counter()
    in_name: dict[str, None] = {}
    for template in templates:
        lost = tokens_cut(clip, [template.replace("{}", name) for name in class_names])
        shortened = [name for name, tokens in zip(class_names, lost, strict=True) if tokens]
        truncated.update(shortened)
        # The name itself loses words if the prompt up to its end is too long.
        heads = [f"{template.partition('{}')[0]}{name}" for name in shortened]
        lost = tokens_cut(clip, heads)
        in_name |= dict.fromkeys(name for name, tokens in zip(shortened, lost, strict=True) if tokens)
    if not truncated:
        return
    prompts = len(templates) * len(class_names)
    count = "the prompts" if len(templates) == 1 else f"{truncated.total()} of {prompts} prompts"
    text = (
        f"{clip.origin.architecture} reads {context_length(clip)} tokens of a prompt: {count} of {len(truncated)} of "
        f"{len(class_names)} classes are truncated ({_first_of(list(truncated))})"
    )
    if in_name:
        text += f", and the name itself loses words in {len(in_name)} ({_first_of(list(in_name))})"
    report(Notice(f"{text}; shorten `data.template` or the class names, or use a model with a longer context"))


def _first_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(repr(name) for name in names[:MOST_NAMED]) + more
