"""Ranks of classes against a loop, and sentences against their mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.teachers.backbone import BackboneTeacher
from models.teachers.zero_shot import class_embeddings, class_ranks


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1)


def test_a_rank_counts_the_classes_that_are_nearer_than_the_right_one() -> None:
    images, classes, labels = unit(20, 8), unit(7, 8), torch.arange(20) % 7
    ranks = class_ranks(images, classes, labels)
    for image, label, rank in zip(images, labels, ranks, strict=True):
        order = sorted(range(7), key=lambda index: -float(image @ classes[index]))
        assert order.index(int(label)) == int(rank)
    assert torch.equal(class_ranks(classes, classes, torch.arange(7)), torch.zeros(7, dtype=torch.long))


def test_a_class_is_its_name_or_the_mean_of_sentences_about_it(aligned_teacher: BackboneTeacher) -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    names = ["cat", "dog"]
    assert torch.equal(class_embeddings(aligned_teacher, names, "name"), aligned_teacher.embed_texts(names))
    sentences = [template("dog") for template in OPENAI_IMAGENET_TEMPLATES]
    assert len(sentences) == 80
    expected = F.normalize(aligned_teacher.embed_texts(sentences).mean(0), dim=0)
    torch.testing.assert_close(class_embeddings(aligned_teacher, names, "openai")[1], expected)
