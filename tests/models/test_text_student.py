from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from torch import nn

from comkd_cli.edge.clip_tokenizer import Tokenizer
from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.models.costs import parameters
from comkd_cli.models.text_student import (
    ALWAYS,
    CONTEXT,
    Shape,
    TextRecord,
    TextStudent,
    choose_shape,
    copy_embedding,
    load_text_student,
    new_text_student,
    save_text_student,
    sinusoids,
)

MERGES = "".join(f"{first} {second}\n" for first, second in SimpleTokenizer().bpe_ranks)
SHAPE = Shape(16, 2, 8)


def record(**changes: object) -> TextRecord:
    fields: dict[str, object] = {
        "shape": SHAPE,
        "vocabulary": tuple(sorted({*ALWAYS, 518, 1000})),
        "merges": MERGES,
        "templates": ("a photo of a {}.",),
        "class_names": ("cat", "dog"),
        "class_vectors": nn.functional.normalize(torch.ones(2, 12), dim=1),
        "teacher_parameters": 100,
        "parameters": 10,
        "metrics": {"held_out_names": 2.0},
    }
    return TextRecord(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_largest_shape_that_fits_is_chosen_with_its_tokens() -> None:
    for teacher, dim in ((123_650_304, 768), (63_428_096, 512), (794_256, 16)):
        shape, tokens = choose_shape(teacher // 8, dim)
        with torch.device("meta"):
            assert parameters(TextStudent(shape, tokens, dim)) <= teacher / 8
            assert parameters(TextStudent(shape, tokens + 1, dim)) > teacher / 8
    with pytest.raises(ModelError) as caught:
        choose_shape(1000, 16)
    assert caught.value.remedy is not None


def test_the_features_are_of_unit_length_and_ignore_padding() -> None:
    torch.manual_seed(0)
    module = TextStudent(SHAPE, 20, 12).eval()
    short = torch.tensor([[1, 7, 3, 20]])
    long = nn.functional.pad(short, (0, CONTEXT - 4))
    with torch.no_grad():
        features, padded, other = module(short), module(long), module(torch.tensor([[1, 3, 7, 20]]))
    assert features.shape == (1, 12)
    assert torch.allclose(features.norm(dim=1), torch.ones(1))
    assert torch.allclose(features, padded, atol=1e-6)
    assert not torch.allclose(features, other, atol=1e-4)  # the order of words counts


def test_attention_is_pytorchs() -> None:
    torch.manual_seed(1)
    module = TextStudent(Shape(128, 1, 8), 20, 12).eval()
    (block,) = module.blocks
    theirs = nn.MultiheadAttention(128, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(block.qkv.weight)
        theirs.in_proj_bias.copy_(block.qkv.bias)
        theirs.out_proj.load_state_dict(block.out.state_dict())
        x = torch.randn(3, 5, 128)
        absent = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
        normed = block.norm_1(x)
        middle = x + theirs(normed, normed, normed, key_padding_mask=absent)[0]
        expected = middle + block.mlp(block.norm_2(middle))
        found = block(x, absent[:, None, None, :] * -1e4)
    assert torch.allclose(found, expected, atol=1e-5)


def test_positions_are_sines_and_cosines() -> None:
    table = sinusoids(4, 6)
    assert table[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert table[3, 1].item() == pytest.approx(np.sin(3 / 10_000 ** (2 / 6)), abs=1e-6)
    assert table[3, 5].item() == pytest.approx(np.cos(3 / 10_000 ** (4 / 6)), abs=1e-6)


def test_tokens_start_at_the_teachers_vectors() -> None:
    """With as many dimensions as the teacher's, the distances between tokens are the teacher's but for one scale."""
    torch.manual_seed(2)
    vocabulary, table = (3, 5, 7, 11), torch.randn(20, 3)
    module = TextStudent(Shape(16, 1, 8), 4, 12)
    copy_embedding(module, table, vocabulary)
    found, expected = torch.pdist(module.embedding.weight.detach()), torch.pdist(table[list(vocabulary)])
    assert torch.allclose(found / found[0], expected / expected[0], atol=1e-4)
    assert module.embedding.weight[:, 3:].abs().max() == 0
    few = TextStudent(Shape(16, 1, 2), 4, 12)
    copy_embedding(few, table, vocabulary)  # the two directions of the largest variance
    wide = module.embedding.weight[:, :2] / module.embedding.weight[:, :2].std()
    assert torch.allclose(few.embedding.weight.abs(), wide.abs(), atol=1e-4)


@pytest.mark.slow
def test_a_file_gives_the_same_features_and_tokens(tmp_path: Path) -> None:
    written = record()
    module = new_text_student(SHAPE, written.vocabulary, 12, seed=5)
    save_text_student(tmp_path / "text_student.pt", module, written)
    loaded, read = load_text_student(tmp_path / "text_student.pt")
    tokens = torch.from_numpy(read.tokenizer()(["a photo of a cat.", "Ü 日"]))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), module.eval()(tokens))
    assert (read.vocabulary, read.templates, read.metrics) == (written.vocabulary, written.templates, written.metrics)
    assert np.array_equal(Tokenizer(MERGES, CONTEXT, written.vocabulary)(["a photo of a cat."]), tokens[:1].numpy())


@pytest.mark.parametrize(
    "damage",
    [
        {"vocabulary": torch.arange(10)},
        {"vocabulary": torch.tensor([*ALWAYS, 600])},
        {"merges": "a b\n"},
        {"shape": {"width": 16}},
        {"state_dict": {}},
        {"class_vectors": torch.full((2, 12), torch.nan)},
        {"templates": []},
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    path = tmp_path / "text_student.pt"
    save_text_student(path, new_text_student(SHAPE, record().vocabulary, 12, seed=5), record())
    torch.save({**torch.load(path, weights_only=True), **damage}, path)
    with pytest.raises(CheckpointError) as caught:
        load_text_student(path)
    assert caught.value.path == path


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"format": "comkd-student/1"}, tmp_path / "student.pt")
    with pytest.raises(CheckpointError) as caught:
        load_text_student(tmp_path / "student.pt")
    assert caught.value.found == "comkd-student/1"
