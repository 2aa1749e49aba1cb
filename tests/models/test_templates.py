import open_clip

from comkd_cli.models.templates import IMAGENET_TEMPLATES, NOT_IN_PROMPTSRC, PROMPTSRC_TEMPLATES


def test_the_ensemble_fills_in_class_names_as_open_clip_does() -> None:
    theirs = [template("red panda") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [template.replace("{}", "red panda") for template in IMAGENET_TEMPLATES] == theirs


def test_promptsrc_leaves_out_20_of_the_80() -> None:
    assert set(IMAGENET_TEMPLATES) > NOT_IN_PROMPTSRC  # otherwise a typing error would leave none out
    assert len(PROMPTSRC_TEMPLATES) == 60
