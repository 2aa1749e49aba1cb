from comkd_cli.data.image_files import below_junk


def test_a_path_in_an_archive_is_junk_where_any_part_is() -> None:
    assert below_junk("a/__MACOSX/b.jpg")
    assert below_junk("./.git/b.jpg")
    assert not below_junk("./a/../b.jpg")
