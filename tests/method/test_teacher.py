import math

import pytest
import torch
from torch import nn

from comkd_cli.method.teacher import PromptClassifier, Teacher, encode_classes
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.model import Model

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    return build_clip(Model(config=CONFIG), seed=1).model


def tokens() -> torch.Tensor:
    return build_clip(Model(config=CONFIG)).tokenize(["a photo of a cat.", "a photo of a dog."])


def test_class_vectors_are_open_clips_normalised_text_features(clip: nn.Module) -> None:
    ours = encode_classes(clip, tokens())
    assert torch.allclose(ours, clip.encode_text(tokens(), normalize=True), atol=1e-6)  # type: ignore[operator]


def test_logits_are_open_clips(clip: nn.Module) -> None:
    images = torch.randn(3, 3, 16, 16)
    image_features, text_features, scale = clip(images, tokens())
    teacher = Teacher(clip.visual, encode_classes(clip, tokens()).detach(), scale.detach())  # type: ignore[arg-type]
    output = teacher(images)
    assert torch.allclose(output.features, image_features, atol=1e-6)
    assert torch.allclose(output.logits, scale * image_features @ text_features.T, atol=1e-4)
    assert not output.logits.requires_grad


def test_the_prompt_classifier_trains_both_towers_and_the_scale() -> None:
    classifier = PromptClassifier(build_clip(Model(config=CONFIG), seed=1).model, tokens())
    nn.functional.cross_entropy(classifier(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 1, 0])).backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_the_prompt_classifier_answers_alike_with_class_vectors_at_hand() -> None:
    classifier = PromptClassifier(build_clip(Model(config=CONFIG), seed=1).model, tokens()).eval()
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(classifier(images, classifier.encode_classes()), classifier(images))


def test_the_logit_scale_never_exceeds_100() -> None:
    built = build_clip(Model(config=CONFIG), seed=1).model
    classifier = PromptClassifier(built, tokens())
    with torch.no_grad():
        built.logit_scale.fill_(math.log(50))  # type: ignore[operator,union-attr]
    assert classifier.logit_scale.item() == pytest.approx(50, rel=1e-5)
    with torch.no_grad():
        built.logit_scale.fill_(9.0)  # type: ignore[operator,union-attr]
    assert classifier.logit_scale.item() == 100.0
