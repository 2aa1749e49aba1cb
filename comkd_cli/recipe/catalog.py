"""The datasets of the evaluation suite as plain data: where each is, and how many images it must have.

Folders are those of CoOp (KaiyangZhou/CoOp, DATASETS.md), so that a data root prepared for CoOp, MaPLe,
PromptSRC or PromptKD is read as it is. Templates are those of CoOp's zero-shot CLIP; base and new test
counts are those of PromptKD's supplement, table 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["split", "aircraft", "imagenet", "imagenet-variant"]


@dataclass(frozen=True)
class Dataset:
    """The facts about a dataset that are known before its files are read."""

    name: str
    folder: str
    """Below the data root."""
    layout: Layout
    """`split`: a json file lists every image; `aircraft`: text files do; `imagenet`: folders do, for train
    and test; `imagenet-variant`: folders do, only for test."""
    images: str
    """Below `folder`: what the listed paths start from; empty for `folder` itself."""
    classes: int
    train: int
    val: int
    test: int
    """Images of each split; 0 if there is no such split."""
    template: str = "a photo of a {}."
    split_file: str | None = None
    base_test: int | None = None
    new_test: int | None = None
    """Test images of the first half of the classes and of the second."""
    archive: str | None = None
    """Its file on the Hub mirror; None if it has none."""
    origin: str = ""
    """Where to download it by hand."""


CATALOG = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="imagenet",
            folder="imagenet",
            layout="imagenet",
            images="images",
            classes=1000,
            train=1281167,
            val=0,
            test=50000,
            base_test=25000,
            new_test=25000,
            origin="image-net.org, ILSVRC 2012 (needs an account): images/train and images/val, with class folders",
        ),
        Dataset(
            name="caltech101",
            folder="caltech-101",
            layout="split",
            images="101_ObjectCategories",
            split_file="split_zhou_Caltech101.json",
            classes=100,
            train=4128,
            val=1649,
            test=2465,
            base_test=1549,
            new_test=916,
            archive="caltech-101.zip",
        ),
        Dataset(
            name="oxford_pets",
            folder="oxford_pets",
            layout="split",
            images="images",
            split_file="split_zhou_OxfordPets.json",
            classes=37,
            train=2944,
            val=736,
            test=3669,
            template="a photo of a {}, a type of pet.",
            base_test=1881,
            new_test=1788,
            archive="oxford_pets.zip",
        ),
        Dataset(
            name="stanford_cars",
            folder="stanford_cars",
            layout="split",
            images="",
            split_file="split_zhou_StanfordCars.json",
            classes=196,
            train=6509,
            val=1635,
            test=8041,
            base_test=4002,
            new_test=4039,
            archive="stanford_cars.zip",
        ),
        Dataset(
            name="oxford_flowers",
            folder="oxford_flowers",
            layout="split",
            images="jpg",
            split_file="split_zhou_OxfordFlowers.json",
            classes=102,
            train=4093,
            val=1633,
            test=2463,
            template="a photo of a {}, a type of flower.",
            base_test=1053,
            new_test=1410,
            archive="oxford_flowers.zip",
        ),
        Dataset(
            name="food101",
            folder="food-101",
            layout="split",
            images="images",
            split_file="split_zhou_Food101.json",
            classes=101,
            train=50500,
            val=20200,
            test=30300,
            template="a photo of {}, a type of food.",
            base_test=15300,
            new_test=15000,
            archive="food101.zip",
        ),
        Dataset(
            name="fgvc_aircraft",
            folder="fgvc_aircraft",
            layout="aircraft",
            images="images",
            classes=100,
            train=3334,
            val=3333,
            test=3333,
            template="a photo of a {}, a type of aircraft.",
            base_test=1666,
            new_test=1667,
            archive="fgvc_aircraft.zip",
        ),
        Dataset(
            name="sun397",
            folder="sun397",
            layout="split",
            images="SUN397",
            split_file="split_zhou_SUN397.json",
            classes=397,
            train=15880,
            val=3970,
            test=19850,
            base_test=9950,
            new_test=9900,
            archive="sun397.zip",
        ),
        Dataset(
            name="dtd",
            folder="dtd",
            layout="split",
            images="images",
            split_file="split_zhou_DescribableTextures.json",
            classes=47,
            train=2820,
            val=1128,
            test=1692,
            template="{} texture.",
            base_test=864,
            new_test=828,
            archive="dtd.zip",
        ),
        Dataset(
            name="eurosat",
            folder="eurosat",
            layout="split",
            images="2750",
            split_file="split_zhou_EuroSAT.json",
            classes=10,
            train=13500,
            val=5400,
            test=8100,
            template="a centered satellite photo of {}.",
            base_test=4200,
            new_test=3900,
            archive="eurosat.zip",
        ),
        Dataset(
            name="ucf101",
            folder="ucf101",
            layout="split",
            images="UCF-101-midframes",
            split_file="split_zhou_UCF101.json",
            classes=101,
            train=7639,
            val=1898,
            test=3783,
            template="a photo of a person doing {}.",
            base_test=1934,
            new_test=1849,
            archive="ucf101.zip",
        ),
        Dataset(
            name="imagenetv2",
            folder="imagenetv2",
            layout="imagenet-variant",
            images="imagenetv2-matched-frequency-format-val",
            classes=1000,
            train=0,
            val=0,
            test=10000,
            origin="the matched-frequency set of modestyachts/ImageNetV2; a folder 0..999 for each class",
        ),
        Dataset(
            name="imagenet_sketch",
            folder="imagenet-sketch",
            layout="imagenet-variant",
            images="images",
            classes=1000,
            train=0,
            val=0,
            test=50889,
            origin="HaohanWang/ImageNet-Sketch; a folder nXXXXXXXX for each class",
        ),
        Dataset(
            name="imagenet_a",
            folder="imagenet-adversarial",
            layout="imagenet-variant",
            images="imagenet-a",
            classes=200,
            train=0,
            val=0,
            test=7500,
            origin="hendrycks/natural-adv-examples; a folder nXXXXXXXX for each class",
        ),
        Dataset(
            name="imagenet_r",
            folder="imagenet-rendition",
            layout="imagenet-variant",
            images="imagenet-r",
            classes=200,
            train=0,
            val=0,
            test=30000,
            origin="hendrycks/imagenet-r; a folder nXXXXXXXX for each class",
        ),
    )
}
