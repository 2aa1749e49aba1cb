import math

import numpy as np
import pytest

from comkd_cli.evaluation.text_encoders import cosine_rows, image_figures, least_agreement_percent, name_figures


def unit(*angles: float) -> np.ndarray:
    """Vectors in the plane at these angles, in degrees."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_cosines_by_hand_and_none_for_what_is_not_finite() -> None:
    found = np.array([[3.0, 4.0], [np.nan, 1.0], [0.0, 0.0]], np.float32)
    assert cosine_rows(found, np.array([[1.0, 0.0]] * 3, np.float32)).tolist() == pytest.approx([0.6, -1, -1])


def test_figures_of_names_by_hand() -> None:
    # The second name is nearer to the third one's vector than to its own.
    figures = name_figures(unit(0, 70, 90), unit(10, 40, 90), unit(50)[0])
    cosine = [math.cos(math.radians(angle)) for angle in (10, 30, 0)]
    assert figures["held_out_names"] == 3
    assert figures["held_out_cosine_mean"] == pytest.approx(sum(cosine) / 3, abs=1e-6)
    assert figures["held_out_cosine_min"] == pytest.approx(cosine[1], abs=1e-6)
    assert figures["held_out_retrieval_percent"] == pytest.approx(200 / 3)
    constant = sum(math.cos(math.radians(angle)) for angle in (40, 10, 40)) / 3
    assert figures["constant_cosine_mean"] == pytest.approx(constant, abs=1e-6)


def test_the_agreement_is_the_least_of_all_and_every_second_vector() -> None:
    expected, features = unit(0, 90), unit(35, 50, 62, 80)
    # All vectors 30 degrees on: the border moves from 45 to 75. One of them: to 60.
    assert least_agreement_percent(features, expected, unit(30, 120)) == 50
    assert least_agreement_percent(features, expected, unit(30, 90)) == 75
    assert least_agreement_percent(features, expected, expected) == 100


def test_an_error_that_all_vectors_share_lowers_the_agreement() -> None:
    """Vectors that are all too long have the same argmax; one that is too long beside an exact one does not."""
    expected, features = unit(0, 90), unit(35, 50, 62, 80)
    far = 10 * expected
    assert np.array_equal((features @ far.T).argmax(1), (features @ expected.T).argmax(1))
    assert least_agreement_percent(features, expected, far) == 25


def test_figures_of_images_by_hand() -> None:
    features, labels = unit(5, 40, 50, 85), np.array([0, 0, 1, -1])
    figures = image_figures(features, labels, unit(0, 90), unit(0, 75), new=[1])
    # With 75 degrees in the place of 90, the border moves from 45 to 37.5: the image at 40 changes its class.
    expected = {"images": 4.0, "image_agreement_percent": 75.0, "new_class_agreement_percent": 75.0}
    top1 = {"image_top1_percent": 200 / 3, "new_class_top1_percent": 200 / 3, "teacher_vectors_top1_percent": 100.0}
    assert figures == pytest.approx({**expected, **top1})
    assert image_figures(features, None, unit(0, 90), unit(0, 75), new=[]) == {
        "images": 4.0,
        "image_agreement_percent": 75.0,
    }
