"""The paper recipes at full size, on the meta device: shapes and parameters, no memory."""

import pytest
import torch

from models.image_tokenizer import ImageTokenizer, TokenizerConfig
from models.teachers import OpenClipTeacher
from models.tokenizers import KINDS, build_tokenizer
from stages.loading import subset
from stages.recipe import Recipe, available_recipes, load_recipe

PAPER = [name for name in available_recipes() if name.startswith("paper-")]
SHAPES = {
    "paper-vqgan-256": (1, 1, 16, 16),
    "paper-sde-256": (1, 1, 16, 16),
    "paper-sde-384": (1, 1, 27, 27),
    "paper-semantic-384": (1, 1, 27, 27),
    "paper-tokenflow-256": (1, 1, 16, 16),
    "paper-dualtoken-256": (2, 4, 16, 16),
    "paper-dualtoken-384": (2, 8, 27, 27),
    "paper-vila_u-256": (1, 4, 16, 16),
    "paper-vila_u-384": (1, 16, 27, 27),
}
CODEBOOKS = {
    "vqgan": (1, 16_384, 8),
    "sde": (1, 32_768, 8),
    "semantic": (1, 32_768, 8),
    "tokenflow": (1, 32_768, 32 + 8),
    "dualtoken": (1, 16_384, 32),
    "vila_u": (1, 16_384, 256),
}


@pytest.fixture(scope="module")
def teachers() -> dict[str, OpenClipTeacher]:
    return {}


def build(recipe: Recipe, teachers: dict[str, OpenClipTeacher]) -> ImageTokenizer:
    """The tokenizer of a recipe on the meta device; teachers are made once each."""
    model = recipe.teacher.model
    assert model.kind == "open_clip"
    with torch.device("meta"):
        if model.name not in teachers:
            teachers[model.name] = OpenClipTeacher(model.model_copy(update={"pretrained": None}))
        return build_tokenizer(subset(recipe.tokenizer, TokenizerConfig), teachers[model.name])


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_kind_has_a_paper_recipe() -> None:
    assert sorted(SHAPES) == PAPER
    assert {load_recipe(name).tokenizer.kind for name in PAPER} == set(KINDS)


@pytest.mark.parametrize("name", PAPER)
def test_grid_codes_and_codebooks(name: str, teachers: dict[str, OpenClipTeacher]) -> None:
    recipe = load_recipe(name)
    tokenizer = build(recipe, teachers)
    assert tokenizer.code_shape == SHAPES[name]
    books = tokenizer.codebooks
    assert [tuple(book.shape) for book in books] == [CODEBOOKS[recipe.tokenizer.kind]] * SHAPES[name][0]
    assert all(book.device.type == "meta" for book in books)


def test_the_image_size_of_every_recipe_is_drawn(teachers: dict[str, OpenClipTeacher]) -> None:
    for name in PAPER:
        recipe = load_recipe(name)
        tokenizer = build(recipe, teachers)
        with torch.device("meta"):
            codes = torch.zeros(1, *tokenizer.code_shape, dtype=torch.long)
            drawn = tokenizer.decode(codes)
        size = recipe.tokenizer.transform.image_size
        assert drawn.shape == (1, 3, size, size), name


def test_vqgan_is_llamagens_size(teachers: dict[str, OpenClipTeacher]) -> None:
    """LlamaGen's README: VQ-16, 72M parameters (with its codebook of 16,384 x 8 among them)."""
    assert round(parameters(build(load_recipe("paper-vqgan-256"), teachers)) / 1e6) == 72


def test_towers_are_siglips_size(teachers: dict[str, OpenClipTeacher]) -> None:
    """SigLIP SO400M's image tower has 428 million parameters (arXiv 2303.15343, table 1 of the model cards)."""
    tokenizer = build(load_recipe("paper-dualtoken-384"), teachers)
    assert round(parameters(tokenizer.tower) / 1e6) == 428
