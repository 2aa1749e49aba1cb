"""Stage 1 against PromptSRC written out by hand from open_clip's parts."""

import copy
import math

import numpy as np
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from comkd_cli.errors import ModelError
from comkd_cli.method import prompt_src
from comkd_cli.method.prompt_src import (
    PromptedClip,
    class_prompt,
    epoch_weights,
    frozen_class_vectors,
    prompt_src_terms,
)
from tests.method.test_prompts import prompted_by_hand

VIT = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 3}
CONTEXT = torch.tensor([[48, 5, 6, 7, 5, 49, 0, 0, 0, 0, 0, 0]])
TOKENS = torch.tensor([[48, 5, 6, 7, 5, 11, 12, 49, 0, 0, 0, 0], [48, 5, 6, 7, 5, 13, 12, 14, 49, 0, 0, 0]])


def clip(kind: type[nn.Module] = CLIP) -> nn.Module:
    torch.manual_seed(0)
    return kind(20, VIT, TEXT, quick_gelu=True).eval()


def prompted(kind: type[nn.Module] = CLIP, depth: int = 3, tokens: int = 4) -> PromptedClip:
    model = clip(kind)
    torch.manual_seed(1)
    return PromptedClip(model, CONTEXT, tokens, depth, depth)


def text_by_hand(model: nn.Module, prompts: Tensor, tokens: Tensor) -> Tensor:
    """IVLP's text encoder, as PromptSRC describes it: (texts, dim), not normalised."""
    text = getattr(model, "text", model)
    count = prompts.shape[1]

    def replaced(hidden: Tensor, layer: int) -> Tensor:
        own = prompts[layer].expand(len(tokens), -1, -1)
        return torch.cat([hidden[:, :1], own, hidden[:, 1 + count :]], dim=1)

    hidden = replaced(text.token_embedding.weight[tokens], 0) + text.positional_embedding
    mask = torch.full((tokens.shape[1], tokens.shape[1]), -math.inf).triu(1)
    for layer, block in enumerate(text.transformer.resblocks):
        hidden = block(replaced(hidden, layer) if 0 < layer < len(prompts) else hidden, attn_mask=mask)
    last = text.ln_final(hidden)[torch.arange(len(tokens)), tokens.argmax(dim=-1)]
    return last @ text.text_projection


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_both_encoders_are_those_of_promptsrc(kind: type[nn.Module], depth: int) -> None:
    model = prompted(kind, depth)
    images = torch.randn(5, 3, 16, 16)
    bare = clip(kind)
    with torch.no_grad():
        vectors = unit(text_by_hand(bare, model.text.tokens, TOKENS))
        features = unit(prompted_by_hand(bare.visual, model.vision.tokens, images))
        torch.testing.assert_close(model.encode_classes(TOKENS), vectors, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_images(images), features, atol=1e-5, rtol=0)
        output = model(images, TOKENS, vectors, 64)
        torch.testing.assert_close(output.logits, bare.logit_scale.exp() * features @ vectors.T, atol=1e-4, rtol=0)


def test_the_frozen_clip_within_is_untouched() -> None:
    model = prompted()
    images = torch.randn(5, 3, 16, 16)
    frozen_classes = unit(torch.randn(2, 20))
    output = model(images, TOKENS, frozen_classes, 64)
    bare = clip()
    frozen = unit(bare.encode_image(images))
    torch.testing.assert_close(output.frozen_image_features, frozen)
    torch.testing.assert_close(output.frozen_logits, bare.logit_scale.exp() * frozen @ frozen_classes.T)
    assert not torch.allclose(output.image_features, frozen, atol=1e-3)


def test_prompts_start_as_the_words_and_only_they_learn() -> None:
    model = prompted(tokens=4)
    words = clip().token_embedding.weight[CONTEXT[0, 1:5]]
    assert torch.equal(model.text.tokens[0], words)
    assert not torch.equal(prompted(tokens=5).text.tokens[0, :4], words)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"clip.visual.tokens", "text.tokens"}
    spread = torch.cat([model.vision.tokens.flatten(), model.text.tokens[1:].flatten()])
    assert float(spread.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_the_prompt_of_a_class() -> None:
    assert class_prompt("annual crop", 4) == "a photo of a annual crop."
    assert class_prompt("annual crop", 2) == "a photo of a annual crop."
    assert class_prompt("annual crop", 6) == "X X X X X X annual crop."
    assert class_prompt("annual crop", 2, "an_image_of") == "an image of annual crop."
    assert class_prompt("annual crop", 3, "") == "X X X annual crop."


def loss_of(model: PromptedClip, at_once: int) -> Tensor:
    torch.manual_seed(2)
    images, frozen_classes = torch.randn(4, 3, 16, 16), unit(torch.randn(9, 20))
    tokens = TOKENS[0].repeat(9, 1)
    tokens[:, 5] = torch.arange(9) + 10
    output = model(images, tokens, frozen_classes, at_once)
    terms = prompt_src_terms(output, torch.tensor([0, 8, 3, 3]), frozen_classes, 25.0, 10.0, 1.0)
    return torch.stack(list(terms.values())).sum()


def test_encoding_classes_in_parts_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = prompted(), prompted()
    recomputed = []
    monkeypatch.setattr(prompt_src, "checkpoint", _counting(prompt_src.checkpoint, recomputed))
    loss_of(whole, at_once=9).backward()
    assert recomputed == []
    loss_of(parted, at_once=2).backward()
    assert recomputed == [2, 2, 2, 2, 1]
    for one, other in ((whole.text, parted.text), (whole.vision, parted.vision)):
        scale = float(one.tokens.grad.abs().max())
        torch.testing.assert_close(other.tokens.grad, one.tokens.grad, atol=1e-5 * scale, rtol=1e-5)


def _counting(checkpoint, sizes):  # type: ignore[no-untyped-def]
    def counted(function, clip, part, **options):  # type: ignore[no-untyped-def]
        sizes.append(len(part))
        return checkpoint(function, clip, part, **options)

    return counted


def test_memory_kept_for_the_backward_pass_does_not_grow_with_the_classes() -> None:
    def kept(classes: int, at_once: int) -> int:
        model, sizes = prompted(), []
        tokens = TOKENS[:1].repeat(classes, 1)

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.encode_classes(tokens, at_once)
        return sum(sizes)

    # What remains per class is its row of ids and of features.
    assert kept(64, 4) - kept(32, 4) < (kept(64, 64) - kept(32, 32)) / 50


def test_the_terms_by_hand() -> None:
    model = prompted()
    images, frozen_classes = torch.randn(4, 3, 16, 16), unit(torch.randn(2, 20))
    output = model(images, TOKENS, frozen_classes, 64)
    labels = torch.tensor([0, 1, 1, 0])
    made = prompt_src_terms(output, labels, frozen_classes, 25.0, 10.0, 3.0)
    terms = {name: float(term.detach()) for name, term in made.items()}
    logits, frozen = output.logits.detach().double().numpy(), output.frozen_logits.double().numpy()

    def log_softmax(values: np.ndarray) -> np.ndarray:
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    p, q = log_softmax(frozen), log_softmax(logits)
    assert terms["cross_entropy"] == pytest.approx(-q[range(4), labels].mean(), rel=1e-5)
    assert terms["logits"] == pytest.approx(3 * (np.exp(p) * (p - q)).sum() / 8, rel=1e-4)
    gap = (output.text_features - frozen_classes).detach().abs().numpy().mean()
    assert terms["text"] == pytest.approx(25 * gap, rel=1e-5)
    gap = (output.image_features - output.frozen_image_features).detach().abs().numpy().mean()
    assert terms["image"] == pytest.approx(10 * gap, rel=1e-5)


def test_frozen_class_vectors_average_features_before_they_are_normalised() -> None:
    model = clip()
    templates = [TOKENS, TOKENS.roll(1, dims=0)]
    with torch.no_grad():
        mean = (model.encode_text(templates[0]) + model.encode_text(templates[1])) / 2
    torch.testing.assert_close(frozen_class_vectors(model, templates), unit(mean))


def test_epoch_weights_are_a_normal_density() -> None:
    from scipy.stats import norm

    density = norm(15, 1).pdf(np.arange(1, 21))
    assert epoch_weights(20, 15, 1) == pytest.approx(density / density.sum())
    assert epoch_weights(2, 300, 1) == pytest.approx([0, 1])


def test_towers_that_prompts_do_not_fit_into_are_refused() -> None:
    with pytest.raises(ModelError) as caught:
        PromptedClip(clip(), CONTEXT, 4, 4, 1)
    assert caught.value.field == "teacher.adapt.vision_depth"
    with pytest.raises(ModelError) as caught:
        PromptedClip(clip(), CONTEXT, 4, 1, 4)
    assert caught.value.field == "teacher.adapt.text_depth"
    convolutional = CLIP(20, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, TEXT)
    with pytest.raises(ModelError, match="need a vision transformer"):
        PromptedClip(copy.deepcopy(convolutional), CONTEXT, 4, 1, 1)
