import pickle
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from comkd_cli.data import digits
from comkd_cli.data.digits import digits_source


def test_the_split_is_every_fifth_image_and_nothing_is_in_both_or_in_none() -> None:
    source = digits_source()
    assert source.test is not None
    train, test = ([int(key) for key in images.keys] for images in (source.train, source.test))
    assert test == list(range(0, 1797, 5))
    assert sorted(train + test) == list(range(1797))
    assert (len(train), len(test)) == (1437, 360)


def test_labels_and_class_names_are_those_of_scikit_learn() -> None:
    source, reference = digits_source(), load_digits()
    assert source.class_names == tuple(map(str, reference.target_names))
    for images in (source.train, source.test):
        assert images is not None
        assert images.labels is not None
        assert list(images.labels) == [reference.target[int(key)] for key in images.keys]
        assert set(images.labels) == set(range(10))


def test_pictures_are_the_scans_with_full_ink_white() -> None:
    source, reference = digits_source(), load_digits()
    assert source.test is not None
    for images in (source.train, source.test):
        for position in (0, 17, len(images) - 1):
            picture = images.open(position)
            assert (picture.mode, picture.size) == ("RGB", (8, 8))
            ink = reference.images[int(images.keys[position])]
            expected = np.floor(ink * 255 / 16)
            assert np.array_equal(np.asarray(picture), np.repeat(expected[..., None], 3, axis=2))
    assert max(np.asarray(source.train.open(i)).max() for i in range(50)) == 255


def test_the_template_can_be_replaced() -> None:
    assert digits_source().prompts[3] == "a photo of the digit 3."
    assert digits_source("number {}").prompts[3] == "number 3"


def test_two_readings_are_the_same_data() -> None:
    assert digits_source().identity() == digits_source().identity()
    assert pickle.loads(pickle.dumps(digits_source())) == digits_source()


def test_a_file_that_scikit_learn_has_moved_is_read_by_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digits_source().identity()
    digits._scans.cache_clear()
    monkeypatch.setattr(digits, "FILE", "elsewhere.csv.gz")
    assert digits_source().identity() == expected
    digits._scans.cache_clear()


@pytest.mark.slow
def test_reading_them_imports_no_scikit_learn() -> None:
    program = (
        "import sys; from comkd_cli.data.digits import digits_source; digits_source().train.open(0); "
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
