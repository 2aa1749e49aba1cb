import pytest
import torch
from torch import Tensor, nn

from comkd_cli.method.prompts import VisionPrompts
from comkd_cli.method.student import Student
from comkd_cli.models.costs import parameters
from comkd_cli.recipe import model as recipe

DIM, WIDTH, CLASSES = 6, 5, 3
FULL = recipe.Student(arch="a", train="full")
ATTENTION = recipe.EduAttention()


def backbone() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, WIDTH), nn.Dropout(0.5))


def class_vectors(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)


def student(settings: recipe.Student = FULL, attention: recipe.EduAttention | None = ATTENTION) -> Student:
    torch.manual_seed(0)
    return Student(backbone(), WIDTH, class_vectors(), torch.tensor(20.0), settings, attention)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 2, 2)


def test_at_step_0_it_is_exactly_the_student_without_edu_attention() -> None:
    batch = images()
    with_attention, without = student().eval(), student(attention=None).eval()
    assert torch.equal(with_attention(batch).features, without(batch).features)
    assert torch.equal(with_attention(batch).logits, without(batch).logits)


def test_logits_are_the_scaled_cosines_of_its_features_and_the_class_vectors() -> None:
    output = student(attention=recipe.EduAttention(gate_start=0.5)).eval()(images())
    assert torch.allclose(output.features.norm(dim=1), torch.ones(4))
    assert torch.allclose(output.logits, 20 * output.features @ class_vectors().T, atol=1e-5)


def test_new_classes_get_logits_without_training() -> None:
    trained, others = student().eval(), class_vectors(seed=2)
    batch = images()
    output = trained(batch, others)
    assert torch.allclose(output.logits, 20 * trained(batch).features @ others.T, atol=1e-5)


@pytest.mark.parametrize(("memory", "moves"), [("training", False), ("candidates", True)])
def test_the_image_features_depend_on_the_label_set_only_with_candidates(memory: str, moves: bool) -> None:
    trained = student(attention=recipe.EduAttention(memory=memory, gate_start=0.5)).eval()  # type: ignore[arg-type]
    batch = images()
    assert torch.equal(trained(batch).features, trained(batch, class_vectors(seed=2)).features) is not moves


@pytest.mark.parametrize(("memory", "grows"), [("training", False), ("candidates", True)])
def test_an_added_class_has_logits_and_is_in_the_memory_only_with_candidates(memory: str, grows: bool) -> None:
    attention = recipe.EduAttention(memory=memory, gate_start=0.5)  # type: ignore[arg-type]
    trained, extended = student(attention=attention).eval(), student(attention=attention).eval()
    added, batch = class_vectors(seed=2)[:2], images()
    extended.add_classes(added)
    every = torch.cat([class_vectors(), added])
    assert torch.equal(extended.class_vectors, every)
    before, after = trained(batch), extended(batch)
    assert torch.equal(after.features, before.features) is not grows
    expected = trained(batch, every) if grows else before
    torch.testing.assert_close(after.features, expected.features)
    torch.testing.assert_close(after.logits, 20 * expected.features @ every.T)


def test_on_the_classes_of_the_run_both_memories_train_the_same_student() -> None:
    batch, trained = images(), []
    for memory in ("training", "candidates"):
        model = student(attention=recipe.EduAttention(memory=memory, gate_start=0.5))  # type: ignore[arg-type]
        torch.manual_seed(1)  # of the dropout
        model(batch).logits.square().sum().backward()
        trained.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*trained, strict=True))  # type: ignore[arg-type]


def test_full_training_reaches_every_parameter_and_no_teacher_side_quantity() -> None:
    trained = student(attention=recipe.EduAttention(gate_start=0.1))
    trained(images()).logits.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in trained.named_parameters() if "key.bias" not in n
    )
    assert not trained.class_vectors.requires_grad
    assert not trained.logit_scale.requires_grad


def vit_student() -> Student:
    from open_clip.model import CLIP

    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    vision = {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "head_width": 16,
        "layers": 3,
        "patch_dropout": 0.5,
    }
    settings = recipe.Student(arch="a", weights="w", prompts=recipe.Prompts(tokens=2, depth=2))
    return Student(CLIP(WIDTH, vision, text).visual, WIDTH, class_vectors(), torch.tensor(20.0), settings, ATTENTION)


def test_prompt_training_reaches_prompts_projector_and_attention_alone() -> None:
    trained = vit_student().train()
    trained(torch.randn(4, 3, 16, 16)).logits.square().sum().backward()
    reached = {
        name.split(".")[0] for name, p in trained.named_parameters() if p.grad is not None and name != "backbone.tokens"
    }
    assert reached == {"projector", "edu_attention"}
    assert trained.backbone.tokens.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert all(p.grad is None for p in trained.backbone.tower.parameters())  # type: ignore[union-attr]


def test_a_frozen_backbone_stays_in_inference_mode() -> None:
    trained = vit_student().train()
    assert trained.projector.training
    assert not any(module.training for module in trained.backbone.modules())


def test_prompt_training_defaults_to_the_papers_prompts() -> None:
    from open_clip.model import CLIP

    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 9}
    settings = recipe.Student(arch="a", weights="w")
    trained = Student(CLIP(WIDTH, vision, text).visual, WIDTH, class_vectors(), torch.tensor(1.0), settings, None)
    assert isinstance(trained.backbone, VisionPrompts)
    assert trained.backbone.tokens.shape == (9, 4, 32)


def test_what_was_learned_leaves_out_the_frozen_backbone_and_goes_back_in() -> None:
    trained = vit_student()
    state = trained.learned_state()
    assert not any(name.startswith("backbone.tower") for name in state)
    assert "backbone.tokens" in state
    assert any(name.endswith("running_mean") for name in state)
    with torch.no_grad():
        trained.backbone.tokens.add_(1)  # type: ignore[union-attr]
    batch = torch.randn(4, 3, 16, 16)
    fresh = vit_student()
    fresh.backbone.tower.load_state_dict(trained.backbone.tower.state_dict())  # type: ignore[union-attr]
    fresh.load_learned_state(trained.learned_state())
    assert torch.equal(fresh.eval()(batch).features, trained.eval()(batch).features)


def test_a_state_with_other_names_is_refused() -> None:
    with pytest.raises(RuntimeError, match="differ"):
        student().load_learned_state({"nothing": torch.zeros(1)})


def test_the_tower_counts_everything_between_image_and_feature() -> None:
    by_hand = (12 * WIDTH + WIDTH) + (WIDTH * DIM + DIM + 2 * DIM + DIM * DIM + DIM) + (3 * (DIM * DIM + DIM) + 1)
    assert parameters(student()) == by_hand
