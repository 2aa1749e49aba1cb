import pytest
import torch
from torch import nn

from comkd_cli.errors import DataError
from comkd_cli.method.objective import loss_terms
from comkd_cli.method.student import StudentOutput
from comkd_cli.method.teacher import TeacherOutput
from comkd_cli.recipe.model import FeatureCosine, FeatureMse, IFAlign, Labels, Loss, Refinement


def outputs() -> tuple[StudentOutput, TeacherOutput]:
    torch.manual_seed(0)
    projected = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    vectors = nn.functional.normalize(torch.randn(3, 6, dtype=torch.float64), dim=1)
    features = nn.functional.normalize(projected, dim=1)
    unit = nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64), dim=1)
    student = StudentOutput(projected, features, 10 * features @ vectors.T)
    return student, TeacherOutput(unit, 10 * unit @ vectors.T)


def test_with_both_modules_off_it_is_promptkds_objective() -> None:
    student, teacher = outputs()
    terms = loss_terms(student, teacher, Loss(if_align=None, edu_attention=None, refinement=Refinement(weight=1000.0)))
    # PromptKD: KLDivLoss(reduction="sum") * tau^2 / numel of the logits, times the weight
    kl = nn.KLDivLoss(reduction="sum")(student.logits.log_softmax(1), teacher.logits.softmax(1))
    assert list(terms) == ["refinement"]
    assert terms["refinement"].item() == pytest.approx((1000 * kl / student.logits.numel()).item())


def test_each_term_carries_its_weight_and_can_be_switched_off() -> None:
    student, teacher = outputs()
    once = loss_terms(student, teacher, Loss(refinement=Refinement(weight=1.0), if_align=IFAlign(weight=1.0)))
    thrice = loss_terms(student, teacher, Loss(refinement=Refinement(weight=3.0), if_align=IFAlign(weight=5.0)))
    assert thrice["refinement"].item() == pytest.approx(3 * once["refinement"].item())
    assert thrice["if_align"].item() == pytest.approx(5 * once["if_align"].item())
    assert list(loss_terms(student, teacher, Loss(refinement=None, if_align=IFAlign()))) == ["if_align"]


def test_alignment_compares_normalised_features() -> None:
    student, teacher = outputs()
    longer = StudentOutput(student.projected * 7, student.features, student.logits)
    first, second = (loss_terms(s, teacher, Loss(if_align=IFAlign()))["if_align"].item() for s in (student, longer))
    assert first == pytest.approx(second, rel=1e-6)


def test_the_terms_of_other_methods_are_off_unless_they_are_given() -> None:
    student, teacher = outputs()
    labels = torch.tensor([0, 1, 2, 0])
    assert list(loss_terms(student, teacher, Loss(), labels)) == ["refinement"]
    every = Loss(
        if_align=IFAlign(),
        feature_mse=FeatureMse(weight=6.0),
        feature_cosine=FeatureCosine(weight=2.0),
        labels=Labels(weight=3.0),
    )
    terms = loss_terms(student, teacher, every, labels)
    cosines = nn.functional.cosine_similarity(student.projected, teacher.features)
    assert terms["feature_cosine"].item() == pytest.approx(2 * (1 - cosines.mean()).item(), rel=1e-6)
    # of unit vectors in 6 dimensions, (1 - cosine) * 2 / 6, here with a weight of 6
    assert terms["feature_mse"].item() == pytest.approx(2 * (1 - cosines.mean()).item(), rel=1e-6)
    likely = student.logits.softmax(1)[range(4), labels]
    assert terms["labels"].item() == pytest.approx(-3 * likely.log().mean().item(), rel=1e-6)
    assert list(terms) == ["refinement", "if_align", "feature_mse", "feature_cosine", "labels"]


def test_labels_alone_need_no_teacher_and_cannot_do_without_labels() -> None:
    student, _ = outputs()
    loss = Loss(refinement=None, if_align=None, labels=Labels())
    assert not loss.needs_teacher
    assert list(loss_terms(student, None, loss, torch.tensor([0, 1, 2, 0]))) == ["labels"]
    with pytest.raises(DataError) as caught:
        loss_terms(student, None, loss, None)
    assert caught.value.field == "loss.labels"
