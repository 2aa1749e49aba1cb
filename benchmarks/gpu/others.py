"""What is measured beside the steps of stage 2: the cache, stage 1, few-shot methods, fp16 and SyncBatchNorm."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import distributed
from torch.nn import functional

from benchmarks.gpu.measure import Meter, flops
from benchmarks.gpu.steps import Pair, Setup
from comkd_cli.data.loaders import Batch
from comkd_cli.evaluation.linear_probe import linear_probe
from comkd_cli.evaluation.tip_adapter import tip_adapter
from comkd_cli.method.linear_probe import Classifier, Labelled
from comkd_cli.method.prompt_src import prompt_src_terms
from comkd_cli.models.backbones import build_image_tower
from comkd_cli.recipe.model import PromptSrcAdapt
from comkd_cli.teachers.cached import BATCH_SIZE, Clock, encoded_batches
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache
from comkd_cli.training.optimizer import make_optimizer


def cache_filling(pair: Pair, accelerator: Accelerator, meter: Meter, batches: int) -> dict[str, Any]:
    """Crops per second from page-locked memory to the features on disk, without decoding, and of the teacher alone."""
    setup = Setup(pair, 10, accelerator)
    images, _ = setup.images(BATCH_SIZE)

    def inputs() -> Iterator[Batch]:
        for number in range(batches):
            yield Batch((images,), None, torch.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE))

    with tempfile.TemporaryDirectory() as folder:
        dim = setup.teacher.class_vectors.shape[1]
        cache = TeacherCache(Path(folder), CacheKey("0" * 64, batches * BATCH_SIZE, dim, 1, "fp16"))

        def fill() -> None:
            for indices, features, _problems in encoded_batches(
                setup.teacher, inputs(), accelerator, Clock(accelerator.device)
            ):
                cache.put(0, indices, features)
                cache.mark(0, indices)

        whole = meter.rate(fill, batches * BATCH_SIZE)
    on_device = images.to(accelerator.device)

    def encode() -> None:
        with accelerator.autocast():
            setup.teacher.encode(on_device)

    teacher = meter.rate(encode, BATCH_SIZE)
    return {"filling": whole, "teacher_alone": teacher}


def stage_1(pair: Pair, classes: int, batch: int, accelerator: Accelerator, meter: Meter) -> dict[str, Any] | None:
    """A step of PromptSRC."""
    adapt = PromptSrcAdapt()
    prompted = pair.prompted()
    module = prompted.module.to(accelerator.device).train()
    tokens = prompted.tokens([f"thing number {number}" for number in range(classes)]).to(accelerator.device)
    optimizer = make_optimizer(module, adapt, {})
    size = prompted.clip.preprocessing.size
    images = torch.randn(batch, 3, size, size, device=accelerator.device)
    labels = torch.arange(batch, device=accelerator.device) % classes
    with torch.no_grad(), accelerator.autocast():
        frozen = module.encode_classes(tokens)

    def step() -> None:
        with accelerator.autocast():
            output = module(images, tokens, frozen, adapt.classes_at_once)
            weights = (adapt.text_weight, adapt.image_weight, adapt.logits_weight)
            total = torch.stack(list(prompt_src_terms(output, labels, frozen, *weights).values())).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    arithmetic = flops(step) / batch
    found = meter.rate(step, batch)
    if found is None:
        return None
    return {**found, "share_of_bf16_peak": meter.share_of_peak(arithmetic, found["images_per_second"])}


def few_shot(classes: int, shots: int, test: int, dim: int, device: torch.device) -> dict[str, float]:
    """Seconds of each few-shot method on made features, with all the fits of its search."""
    random = torch.Generator().manual_seed(0)
    centres = functional.normalize(torch.randn(classes, dim, generator=random), dim=-1)

    def images(each: int) -> Labelled:
        labels = torch.arange(classes).repeat_interleave(each)
        noise = torch.randn(len(labels), dim, generator=random) / dim**0.5
        return Labelled(functional.normalize(centres[labels] + noise, dim=-1).to(device), labels.to(device))

    train, val, queries = images(shots), images(min(shots, 4)), images(max(1, test // classes)).features
    zero_shot = Classifier(centres.to(device), torch.tensor(100.0, device=device))
    methods = {
        "linear-probe": lambda: linear_probe(train, val, queries),
        "tip-adapter": lambda: tip_adapter(train, val, queries, zero_shot, None, lambda share: None),
        "tip-adapter-f": lambda: tip_adapter(train, val, queries, zero_shot, 1, lambda share: None),
    }
    seconds = {}
    for name, method in methods.items():
        started = time.perf_counter()
        method()  # returns an array on the CPU, and so waits for the device
        seconds[name] = time.perf_counter() - started
    return seconds


def loss_scaling(
    pair: Pair, batch: int, precisions: Sequence[str], accelerator: Accelerator, meter: Meter
) -> dict[str, Any]:
    """Steps of the student alone by precision; fp16's scaler reads back in each step whether gradients overflowed."""
    setup = Setup(pair, 10, accelerator)
    optimizer = make_optimizer(setup.student, pair.recipe(batch).optim, {})
    images = setup.images(batch)[1].to(accelerator.device)
    kind = accelerator.device.type

    def step(dtype: torch.dtype, scaler: torch.amp.GradScaler) -> None:
        with torch.autocast(kind, dtype=dtype):
            loss = setup.student(images).logits.square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return {
        name: meter.rate(partial(step, dtypes[name], torch.amp.GradScaler(kind, enabled=name == "fp16")), batch)
        for name in precisions
    }


def shared_batch_norm(pair: Pair, batch: int, accelerator: Accelerator, meter: Meter) -> dict[str, Any]:
    """Forward and backward of a convolutional tower with its own batch norms and with SyncBatchNorm, in one process."""
    tower = build_image_tower(pair.student)
    size = tower.preprocessing.size
    images = torch.randn(batch, 3, size, size, device=accelerator.device)
    module = tower.module.to(accelerator.device).train()

    def step() -> None:
        with accelerator.autocast():
            loss = module(images).square().mean()
        loss.backward()
        module.zero_grad()

    found = {"batch_norm": meter.rate(step, batch)}
    store = distributed.HashStore()
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        module = convert_sync_batchnorm(module)
        found["sync_batch_norm"] = meter.rate(step, batch)
    finally:
        distributed.destroy_process_group()
    return found


def as_numbers(found: Any) -> Any:
    """Plain data for JSON: keys as text, numpy's numbers as Python's."""
    if isinstance(found, dict):
        return {str(key): as_numbers(value) for key, value in found.items()}
    return found.item() if isinstance(found, np.generic) else found
