import json
from pathlib import Path

import pytest
from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from comkd_cli.data.class_names import class_key
from comkd_cli.data.vocabulary import build_vocabulary, imagenet_names, is_held_out, wordnet_names
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice


def test_names_of_imagenet_and_wordnet_are_those_of_their_packages() -> None:
    assert list(imagenet_names()) == list(IMAGENET_CLASSNAMES)
    lemmas = wordnet_names()
    assert len(lemmas) > 21_000
    described = ImageNetInfo("imagenet22k").label_descriptions(detailed=False)
    assert {name.partition(",")[0].strip() for name in described} <= set(lemmas)


def test_a_name_counts_once_for_its_first_origin(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Red_Fox\nowl\nbee\n", encoding="utf-8")
    found = build_vocabulary(["red fox", "cat", "of an\nearlier version"], [names], None)
    assert found.names == ("red fox", "cat", "owl", "bee")
    assert found.origins == {"the run": 2, str(names): 2}


def test_names_that_are_left_out_do_not_count(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("owl\nbumble bee\n", encoding="utf-8")
    found = build_vocabulary(["red fox", "cat"], [names], None).where(lambda name: " " not in name)
    assert (found.names, found.origins) == (("cat", "owl"), {"the run": 1, str(names): 1})


def test_datasets_on_this_machine_give_their_names_and_damaged_ones_a_notice(tmp_path: Path) -> None:
    for folder, file, content in (
        ("dtd", "split_zhou_DescribableTextures.json", {"train": [["a.jpg", 0, "polka_dotted"]]}),
        ("eurosat", "split_zhou_EuroSAT.json", None),
    ):
        (tmp_path / folder).mkdir()
        text = "broken" if content is None else json.dumps({"val": [], "test": [["b.jpg", 1, "woven"]], **content})
        (tmp_path / folder / file).write_text(text)
    events: list[Event] = []
    found = build_vocabulary(["tench", "my class"], [], tmp_path, events.append)
    assert found.names[:5] == ("tench", "my class", "polka dotted", "woven", "goldfish")
    assert found.origins["dtd"] == 2
    assert len({class_key(name) for name in found.names}) == len(found.names) == sum(found.origins.values())
    (notice,) = events
    assert isinstance(notice, Notice)
    assert "eurosat" in notice.text


def test_the_side_of_a_name_depends_on_the_name_alone() -> None:
    names = [f"thing {number}" for number in range(2000)]
    one = build_vocabulary(names, [], None).divided(10)
    other = build_vocabulary(names[1000:], [], None).divided(10)
    assert sorted(one[0] + one[1]) == sorted(names)
    assert set(other[1]) == set(one[1]) & set(names[1000:])
    assert 150 < len(one[1]) < 250
    assert set(one[1]) < set(build_vocabulary(names, [], None).divided(20)[1])
    assert is_held_out("Red_Fox", 50) == is_held_out("red fox", 50)


def test_an_unusable_file_of_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        build_vocabulary(["a", "b"], [tmp_path / "absent.txt"], None)
    assert caught.value.path == tmp_path / "absent.txt"
