"""The few-shot methods beside scikit-learn and the released Tip-Adapter procedure, on made features.

    python -m benchmarks.few_shot [--classes 100] [--test 5000] [--shots 1 2 4 8 16] [--seeds 1 2 3]
    python -m benchmarks.few_shot --classes 1000 --test 50000 --no-val --reference-shots

Each draw goes through the linear probe, Tip-Adapter and Tip-Adapter-F, as in `comkd evaluate --protocol few-shot`, from
features on the device. Then the draws of --reference-shots, with the first seed, are also given to scikit-learn's
LogisticRegression, by the same search for C on the same float64 features, and to the released procedure of Tip-Adapter,
written from its description (arXiv 2207.09519): dense one-hot labels, every alpha with every beta, autograd. --no-val:
no validation images, as ImageNet has none; C, alpha and beta are then fixed. The features are unit vectors around a
direction of each class and one that all share. Prints one JSON document: the seconds of all draws, and for the draws of
--reference-shots the seconds of both, their ratio, the share of equal answers, and the difference of accuracies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from comkd_cli.edge.machine import cpu_name, peak_bytes, usable_cores
from comkd_cli.evaluation.linear_probe import DEFAULT_C, best_c, linear_probe
from comkd_cli.evaluation.tip_adapter import tip_adapter
from comkd_cli.method.linear_probe import Classifier, Labelled
from comkd_cli.runtime.devices import best_device

METHODS = ("linear-probe", "tip-adapter", "tip-adapter-f")
VAL_SHOTS = 4
SCALE = 100.0  # of CLIP's logits
COMMON, OF_CLASS, NOISE, TEXT_NOISE = 1.5, 0.7, 6.0, 1.0  # lengths of the parts of a feature, for each dimension

Answer = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Draw:
    """Made features of a draw, on a device."""

    seed: int
    train: Labelled
    val: Labelled
    test: Labelled
    classifier: Classifier

    def methods(self) -> dict[str, Answer]:
        """comkd's methods, each giving the classes of the test images."""
        plain = (self.train, self.val, self.test.features, self.classifier)
        return {
            "linear-probe": lambda: linear_probe(self.train, self.val, self.test.features),
            "tip-adapter": lambda: tip_adapter(*plain, None),
            "tip-adapter-f": lambda: tip_adapter(*plain, self.seed),
        }

    def references(self) -> dict[str, Answer]:
        """The same methods by scikit-learn and by Tip-Adapter's released procedure."""
        return {
            "linear-probe": lambda: scikit_learn(self),
            "tip-adapter": lambda: released_tip_adapter(self, fine_tuned=False),
            "tip-adapter-f": lambda: released_tip_adapter(self, fine_tuned=True),
        }


class Features:
    """Draws features of some classes; the test images and class vectors are the same for every draw."""

    def __init__(self, classes: int, dim: int, test: int, device: torch.device) -> None:
        self._device, self._classes, self._dim = device, classes, dim
        self._random = torch.Generator().manual_seed(0)
        self._common = COMMON * self._normal(dim)
        self._centres = OF_CLASS * self._normal(classes, dim)
        self._spread = NOISE * torch.exp(-torch.arange(dim) / (dim / 4)).sqrt()  # few directions hold most of it
        self.test = self._images(torch.arange(test) % classes)
        vectors = normalize(self._centres + TEXT_NOISE * self._normal(classes, dim), dim=1)
        self.classifier = Classifier(vectors.to(device), torch.tensor(SCALE, device=device))

    def draw(self, shots: int, seed: int, val: bool) -> Draw:
        """`shots` training images of each class, and with `val` the validation images that the protocol allows."""
        self._random.manual_seed(1000 * shots + seed)
        labels = torch.arange(self._classes)
        train = self._images(labels.repeat_interleave(shots))
        held = self._images(labels.repeat_interleave(min(shots, VAL_SHOTS) if val else 0))
        return Draw(seed, train, held, self.test, self.classifier)

    def _images(self, labels: Tensor) -> Labelled:
        noise = self._spread * self._normal(len(labels), self._dim)
        features = normalize(self._common + self._centres[labels] + noise, dim=1)
        return Labelled(features.to(self._device), labels.to(self._device))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random)


def scikit_learn(draw: Draw) -> np.ndarray:
    """The linear probe by scikit-learn, one fit after another."""
    from sklearn.linear_model import LogisticRegression

    train, val, test = (part.features.cpu().double().numpy() for part in (draw.train, draw.val, draw.test))
    labels, val_labels = (part.labels.cpu().numpy() for part in (draw.train, draw.val))

    def fitted(c: float) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it suspects a regression where each class has one image
            return LogisticRegression(C=c, max_iter=1000).fit(train, labels)

    c = DEFAULT_C
    if len(val):
        c = best_c(lambda cs: [float(np.mean(fitted(each).predict(val) == val_labels)) for each in cs])
    predicted: np.ndarray = fitted(c).predict(test)
    return predicted


def released_tip_adapter(draw: Draw, fine_tuned: bool) -> np.ndarray:
    """Tip-Adapter as its released procedure is described; the last epoch counts, as comkd has it."""
    classifier = draw.classifier
    values = one_hot(draw.train.labels, len(classifier.vectors)).float()
    adapter = nn.Linear(*reversed(draw.train.features.shape), bias=False, device=values.device)
    adapter.weight = nn.Parameter(draw.train.features.clone())

    def logits(features: Tensor, affinity: Tensor, alpha: float, beta: float) -> Tensor:
        clip = classifier.scale * features @ classifier.vectors.T
        return clip + alpha * (torch.exp(-beta * (1 - affinity)) @ values)

    if fine_tuned:
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, eps=1e-4)
        batches = -(-len(values) // 256)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20 * batches)
        order = torch.Generator().manual_seed(draw.seed)
        for _ in range(20):
            for chosen in torch.split(torch.randperm(len(values), generator=order), 256):
                features, labels = draw.train.features[chosen], draw.train.labels[chosen]
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits(features, adapter(features), 1.0, 5.5), labels).backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        best, alpha, beta = -1.0, 1.0, 5.5
        affinity = adapter(draw.val.features)
        for tried_beta in [0.1 + i * (7 - 0.1) / 200 for i in range(200)] if len(draw.val.labels) else []:
            for tried_alpha in [0.1 + i * (3 - 0.1) / 20 for i in range(20)]:
                found = logits(draw.val.features, affinity, tried_alpha, tried_beta).argmax(dim=1)
                accuracy = float((found == draw.val.labels).float().mean())
                if accuracy > best:
                    best, alpha, beta = accuracy, tried_alpha, tried_beta
        answers = logits(draw.test.features, adapter(draw.test.features), alpha, beta).argmax(dim=1)
    return answers.cpu().numpy()


def timed(answer: Answer) -> tuple[np.ndarray, float, float]:
    """The answers, the seconds that they took, and the seconds of processor time of all threads."""
    started, processor = time.perf_counter(), time.process_time()
    found = answer()  # an array on the CPU: the device has ended its work
    return found, time.perf_counter() - started, time.process_time() - processor


def compared(draw: Draw) -> dict[str, Any]:
    """Both programs on a draw: seconds, their ratio, the share of equal answers, and accuracies."""
    labels, report = draw.test.labels.cpu().numpy(), {}
    for name, reference in draw.references().items():
        ours, seconds, processor = timed(draw.methods()[name])
        theirs, reference_seconds, reference_processor = timed(reference)
        top1, reference_top1 = (float(100 * np.mean(found == labels)) for found in (ours, theirs))
        report[name] = {
            "seconds": seconds,
            "reference_seconds": reference_seconds,
            "over_reference": seconds / reference_seconds,
            "processor_seconds": processor,
            "reference_processor_seconds": reference_processor,
            "equal_answers_percent": float(100 * np.mean(ours == theirs)),
            "top1_percent": top1,
            "top1_difference_points": top1 - reference_top1,
        }
    return report


def measured(draws: Sequence[Callable[[], Draw]]) -> dict[str, float]:
    """The seconds of each method over all draws, which are made one after another."""
    seconds = dict.fromkeys(METHODS, 0.0)
    for number, make in enumerate(draws, 1):
        for name, answer in make().methods().items():
            seconds[name] += timed(answer)[1]
        print(f"draw {number} of {len(draws)}: {sum(seconds.values()):.1f} s so far", file=sys.stderr)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--test", type=int, default=5000, help="test images")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-val", dest="val", action="store_false")
    parser.add_argument("--reference-shots", type=int, nargs="*", default=[16])
    options = parser.parse_args()
    device = best_device()
    features = Features(options.classes, options.dim, options.test, device)
    seconds = measured(
        [partial(features.draw, shots, seed, options.val) for seed in options.seeds for shots in options.shots]
    )
    document = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": vars(options),
        "seconds": seconds,
        "seconds_in_all": sum(seconds.values()),
        "peak_memory_bytes": peak_bytes(),
        "compared": {
            shots: compared(features.draw(shots, options.seeds[0], options.val)) for shots in options.reference_shots
        },
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
