import json
import re
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.results.records import Missing, Record, Results, from_json, merged, to_json

RECORD = Record(
    model="runs/digits/digits/seed1/student.pt",
    role="student",
    dataset="digits",
    top1_percent=97.5,
    mean_per_class_percent=97.25,
    images=360,
    image_tower_parameters=1234,
)


def test_by_default_a_record_is_a_zero_shot_score_of_the_last_epoch_on_all_classes() -> None:
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
        "model_sha256": None,
        "images_sha256": None,
        "images_from": "test",
        "teacher_top_answer": None,
        "teacher_top_answer_percent": None,
    }


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
PERCENT = st.none() | st.floats(0, 100)


@pytest.mark.slow
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
            model_sha256=st.none() | TEXTS,
        ),
        max_size=3,
    ),
    st.lists(st.builds(Missing, dataset=TEXTS, problem=TEXTS, failed=st.booleans()), max_size=2),
)
def test_everything_reads_back_whole_and_in_order(records: list[Record], missing: list[Missing]) -> None:
    document = json.loads(to_json(Results(records, missing)))
    assert list(document) == ["records", "missing"]
    assert [Missing(**entry) for entry in document["missing"]] == missing
    assert [Record(**entry) for entry in document["records"]] == records
    assert all(list(entry) == [field.name for field in fields(Record)] for entry in document["records"])
    assert from_json(to_json(Results(records, missing))) == Results(tuple(records), tuple(missing))


def test_names_are_written_as_they_are_and_the_file_ends_with_a_line_break() -> None:
    text = to_json(Results([replace(RECORD, dataset="Vögel")]))
    assert '"Vögel"' in text
    assert text.endswith("}\n")


def test_the_names_of_shares_end_in_percent() -> None:
    shares = [field.name for field in fields(Record) if "float" in str(field.type)]
    assert len(shares) == 4
    assert all(name.endswith("_percent") for name in shares)


# --- reading back --------------------------------------------------------------------------------------


def test_a_document_of_an_older_version_is_read() -> None:
    plain = asdict(RECORD)
    for name in ("model_sha256", "images_sha256", "unreadable", "selection"):
        del plain[name]
    document = {"records": [plain], "missing": [{"dataset": "dtd", "problem": "not there"}]}
    assert from_json(json.dumps(document)) == Results((RECORD,), (Missing("dtd", "not there"),))


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"a": 1}, "records"),
        ({"records": {}}, "records"),
        ({"records": [], "missing": 3}, "missing"),
        ({"records": [7]}, "records.0"),
        ({"records": [asdict(RECORD), {"model": "m"}]}, "records.1.role"),
        ({"records": [{**asdict(RECORD), "fresh": 1}]}, "records.0.fresh"),
        ({"records": [{**asdict(RECORD), "images": "many"}]}, "records.0.images"),
        ({"records": [{**asdict(RECORD), "images": True}]}, "records.0.images"),
        ({"records": [{**asdict(RECORD), "images": 7.5}]}, "records.0.images"),
        ({"records": [{**asdict(RECORD), "role": "judge"}]}, "records.0.role"),
        ({"records": [{**asdict(RECORD), "top1_percent": "97"}]}, "records.0.top1_percent"),
        ({"records": [{**asdict(RECORD), "top1_percent": True}]}, "records.0.top1_percent"),
        ({"records": [], "missing": [{"dataset": "dtd"}]}, "missing.0.problem"),
    ],
)
def test_a_document_of_another_format_is_refused_with_the_field(document: object, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(field)}: "):
        from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000], ids=["empty", "list", "cut", "null", "deep"])
def test_a_text_that_is_not_a_document_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|object"):
        from_json(text)


# --- accumulating --------------------------------------------------------------------------------------


def test_other_scores_are_kept_and_the_same_score_is_replaced() -> None:
    base = replace(RECORD, protocol="base-to-novel", classes="base")
    pets = replace(RECORD, dataset="pets")
    again = replace(RECORD, top1_percent=50.0)
    assert merged(Results([RECORD, base, pets]), Results([again])).records == [again, base, pets]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"role": "baseline"},
        {"dataset": "pets"},
        {"protocol": "few-shot"},
        {"classes": "new"},
        {"method": "linear-probe"},
        {"shots": 4},
        {"seed": 2},
        {"selection": "promptkd"},
    ],
    ids=str,
)
def test_each_part_of_the_identity_makes_a_record_of_its_own(change: dict[str, object]) -> None:
    other = replace(RECORD, **change)  # type: ignore[arg-type]
    assert merged(Results([RECORD]), Results([other])).records == [RECORD, other]


def test_records_of_a_model_whose_weights_changed_are_dropped_on_every_dataset() -> None:
    old = replace(RECORD, model_sha256="a")
    elsewhere = replace(old, dataset="pets")
    teacher = replace(old, role="teacher")
    fresh = replace(RECORD, model_sha256="b", protocol="few-shot")
    assert merged(Results([old, elsewhere, teacher]), Results([fresh])).records == [teacher, fresh]
    unknown = replace(RECORD, dataset="dtd")  # an older version did not write digests
    assert merged(Results([unknown]), Results([fresh])).records == [unknown, fresh]


def test_records_of_other_images_under_the_same_name_are_dropped_for_that_model_and_dataset() -> None:
    old = replace(RECORD, images_sha256="a", protocol="few-shot")
    pets = replace(old, dataset="pets")
    other_model = replace(old, model="another")
    fresh = replace(RECORD, images_sha256="b")
    assert merged(Results([old, pets, other_model]), Results([fresh])).records == [pets, other_model, fresh]


def test_what_was_missing_stays_until_it_is_scored() -> None:
    absent, failed = Missing("dtd", "no student"), Missing("pets", "damaged", "m", failed=True)
    kept = Results([], [absent, failed])
    assert merged(kept, Results([RECORD])).missing == [absent, failed]
    assert merged(kept, Results([replace(RECORD, dataset="dtd")])).missing == [failed]
    assert merged(kept, Results([replace(RECORD, dataset="pets")])).missing == [absent, failed]
    assert merged(kept, Results([replace(RECORD, dataset="pets", model="m")])).missing == [absent]
    now = Missing("dtd", "still no student")
    assert merged(kept, Results([], [now])).missing == [now, failed]


def test_a_model_that_was_scored_twice_in_one_evaluation_is_one_record() -> None:
    assert merged(Results([]), Results([RECORD, RECORD])).records == [RECORD]
