"""The paper recipes at full size, on the meta device: shapes and parameters, no memory."""

import functools

import pytest
import torch

from models.imports.llamagen import _rules, convert_llamagen
from models.teachers.teacher import OpenClipTeacher, OpenClipTeacherConfig
from models.tokenizers.image_tokenizer import ImageTokenizer
from models.tokenizers.kinds import KINDS, build_tokenizer, tokenizer_config
from stages.pipeline.recipe import load_recipe
from stages.pipeline.recipe_files import available_recipes
from stages.training.loop import schedule

PAPER = [name for name in available_recipes() if name.startswith("paper-")]
SHAPES = {
    "paper-vqgan-256": (1, 1, 16, 16),
    "paper-sde-256": (1, 1, 16, 16),
    "paper-sde-384": (1, 1, 27, 27),
    "paper-sde-image-384": (1, 1, 27, 27),
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
    "vila_u": (1, 16_384, 1024),
}


@functools.cache
def teacher_of(name: str) -> OpenClipTeacher:
    """An open_clip teacher on the meta device."""
    with torch.device("meta"):
        return OpenClipTeacher(OpenClipTeacherConfig(name=name, pretrained=None))


@functools.cache
def build(name: str) -> ImageTokenizer:
    """The tokenizer of a recipe on the meta device."""
    recipe = load_recipe(name)
    assert recipe.teacher.model.kind == "open_clip"
    teacher = teacher_of(recipe.teacher.model.name)
    with torch.device("meta"):
        return build_tokenizer(tokenizer_config(recipe.tokenizer.model_dump()), teacher)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_kind_has_a_paper_recipe() -> None:
    assert sorted(SHAPES) == PAPER
    assert {load_recipe(name).tokenizer.kind for name in PAPER} == set(KINDS)


@pytest.mark.parametrize("name", PAPER)
def test_grid_codes_and_codebooks(name: str) -> None:
    recipe = load_recipe(name)
    tokenizer = build(name)
    assert tokenizer.code_shape == SHAPES[name]
    books = tokenizer.codebooks
    expected = (1, 16_384, 1152) if name == "paper-vila_u-384" else CODEBOOKS[recipe.tokenizer.kind]
    assert [tuple(book.shape) for book in books] == [expected] * SHAPES[name][0]
    assert all(book.device.type == "meta" for book in books)


def test_the_image_size_of_every_recipe_is_drawn() -> None:
    for name in PAPER:
        recipe = load_recipe(name)
        tokenizer = build(name)
        with torch.device("meta"):
            codes = torch.zeros(1, *tokenizer.code_shape, dtype=torch.long)
            drawn = tokenizer.decode(codes)
        size = recipe.tokenizer.transform.image_size
        assert drawn.shape == (1, 3, size, size), name


def test_vqgan_is_llamagens_size() -> None:
    """LlamaGen's README: VQ-16, 72M parameters (with its codebook of 16,384 x 8 among them)."""
    assert round(parameters(build("paper-vqgan-256")) / 1e6) == 72


def test_image_only_is_sde_without_its_semantic_branch() -> None:
    both, alone = load_recipe("paper-sde-384"), load_recipe("paper-sde-image-384")
    assert alone.tokenizer == both.tokenizer.model_copy(update={"semantic_branch": False})
    assert alone.model_copy(update={"name": both.name, "description": both.description}) == both.model_copy(
        update={"tokenizer": alone.tokenizer}
    )


def test_trained_towers_have_a_small_rate_and_a_warm_up() -> None:
    """A copy of good weights forgets them at the rate of new parts (docs/decisions.md); DualToken publishes its own."""
    towers = set()
    for name in PAPER:
        recipe = load_recipe(name).tokenizer
        if any("tower" in part.split(".") for part, _ in build(name).named_modules()):
            towers.add(recipe.kind)
            rate = recipe.optimiser.learning_rate * recipe.tower_learning_rate_fraction
            assert rate <= (7.2e-5 if recipe.kind == "dualtoken" else 1e-5) and recipe.optimiser.warmup_steps >= 1000
    assert towers == {"sde", "dualtoken", "vila_u"}


def test_llamagen_trains_with_adam_without_decay_on_random_crops() -> None:
    recipe = load_recipe("paper-vqgan-256").tokenizer
    assert recipe.optimiser.weight_decay == recipe.discriminator_optimiser.weight_decay == 0
    crop = recipe.random_crop
    assert (crop.kind, crop.smallest, crop.largest, recipe.horizontal_flip) == ("square", 0.8, 1.0, True)
    assert (recipe.loss.discriminator, recipe.loss.hinge_slope) == ("patchgan", 0)


@pytest.mark.parametrize("name", ["paper-dualtoken-256", "paper-dualtoken-384"])
def test_dualtokens_discriminator_follows_its_release(name: str) -> None:
    recipe = load_recipe(name).tokenizer
    epoch = 10_000_000 / recipe.batch_size
    loss, own = recipe.loss, recipe.discriminator_optimiser
    assert recipe.steps == pytest.approx(20 * epoch) and loss.adversarial_start == own.warmup_steps == int(epoch / 2)
    assert (loss.discriminator, loss.discriminator_schedule, loss.hinge_slope) == ("residual", "own", 0.01)
    assert (loss.l2_weight, loss.adversarial_l2_weight, loss.adversarial_weight) == (5, 1, 0.75)
    assert (own.learning_rate, own.betas, own.gradient_clip) == (7.2e-5, (0.5, 0.9), None)
    last = schedule(recipe.steps, recipe.steps, own)
    assert own.learning_rate * last == pytest.approx(4e-5, rel=1e-3)
    assert recipe.optimiser.gradient_clip is None and recipe.residual.dead_threshold == 1
    assert (recipe.random_crop.kind, recipe.random_crop.smallest) == ("area", 0.9) and not recipe.horizontal_flip


def test_a_tower_that_ends_without_a_norm_pools_no_features() -> None:
    """TokenFlow's ViTamin: what its features lack to be pooled is not known, so no number stands for it."""
    tokenizer = build("paper-tokenflow-256")
    assert not tokenizer.embeds_codes


def test_towers_are_siglips_size() -> None:
    """SigLIP SO400M's image tower has 428 million parameters (arXiv 2303.15343, table 1 of the model cards)."""
    tokenizer = build("paper-dualtoken-384")
    assert round(parameters(tokenizer.tower) / 1e6) == 428


def test_vq_8_names_the_setting_with_which_it_is_imported() -> None:
    """LlamaGen's other public tokenizer, by shapes alone, against the recipe of VQ-16."""
    setting = "tokenizer.conv.channel_multipliers=[1,2,2,4]"
    vq_8, vq_16 = (
        tokenizer_config(load_recipe("paper-vqgan-256", given).tokenizer.model_dump()) for given in ([setting], [])
    )
    with torch.device("meta"):
        tokenizer = build_tokenizer(vq_8)
    own, state = tokenizer.state_dict(), {}
    for ours, theirs in _rules(tokenizer):
        parts = own[ours].chunk(len(theirs))
        state |= dict(zip(theirs, parts, strict=True))
    with pytest.raises(ValueError, match="by its shapes it is the one of") as refused:
        convert_llamagen(state, vq_16)
    assert f"--set '{setting}'" in str(refused.value)
    assert convert_llamagen(state, vq_8).keys() >= own.keys()
