import base64
import hashlib
import io
import json
import re
import shutil
import struct
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from comkd_cli.bundles import web
from comkd_cli.bundles.web import INTEGRITY, PAGE, PAGE_FILES, RUNTIME_FILES, VERSION, add_web_page
from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.images import Preprocessing, UnreadableImage, open_image, prepare
from comkd_cli.errors import ExportError
from tests.chromium import NAMES, Chromium, Tab, find_chromium
from tests.serving import serving

ADDED = {*PAGE_FILES, "ort/LICENSE", *(f"ort/{name}" for name in RUNTIME_FILES)}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- the page's own files ------------------------------------------------------------------------------


def test_the_page_names_no_file_that_is_not_added_and_no_other_server() -> None:
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page)
    assert sorted(named) == sorted(set(PAGE_FILES) - {"index.html"})
    for name in PAGE_FILES:
        addresses = re.findall(r"https?://[^\s'\"]+", (PAGE / name).read_text(encoding="utf-8"))
        assert set(addresses) <= {"http://localhost:8000/", "http://www.w3.org/2000/svg"}
    assert {path.name for path in PAGE.iterdir()} == {*PAGE_FILES, web.LICENCE}


def test_the_page_names_the_runtimes_files() -> None:
    script = (PAGE / "classify.js").read_text(encoding="utf-8")
    for name in RUNTIME_FILES:
        assert f'"ort/{name}"' in script


# --- a runtime that the user gives ---------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What stands for an unpacked onnxruntime-web package."""
    dist = tmp_path / "package" / "dist"
    dist.mkdir(parents=True)
    for name in (*RUNTIME_FILES, "ort.webgpu.min.js"):
        (dist / name).write_bytes(f"content of {name}".encode())
    return dist.parent


@pytest.mark.parametrize("given", ["", "dist"])
def test_the_page_and_the_runtimes_files_are_added_and_no_more(colour_bundle: Path, package: Path, given: str) -> None:
    before = files_of(colour_bundle)
    add_web_page(colour_bundle, package / given)
    assert files_of(colour_bundle) - before == ADDED
    for name in PAGE_FILES:
        assert (colour_bundle / name).read_bytes() == (PAGE / name).read_bytes()
    for name in RUNTIME_FILES:
        assert (colour_bundle / "ort" / name).read_bytes() == f"content of {name}".encode()
    assert "Microsoft" in (colour_bundle / "ort" / "LICENSE").read_text()


@pytest.mark.parametrize("missing", RUNTIME_FILES)
def test_a_package_without_one_of_the_files_is_named_and_nothing_is_added(
    colour_bundle: Path, package: Path, missing: str
) -> None:
    (package / "dist" / missing).unlink()
    before = files_of(colour_bundle)
    with pytest.raises(ExportError, match=missing) as caught:
        add_web_page(colour_bundle, package)
    assert (caught.value.path, caught.value.remedy) == (package, f"unpack onnxruntime-web {VERSION} there")
    assert files_of(colour_bundle) == before


# --- a runtime that npm brings -------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fetched runtime should be kept; empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "comkd" / f"onnxruntime-web-{VERSION}"


@pytest.fixture
def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a shell script in npm's place; it gets npm's arguments. Returns a file that it can write to."""

    def put(script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        said = tmp_path / "said.txt"
        (folder / "npm").write_text(f"#!/bin/sh\nSAID='{said}'\n{script}\n")
        (folder / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return said

    return put


def tarball(path: Path, members: Sequence[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def publish(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    """Let a tarball be the published one."""
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    monkeypatch.setattr(web, "INTEGRITY", f"sha512-{digest}")


WHOLE = [(f"package/dist/{name}", f"content of {name}".encode()) for name in RUNTIME_FILES]


def refusal(bundle: Path) -> ExportError:
    """The error of add_web_page, which must have added nothing."""
    before = files_of(bundle)
    with pytest.raises(ExportError) as caught:
        add_web_page(bundle)
    assert files_of(bundle) == before
    assert (caught.value.remedy or "").endswith("or specify the folder of the unpacked package with --web-runtime")
    return caught.value


def test_without_npm_the_remedy_is_named(colour_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert (refusal(colour_bundle).remedy or "").startswith("install Node.js")


def test_the_runtime_is_fetched_once_and_kept(
    colour_bundle: Path,
    cache: Path,
    tmp_path: Path,
    fake_npm: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [("package/package.json", b"{}"), ("package/dist/ort.webgpu.min.js", b"large")]
    publish(monkeypatch, tarball(tmp_path / "any.tgz", [*others, *WHOLE]))
    said = fake_npm(f'echo "$@" > "$SAID"; cp \'{tmp_path}/any.tgz\' whatever.tgz')
    add_web_page(colour_bundle)
    assert said.read_text().split()[:2] == ["pack", f"onnxruntime-web@{VERSION}"]
    assert files_of(cache.parent) == {f"{cache.name}/{name}" for name in RUNTIME_FILES}
    shutil.rmtree(colour_bundle / "ort")
    monkeypatch.setenv("PATH", "")
    add_web_page(colour_bundle)
    for name in RUNTIME_FILES:
        assert (colour_bundle / "ort" / name).read_bytes() == f"content of {name}".encode()


def test_a_package_that_is_not_the_published_one_is_refused(
    colour_bundle: Path, cache: Path, tmp_path: Path, fake_npm: Callable[[str], Path]
) -> None:
    tarball(tmp_path / "other.tgz", WHOLE)
    fake_npm(f"cp '{tmp_path}/other.tgz' onnxruntime-web-{VERSION}.tgz")
    assert "sha512 differs" in refusal(colour_bundle).problem
    assert not cache.exists()


def test_the_pinned_integrity_is_a_sha512() -> None:
    kind, _, digest = INTEGRITY.partition("-")
    assert (kind, len(base64.b64decode(digest, validate=True))) == ("sha512", 64)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'npm error code ENOTFOUND' >&2; echo 'npm error syscall getaddrinfo' >&2; "
            "echo 'npm error network request failed' >&2; exit 1",
            "network request failed",
        ),
        ("echo 'npm ERR! code E404' >&2; echo 'npm ERR! 404 Not Found' >&2; exit 1", "404 Not Found"),
        ("exit 1", "no reason"),
        ("exit 0", "no reason"),
    ],
)
def test_a_failure_of_npm_gives_its_reason(
    colour_bundle: Path, cache: Path, fake_npm: Callable[[str], Path], script: str, reason: str
) -> None:
    fake_npm(script)
    problem = refusal(colour_bundle).problem
    assert problem.startswith(f"npm could not fetch onnxruntime-web {VERSION}: ")
    assert reason in problem
    assert not cache.exists()


def link(name: str, kind: bytes, target: str) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


FIRST, SECOND = (f"package/dist/{name}" for name in RUNTIME_FILES)
HOSTILE = {
    "a link": [link(FIRST, tarfile.SYMTYPE, "/etc/passwd"), WHOLE[1]],
    "a hard link": [WHOLE[1], link(FIRST, tarfile.LNKTYPE, SECOND)],
    "a folder": [link(FIRST, tarfile.DIRTYPE, ""), WHOLE[1]],
    "a device": [link(FIRST, tarfile.CHRTYPE, ""), WHOLE[1]],
    "one missing": [WHOLE[0]],
    "other paths": [(f"../{FIRST}", b"x"), (f"/{FIRST}", b"x"), (f"package/dist/../dist/{FIRST}", b"x")],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_package_with_anything_else_in_a_files_place_is_refused(
    colour_bundle: Path,
    cache: Path,
    tmp_path: Path,
    fake_npm: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    publish(monkeypatch, tarball(tmp_path / "hostile.tgz", HOSTILE[kind]))
    fake_npm(f"cp '{tmp_path}/hostile.tgz' .")
    before = files_of(tmp_path)
    error = refusal(colour_bundle)
    assert (error.path, error.problem) == ("hostile.tgz", f"has no {RUNTIME_FILES[0]} or no {RUNTIME_FILES[1]}")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_damaged_package_is_refused(
    colour_bundle: Path,
    cache: Path,
    tmp_path: Path,
    fake_npm: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    content = tarball(tmp_path / "cut.tgz", [(FIRST, noise), (SECOND, noise[::-1])]).read_bytes()
    (tmp_path / "cut.tgz").write_bytes(content[: int(share * len(content))])
    publish(monkeypatch, tmp_path / "cut.tgz")
    fake_npm(f"cp '{tmp_path}/cut.tgz' .")
    error = refusal(colour_bundle)
    assert error.path == "cut.tgz"
    assert error.problem.startswith("could not be unpacked: ")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(
    colour_bundle: Path, tmp_path: Path, fake_npm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    publish(monkeypatch, tarball(tmp_path / "any.tgz", WHOLE))
    fake_npm(f"cp '{tmp_path}/any.tgz' .")
    error = refusal(colour_bundle)
    assert str(error.path).startswith(str(tmp_path / "file"))
    assert (error.remedy or "").startswith("set XDG_CACHE_HOME")


# --- in a browser --------------------------------------------------------------------------------------

slow = pytest.mark.slow
PROGRAM = find_chromium()
NEEDS_BROWSER = pytest.mark.needs_tool("|".join(NAMES), "npm")
# Until version 13 Pillow scaled the width first, whatever the picture; the page does as newer ones do.
WIDTH_FIRST = int(PIL.__version__.partition(".")[0]) < 13
UNKNOWN_HOST = "bundle.test"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert PROGRAM is not None
    # Another name for this machine, which browsers do not trust as they trust localhost.
    flags = [f"--host-resolver-rules=MAP {UNKNOWN_HOST} 127.0.0.1"]
    chromium = Chromium(PROGRAM, tmp_path_factory.mktemp("profile"), *flags)
    yield chromium
    chromium.close()


class Quiet(SimpleHTTPRequestHandler):
    """The server of `python -m http.server`, without its log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a folder's page."""
    with serving(partial(Quiet, directory=str(folder))) as port:
        yield f"http://{host}:{port}/index.html"


def record_of(tab: Tab) -> dict[str, Any]:
    """What the page leaves for programs, once it has written it."""
    record: dict[str, Any] = json.loads(tab.wait_for("document.getElementById('result')?.textContent"))
    return record


def answer(browser: Chromium, address: str) -> dict[str, Any]:
    with browser.open(address) as tab:
        return record_of(tab)


def sign(bundle: Path, preprocessing: Preprocessing, **fields: Any) -> Path:
    """Write the manifest of a bundle's files."""
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in bundle.iterdir()
        if path.is_file()
    }
    manifest = {
        "format": "comkd-bundle/1",
        "preprocessing": asdict(preprocessing),
        "precisions": {"fp32": {"classifier": "classifier.onnx", "image_encoder": "image_encoder.onnx"}},
        "files": files,
        **fields,
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return bundle


def export_convolutions(path: Path, seed: int = 0) -> None:
    """Write a graph of random convolutions for 32 x 32 pixels and 7 classes, to which every pixel matters."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Conv2d(8, 16, 3), nn.GELU()),
        *(nn.Flatten(), nn.Linear(16 * 13 * 13, 7)),
    )
    with torch.no_grad():
        net[-1].weight *= 8  # so that the classes' probabilities differ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (torch.zeros(2, 3, 32, 32),),
            path,
            input_names=["image"],
            output_names=["logits"],
            opset_version=18,
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


CLASSES = ("red fox", "badger & <cub>", "raccoon dog", "Mäusebussard", "貉", "</script>", "roe deer")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with convolutions in two precisions, the page, and pictures beside them."""
    folder = tmp_path_factory.mktemp("web") / "bundle"
    folder.mkdir()
    export_convolutions(folder / "classifier.onnx")
    export_convolutions(folder / "other.onnx", seed=1)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    sign(
        folder,
        Preprocessing(32, MEAN, STD),
        recipe="foxes",
        data="photos of foxes",
        classes=len(CLASSES),
        test_top1_percent=97.25,
        precisions={
            "fp32": {"classifier": "classifier.onnx", "image_encoder": "", "optimization": "all"},
            "fp16": {"classifier": "other.onnx", "image_encoder": "", "optimization": "basic"},
        },
    )
    add_web_page(folder)
    write_pictures(folder)
    return folder


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with soft shapes, as photos have them, so that JPEG keeps what it shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder: Path) -> None:
    random = np.random.default_rng(0)

    def noise(width: int, height: int, *channels: int) -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (height, width, *channels), dtype=np.uint8))

    def turned(orientation: int) -> Image.Exif:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return exif

    noise(32, 32, 3).save(folder / "exact.png")
    noise(101, 67, 3).save(folder / "landscape.png")
    noise(67, 101, 3).save(folder / "portrait.png")
    noise(41, 300, 3).save(folder / "tall.png")
    noise(300, 41, 3).save(folder / "wide.png")
    noise(3, 2, 3).save(folder / "tiny.png")
    noise(1, 1, 3).save(folder / "one pixel, 100%.png")
    noise(2400, 1900, 3).save(folder / "large.png", compress_level=1)
    noise(55, 71, 4).save(folder / "transparent.png")
    noise(55, 71, 2).save(folder / "grey-transparent.png")
    noise(70, 50).save(folder / "grey.png")
    noise(70, 50, 3).quantize(16).save(folder / "palette.png", transparency=bytes(range(0, 256, 16)))
    noise(70, 50, 3).save(folder / "lossless.webp", lossless=True)
    noise(70, 50, 3).save(folder / "plain.bmp")
    noise(70, 50, 3).quantize(32).save(folder / "plain.gif")
    scene(300, 201).save(folder / "photo.jpg", quality=90)
    for orientation in range(2, 9):
        scene(200, 121).save(folder / f"turned-{orientation}.jpg", exif=turned(orientation), quality=90)
    scene(120, 81).save(folder / "turned.png", exif=turned(6))


PICTURES = [
    *("exact.png", "landscape.png", "portrait.png", "tall.png", "wide.png", "tiny.png", "one pixel, 100%.png"),
    *("large.png", "transparent.png", "grey-transparent.png", "grey.png", "palette.png", "lossless.webp"),
    *("plain.bmp", "plain.gif", "photo.jpg", *(f"turned-{i}.jpg" for i in range(2, 9)), "turned.png"),
]


def named(address: str, picture: str, **parameters: str) -> str:
    from urllib.parse import urlencode

    return f"{address}?{urlencode({'image': picture, **parameters})}"


def agree(record: dict[str, Any], expected: Sequence[Any]) -> None:
    """The page's answer is the predictor's."""
    assert record["classes"][0]["class"] == expected[0].class_name
    assert [entry["probability"] for entry in record["classes"]] == pytest.approx(
        [prediction.probability for prediction in expected], abs=1e-3
    )
    assert {entry["class"] for entry in record["classes"]} == {prediction.class_name for prediction in expected}


@pytest.fixture(scope="module")
def open_page(bundle: Path, browser: Chromium) -> Iterator[Tab]:
    """A page whose address names an image with characters that addresses encode."""
    with served(bundle) as address, browser.open(named(address, "one pixel, 100%.png")) as tab:
        record_of(tab)
        yield tab


@slow
@NEEDS_BROWSER
@pytest.mark.parametrize("picture", sorted(PICTURES, key=lambda name: "100%" not in name))
def test_the_page_answers_as_the_predictor(bundle: Path, open_page: Tab, picture: str) -> None:
    result = "document.getElementById('result')?.textContent"
    if "100%" not in picture:
        open_page.run(f"takeNamed({json.dumps(picture)})")
    text = open_page.wait_for(result, lambda text: bool(text) and json.loads(text)["image"] == picture)
    record = json.loads(text)
    agree(record, Classifier(bundle).predict(bundle / picture))


@slow
@NEEDS_BROWSER
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_page_prepares_pictures_as_the_predictor_bit_by_bit(
    bundle: Path, browser: Chromium, interpolation: str, resize_mode: str
) -> None:
    script = """(async (name, preprocessing) => {
        const picture = await decode(await (await fetch(encodeURIComponent(name))).blob());
        const bytes = new Uint8Array(prepare(picture, preprocessing).buffer);
        return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
    })"""
    with served(bundle) as address, browser.open(address) as tab:
        tab.wait_for("document.readyState === 'complete' && typeof prepare === 'function'")
        for picture in PICTURES:
            for size in (24, 33):
                settings = Preprocessing(size, MEAN, STD, interpolation, resize_mode)
                got = tab.run(f"{script}({json.dumps(picture)}, {json.dumps(asdict(settings))})")
                values = np.frombuffer(base64.b64decode(got), dtype="<f4").reshape(3, size, size)
                expected = prepare(open_image(bundle / picture), settings)
                if WIDTH_FIRST:
                    assert np.allclose(values, expected, atol=4 / 255 / min(STD)), (picture, size)
                else:
                    assert np.array_equal(values, expected), (picture, size)


@slow
@NEEDS_BROWSER
def test_the_page_tells_colours_apart_and_knows_a_manifests_defaults(colour_bundle: Path, browser: Chromium) -> None:
    add_web_page(colour_bundle)
    for name, colour in {"red": (250, 10, 20), "green": (15, 240, 5), "blue": (0, 30, 255)}.items():
        Image.new("RGB", (20, 12), colour).save(colour_bundle / f"{name}.png")
        with served(colour_bundle) as address:
            record = answer(browser, named(address, f"{name}.png"))
        assert record["classes"][0]["class"] == name
        assert len(record["classes"]) == 3
        agree(record, Classifier(colour_bundle).predict(colour_bundle / f"{name}.png"))


@slow
@NEEDS_BROWSER
def test_the_page_answers_none_of_these_as_the_predictor(colour_bundle: Path, browser: Chromium) -> None:
    add_web_page(colour_bundle)
    path = colour_bundle / "manifest.json"
    threshold = {"score": "max_probability", "value": 0.9, "classes": {"green": 0.0}}
    fields = {"calibration": {"temperature": 3.0}, "threshold": threshold}
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    for name, colour in {"red": (250, 10, 20), "grey": (128, 105, 78), "green": (100, 120, 80)}.items():
        Image.new("RGB", (20, 12), colour).save(colour_bundle / f"{name}.png")
    classifier = Classifier(colour_bundle)
    found = []
    with served(colour_bundle) as address:
        for name in ("red", "grey", "green"):
            with browser.open(named(address, f"{name}.png")) as tab:
                record = record_of(tab)
                assert tab.run("document.getElementById('none').hidden") is not record["none_of_these"]
            expected = classifier.predict(colour_bundle / f"{name}.png")
            agree(record, expected)
            assert record["none_of_these"] is classifier.is_none_of_these(expected)
            found.append(record["none_of_these"])
        assert answer(browser, named(address, "grey.png", threshold="off"))["none_of_these"] is None
    assert set(found) == {True, False}


@slow
@NEEDS_BROWSER
def test_another_precision_can_be_selected(bundle: Path, browser: Chromium) -> None:
    with served(bundle) as address:
        record = answer(browser, named(address, "photo.jpg", precision="fp16"))
        refused = answer(browser, named(address, "photo.jpg", precision="int8"))
    agree(record, Classifier(bundle, precision="fp16").predict(bundle / "photo.jpg"))
    assert refused["error"] == "manifest.json: precisions: not in the bundle: int8 (allowed: fp32, fp16)"


@slow
@NEEDS_BROWSER
def test_class_vectors_that_are_an_input_are_given(tmp_path: Path, browser: Chromium) -> None:
    from onnx import TensorProto, helper, save

    def value(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("ReduceMean", ["image"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Transpose", ["class_vectors"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["means", "columns"], ["logits"]),
    ]
    inputs = [value("image", "batch", 3, 8, 8), value("class_vectors", "classes", 3)]
    graph = helper.make_graph(nodes, "candidates", inputs, [value("logits", "batch", "classes")])
    folder = tmp_path / "bundle"
    folder.mkdir()
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "classifier.onnx"
    )
    (folder / "classes.txt").write_text("a\nb\n")
    np.save(folder / "class_vectors.npy", np.array([[1, -2, 0.5], [0.25, 1, -1]], dtype=np.float32))
    sign(folder, Preprocessing(8, MEAN, STD), memory="candidates")
    add_web_page(folder)
    scene(40, 30).save(folder / "photo.png")
    with served(folder) as address:
        record = answer(browser, named(address, "photo.png"))
    agree(record, Classifier(folder).predict(folder / "photo.png"))


@slow
@NEEDS_BROWSER
def test_pictures_are_chosen_dropped_and_pasted(bundle: Path, browser: Chromium) -> None:
    event = """(async (kind, name) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([await (await fetch(name)).blob()], "given.png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
        document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, options) : new ClipboardEvent(kind, options));
    })"""
    with served(bundle) as address, browser.open(address) as tab:
        tab.wait_for("document.getElementById('status')?.textContent", lambda text: text == "Ready for a picture.")
        document = tab.call("DOM.getDocument")["root"]["nodeId"]
        chooser = tab.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        tab.call("DOM.setFileInputFiles", nodeId=chooser, files=[str(bundle / "landscape.png")])
        assert record_of(tab)["image"] == "landscape.png"
        for kind, picture in (("drop", "portrait.png"), ("paste", "grey.png")):
            tab.run(f"{event}({json.dumps(kind)}, {json.dumps(picture)})")
            record = record_of(tab)
            assert record["image"] == "given.png"
            agree(record, Classifier(bundle).predict(bundle / picture))
        assert tab.run("document.getElementById('picture').naturalWidth") == 70
        tab.run("document.body.dispatchEvent(new DragEvent('drop', {bubbles: true, dataTransfer: new DataTransfer()}))")
        assert "The dropped item is not a file" in tab.text()


@slow
@NEEDS_BROWSER
def test_of_pictures_in_quick_succession_the_last_is_answered(bundle: Path, browser: Chromium) -> None:
    script = """(async () => {
        const files = await Promise.all(["photo.jpg", "grey.png", "tall.png"].map(async (name) =>
            new File([await (await fetch(name)).blob()], name)));
        for (const file of files) take(file);
    })()"""
    with served(bundle) as address, browser.open(named(address, "portrait.png")) as tab:
        record_of(tab)
        tab.run(script)
        record = record_of(tab)
        assert record["image"] == "tall.png"
        agree(record, Classifier(bundle).predict(bundle / "tall.png"))


@slow
@NEEDS_BROWSER
def test_what_the_page_shows_comes_from_the_bundle(bundle: Path, browser: Chromium) -> None:
    with served(bundle) as address, browser.open(named(address, "photo.jpg")) as tab:
        record = record_of(tab)
        tab.run("document.getElementById('about').open = true")
        shown = tab.text()
        for text in ("foxes", "photos of foxes", "7 classes", "97.25 %", "sha256 as in manifest.json"):
            assert text in shown
        assert [entry["class"] for entry in record["classes"]] == tab.run(
            "[...document.querySelectorAll('#classes .name')].map((name) => name.textContent)"
        )
        assert tab.run("document.title") == "foxes"
        server = address.removesuffix("index.html")
        loaded = tab.run("performance.getEntriesByType('resource').map(({ name }) => name)")
        assert {f"{server}ort/{name}" for name in RUNTIME_FILES} <= set(loaded)
        assert all(name.startswith((server, f"blob:{server}", "data:")) for name in loaded)


@slow
@NEEDS_BROWSER
def test_the_camera_is_offered_where_there_is_one(bundle: Path, browser: Chromium, tmp_path: Path) -> None:
    hidden = "document.getElementById('camera')?.hidden"
    with served(bundle) as address:
        with browser.open(named(address, "photo.jpg")) as tab:
            record_of(tab)
            assert tab.run(hidden) is True
        assert PROGRAM is not None
        flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        filming = Chromium(PROGRAM, tmp_path / "profile", *flags)
        try:
            with filming.open(address) as tab:
                tab.wait_for(hidden, lambda value: value is False)
                tab.run("document.getElementById('camera').click()")
                tab.wait_for("document.getElementById('video').videoWidth > 0")
                tab.run("document.getElementById('shoot').click()")
                record = record_of(tab)
                assert (record["image"], len(record["classes"])) == ("camera.png", 5)
                assert tab.run("document.getElementById('video').srcObject") is None
        finally:
            filming.close()


# --- what the page says of what is wrong ---------------------------------------------------------------


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to change."""
    return Path(shutil.copytree(bundle, tmp_path / "damaged"))


@slow
@NEEDS_BROWSER
def test_a_page_opened_as_a_file_says_how_to_serve_it(bundle: Path, browser: Chromium) -> None:
    with browser.open((bundle / "index.html").as_uri()) as tab:
        assert "python -m http.server" in record_of(tab)["error"]
        assert "python -m http.server" in tab.text()


@slow
@NEEDS_BROWSER
@pytest.mark.parametrize("name", ["manifest.json", "classes.txt", "classifier.onnx", f"ort/{RUNTIME_FILES[0]}"])
def test_a_missing_file_is_named(damaged: Path, browser: Chromium, name: str) -> None:
    (damaged / name).unlink()
    with served(damaged) as address:
        record = answer(browser, named(address, "photo.jpg"))
    assert record == {"image": "photo.jpg", "error": f"{name}: is missing from the folder of this page"}


@slow
@NEEDS_BROWSER
@pytest.mark.parametrize("name", ["classes.txt", "classifier.onnx"])
def test_a_changed_file_is_named(damaged: Path, browser: Chromium, name: str) -> None:
    content = bytearray((damaged / name).read_bytes())
    content[0] ^= 1
    (damaged / name).write_bytes(content)
    with served(damaged) as address:
        record = answer(browser, named(address, "photo.jpg"))
    problem = "is not the file that was exported: its sha256 differs from that in manifest.json"
    assert record["error"] == f"{name}: {problem}; export the bundle again"


@slow
@NEEDS_BROWSER
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "comkd-bundle/2"}, "manifest.json: is not a manifest of format comkd-bundle/1"),
        ({"precisions": None}, "manifest.json: precisions: missing"),
        ({"precisions": {}}, "manifest.json: precisions: should name the graphs of at least one precision"),
        ({"files": {}}, "manifest.json: files: has no sha256 of classes.txt"),
        (
            {"preprocessing": {"size": 8, "interpolation": "lanczos"}},
            "manifest.json: preprocessing: interpolation should be bicubic or bilinear, not 'lanczos'",
        ),
        (
            {"threshold": {"score": "energy", "value": 0.5}},
            "manifest.json: threshold.score: is not max_probability",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(
    damaged: Path, browser: Chromium, fields: dict[str, Any], message: str
) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text(encoding="utf-8"))
    (damaged / "manifest.json").write_text(json.dumps({**manifest, **fields}), encoding="utf-8")
    with served(damaged) as address:
        assert answer(browser, address) == {"error": message}


@slow
@NEEDS_BROWSER
def test_a_graph_that_the_runtime_refuses_is_named(damaged: Path, browser: Chromium) -> None:
    (damaged / "classifier.onnx").write_bytes(b"no graph")
    sign(damaged, Preprocessing(32, MEAN, STD))
    with served(damaged) as address:
        record = answer(browser, named(address, "photo.jpg"))
    assert record["error"].startswith("classifier.onnx: this browser could not load it: ")


@slow
@NEEDS_BROWSER
def test_an_image_that_cannot_be_read_is_named_and_the_next_is_classified(bundle: Path, browser: Chromium) -> None:
    (bundle / "odd.png").write_text("no picture")
    with served(bundle) as address:
        gone = answer(browser, named(address, "gone.png"))
        # An address of another server is only the name of a file that is not there.
        elsewhere = answer(browser, named(address, "//127.0.0.1:1/x.png"))
        with browser.open(named(address, "odd.png")) as tab:
            odd = record_of(tab)
            tab.run("takeNamed('photo.jpg')")
            record = json.loads(
                tab.wait_for("document.getElementById('result').textContent", lambda text: "photo.jpg" in text)
            )
    assert gone == {"image": "gone.png", "error": "gone.png: is missing from the folder of this page"}
    assert elsewhere["error"] == "//127.0.0.1:1/x.png: is missing from the folder of this page"
    assert odd["error"].startswith("odd.png: could not be read as an image")
    agree(record, Classifier(bundle).predict(bundle / "photo.jpg"))


def stated(kind: str, width: int, height: int) -> bytes:
    """A small file whose header states a size; a PNG that holds as many pixels as it states."""
    buffer = io.BytesIO()
    if kind == "png":
        Image.new("RGB", (width, height)).save(buffer, kind)
        return buffer.getvalue()
    Image.new("RGB", (8, 8)).save(buffer, kind, **({"exif": Image.Exif()} if kind == "jpeg" else {}))
    content = bytearray(buffer.getvalue())
    order, place = {"jpeg": (">HH", content.find(b"\xff\xc0") + 5), "gif": ("<HH", 6), "bmp": ("<ii", 18)}[kind]
    sides = (height, width) if kind == "jpeg" else (width, height)
    content[place : place + struct.calcsize(order)] = struct.pack(order, *sides)
    return bytes(content)


@slow
@NEEDS_BROWSER
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp"])
def test_an_image_that_the_predictor_refuses_for_its_size_is_refused_with_the_same_words(
    colour_bundle: Path, browser: Chromium, kind: str
) -> None:
    size = (1, 20_000) if kind == "png" else (65_500, 65_500)
    name = f"odd.{kind}"
    add_web_page(colour_bundle)
    (colour_bundle / name).write_bytes(stated(kind, *size))
    with served(colour_bundle) as address:
        record = answer(browser, named(address, name))
    with pytest.raises(UnreadableImage) as caught:
        Classifier(colour_bundle).predict(colour_bundle / name)
    remedy = "crop the image" if kind == "png" else "make it smaller"
    assert record["error"].endswith(remedy)
    assert str(caught.value).endswith(remedy)
    assert record["error"].startswith(f"{name}: {size[0]} x {size[1]} pixels: ")


@slow
@NEEDS_BROWSER
def test_without_a_secure_page_files_are_not_checked_and_the_page_says_so(bundle: Path, browser: Chromium) -> None:
    with served(bundle, UNKNOWN_HOST) as address, browser.open(named(address, "photo.jpg")) as tab:
        record = record_of(tab)
        assert tab.run("isSecureContext") is False
        tab.run("document.getElementById('about').open = true")
        assert "not checked" in tab.text()
    agree(record, Classifier(bundle).predict(bundle / "photo.jpg"))
