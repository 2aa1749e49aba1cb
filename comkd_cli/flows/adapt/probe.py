"""`adapt: linear_probe`: the class vectors of a frozen CLIP, fitted to the labelled images."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from comkd_cli.data.loaders import worker_count
from comkd_cli.data.unreadable import check_unreadable
from comkd_cli.evaluation.features import Encoder, FeatureStore
from comkd_cli.evaluation.subjects import live_teacher
from comkd_cli.evaluation.zero_shot import Scorer
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.files import write_text
from comkd_cli.flows.adapt.stage import Stage1, check_labels, check_probe, teacher_record
from comkd_cli.method.linear_probe import Classifier, Labelled, Probe, fit_probe
from comkd_cli.models.backbones import build_clip, state_sha256
from comkd_cli.models.checkpoints import SavedTeacher
from comkd_cli.recipe.model import LinearProbeAdapt
from comkd_cli.runtime import collectives, ranks
from comkd_cli.teachers.class_vectors import encode_prompts


class ProbeAdaptation:
    """A linear probe on the image features of the recipe's CLIP."""

    def __init__(self, stage: Stage1, adapt: LinearProbeAdapt, device: torch.device, report: Report) -> None:
        """Load the CLIP. Raises DataError if too few images have labels; ModelError."""
        source = stage.adaptation_source
        check_labels(source, adapt.method)
        check_probe(source.train.labels or (), source.name)
        report(Stage(f"Teacher: fitting class vectors to {len(source.train)} labelled images of {source.name}"))
        self.stage, self.adapt, self.device, self.report = stage, adapt, device, report
        self.source = source
        self.clip = collectives.on_every_rank(lambda: build_clip(stage.recipe.teacher, report=report))
        self.clip.model.to(device)

    @property
    def image_tower(self) -> nn.Module:
        """The CLIP's."""
        tower: nn.Module = self.clip.model.visual  # type: ignore[assignment]
        return tower

    def fit(self) -> SavedTeacher:
        """The teacher with the fitted class vectors, or with the zero-shot ones if these are better on the
        validation images. Raises DataError if too many of the images could not be read.
        """
        images, zero_shot = self._images(), self._zero_shot()
        probe = self._fitted(images, zero_shot)
        self._report(probe)
        metrics = self._metrics(probe, len(images.labels))
        if ranks.is_main():
            write_text(self.stage.folder / "metrics.jsonl", json.dumps(metrics) + "\n")
        record = teacher_record(self.stage, self.source, self.clip, metrics, state_sha256(self.clip.model))
        return SavedTeacher(record, probe.classifier.vectors, probe.classifier.scale, {})

    def _images(self) -> Labelled:
        """The features of the centre crops of the labelled images."""
        data, train = self.stage.recipe.data, self.source.train
        store = FeatureStore(None, self.device, worker_count(data), self.report)
        found = store.features(Encoder("", self.clip.preprocessing, self.image_tower), train, "labelled images")
        check_unreadable(found.unreadable, len(train), data.unreadable_limit_percent, "labelled images")
        for problem in found.unreadable:
            self.report(Notice(f"unreadable, skipped: {problem}"))
        labels = torch.tensor(train.labels, dtype=torch.int64)[torch.from_numpy(found.indices)]
        check_probe(labels.tolist(), self.source.name)
        return Labelled(nn.functional.normalize(torch.from_numpy(found.values), dim=-1), labels)

    def _zero_shot(self) -> Classifier:
        source = self.source
        vectors = encode_prompts(self.clip, source.class_names, source.wording, self.device, self.report)
        log_scale: Tensor = self.clip.model.logit_scale  # type: ignore[assignment]
        return Classifier(vectors.cpu(), log_scale.detach().exp().cpu())

    def _fitted(self, images: Labelled, zero_shot: Classifier) -> Probe:
        """On the CPU of the main process, so that the result does not depend on the device or on their number."""
        adapt = self.adapt

        def fit() -> Probe | None:
            if not ranks.is_main():
                return None
            return fit_probe(images, zero_shot, adapt.strengths, adapt.validation_percent, adapt.seed)

        probe = collectives.broadcast(collectives.on_every_rank(fit))
        assert probe is not None  # the main process has fitted it
        return probe

    def _report(self, probe: Probe) -> None:
        found = f"{probe.top1_percent:.2f} % at strength {probe.strength:g}"
        if probe.improves:
            text = f"linear probe: top-1 {found}, zero-shot {probe.zero_shot_top1_percent:.2f} %"
        else:
            text = (
                f"linear probe: the zero-shot class vectors are kept, with top-1 {probe.zero_shot_top1_percent:.2f} %, "
                f"because no head is better; the best has {found}"
            )
        self.report(Notice(f"{text}, on {probe.validation_images} validation images"))

    def _metrics(self, probe: Probe, images: int) -> dict[str, float]:
        scorer = Scorer(
            self.source,
            self.device,
            worker_count(self.stage.recipe.data),
            self.report,
            self.stage.recipe.data.unreadable_limit_percent,
        )
        classifier = probe.classifier
        teacher = live_teacher(self.image_tower, classifier.vectors, classifier.scale, self.clip.preprocessing)
        return {
            "labelled_images": images,
            "validation_images": probe.validation_images,
            "validation_zero_shot_top1_percent": probe.zero_shot_top1_percent,
            "validation_top1_percent": probe.top1_percent,
            "strength": probe.strength,
            "zero_shot_kept": float(not probe.improves),
            **scorer(teacher),
        }
