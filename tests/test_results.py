import json
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.results import Missing, Record, Results, to_json

RECORD = Record(
    model="runs/digits/digits/seed1/student.pt",
    role="student",
    dataset="digits",
    top1_percent=97.5,
    mean_per_class_percent=97.25,
    images=360,
    image_tower_parameters=1234,
)


def test_a_record_that_says_nothing_more_is_a_zero_shot_score_of_the_last_weights_on_all_classes() -> None:
    (written,) = json.loads(to_json(Results([RECORD])))["records"]
    assert written == {
        "model": "runs/digits/digits/seed1/student.pt",
        "role": "student",
        "dataset": "digits",
        "top1_percent": 97.5,
        "mean_per_class_percent": 97.25,
        "images": 360,
        "image_tower_parameters": 1234,
        "agreement_percent": None,
        "seed": None,
        "protocol": "zero-shot",
        "classes": "all",
        "method": "clip",
        "shots": None,
        "selection": "last",
        "unreadable": 0,
    }


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
PERCENT = st.none() | st.floats(0, 100)


@given(
    st.lists(
        st.builds(
            Record,
            model=TEXTS,
            role=st.sampled_from(["student", "teacher", "baseline"]),
            dataset=TEXTS,
            top1_percent=PERCENT,
            mean_per_class_percent=PERCENT,
            images=st.integers(0),
            image_tower_parameters=st.integers(0),
            agreement_percent=PERCENT,
            seed=st.none() | st.integers(0),
            unreadable=st.integers(0),
        ),
        max_size=3,
    ),
    st.lists(st.builds(Missing, dataset=TEXTS, problem=TEXTS), max_size=2),
)
def test_everything_reads_back_whole_and_in_order(records: list[Record], missing: list[Missing]) -> None:
    document = json.loads(to_json(Results(records, missing)))
    assert list(document) == ["records", "missing"]
    assert [Missing(**entry) for entry in document["missing"]] == missing
    assert [Record(**entry) for entry in document["records"]] == records
    assert all(list(entry) == [field.name for field in fields(Record)] for entry in document["records"])


def test_names_are_written_as_they_are_and_the_file_ends_with_a_line_break() -> None:
    text = to_json(Results([replace(RECORD, dataset="Vögel")]))
    assert '"Vögel"' in text
    assert text.endswith("}\n")


def test_every_share_says_that_it_is_a_percentage() -> None:
    shares = [field.name for field in fields(Record) if "float" in str(field.type)]
    assert len(shares) == 3
    assert all(name.endswith("_percent") for name in shares)


def test_a_record_is_not_changed_once_made() -> None:
    for name, value in asdict(RECORD).items():
        with pytest.raises(FrozenInstanceError):
            setattr(RECORD, name, value)
