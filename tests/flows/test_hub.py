"""A bundle that is pushed, pulled and used, against a Hub of our own; and what is refused."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from comkd_cli.cli.app import main
from comkd_cli.errors import BundleError, MisuseError
from comkd_cli.flows.hub import HubBundle, files_to_push
from tests import warm
from tests.hub import TOKEN, WritableHub, writable_hub


@pytest.fixture
def served() -> Iterator[tuple[str, type[WritableHub]]]:
    with writable_hub() as serving:
        yield serving


def test_addresses_are_read() -> None:
    assert HubBundle.parse("me/birds") == HubBundle("me/birds")
    assert HubBundle.parse("hf:me/birds-2.0@v1") == HubBundle("me/birds-2.0", "v1")
    for wrong in ("birds", "me/", "me/birds/more", "hf:", "https://huggingface.co/me/birds", "me/birds@"):
        with pytest.raises(MisuseError) as caught:
            HubBundle.parse(wrong)
        assert caught.value.found == repr(wrong)


def test_only_the_files_of_the_manifest_are_uploaded(colour_bundle: Path) -> None:
    (colour_bundle / "notes.txt").write_text("private")
    names = [file.name for file in files_to_push(colour_bundle)]
    assert names == ["classifier.onnx", "classes.txt", "manifest.json"]
    assert all(file.size == (colour_bundle / file.name).stat().st_size for file in files_to_push(colour_bundle))


def test_a_changed_file_is_not_uploaded(colour_bundle: Path) -> None:
    (colour_bundle / "classes.txt").write_text("black\nwhite\ngrey\n")
    with pytest.raises(BundleError) as caught:
        files_to_push(colour_bundle)
    assert caught.value.path == colour_bundle / "classes.txt"


def test_a_removed_reference_is_left_out(referenced: Path) -> None:
    assert any(file.name.startswith("reference/") for file in files_to_push(referenced))
    shutil.rmtree(referenced / "reference")
    assert not any(file.name.startswith("reference/") for file in files_to_push(referenced))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "c:\\x", ""])
def test_a_name_that_leaves_the_folder_is_refused(colour_bundle: Path, name: str) -> None:
    manifest = json.loads((colour_bundle / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["classes.txt"]
    (colour_bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as caught:
        files_to_push(colour_bundle)
    assert (caught.value.field, caught.value.found) == ("files", repr(name))


def test_a_dry_run_prints_the_files_and_uploads_nothing(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comkd_cli.flows.hub.HfApi", None)
    planned = CliRunner().invoke(main, ["push", str(colour_bundle), "me/colours", "--dry-run"])
    assert planned.exit_code == 0
    assert "classifier.onnx" in planned.stdout
    assert "to me/colours, private" in planned.stdout
    refused = CliRunner().invoke(main, ["push", str(colour_bundle), "me/colours@v1", "--dry-run"])
    assert refused.exit_code == 2


@pytest.mark.slow
def test_a_bundle_is_pushed_pulled_and_used(
    served: tuple[str, type[WritableHub]], colour_bundle: Path, tmp_path: Path
) -> None:
    url, handler = served
    own = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def comkd(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return warm.run(*arguments, cwd=tmp_path, env={**own, **variables}, hub=True)

    pushed = comkd("push", colour_bundle, "me/colours")
    assert pushed.returncode == 0, pushed.stderr
    assert handler.private == {"me/colours": True}
    assert handler.commits == [["classifier.onnx", "classes.txt", "manifest.json"]]
    assert "comkd predict hf:me/colours" in pushed.stdout
    assert "classifier.onnx" in pushed.stdout

    public = comkd("push", colour_bundle, "me/colours", "--public")
    assert (public.returncode, len(handler.commits)) == (2, 1), public.stderr

    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    answer = comkd("predict", "hf:me/colours", "red.png", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["predictions"][0]["classes"][0]["class"] == "red"
    again = comkd("predict", "hf:me/colours", "red.png", "--json", HF_HUB_OFFLINE="1")
    assert again.stdout == answer.stdout, again.stderr

    pulled = comkd("pull", "me/colours", "--out", "copy")
    assert pulled.returncode == 0, pulled.stderr
    for name in ("classifier.onnx", "classes.txt", "manifest.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (colour_bundle / name).read_bytes()
        assert not (tmp_path / "copy" / name).is_symlink()

    handler.files["me/colours/classes.txt"] = b"black\nwhite\ngrey\n"
    damaged = comkd("pull", "me/colours", "--out", "other", HF_HOME=str(tmp_path / "another"))
    assert damaged.returncode == 1
    assert "sha256 differs" in damaged.stderr
    assert not (tmp_path / "other").exists()
    stranger = comkd("pull", "me/colours", HF_TOKEN="hf_other", HF_HOME=str(tmp_path / "third"))
    assert stranger.returncode == 1
    assert "no such repository, or it is private" in stranger.stderr
    assert "Traceback" not in stranger.stderr
