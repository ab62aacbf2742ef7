from collections.abc import Callable
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from models.teachers.backbone import BackboneTeacher, BackboneTeacherConfig
from models.tokenizers.convolutional import PatchDiscriminator
from models.tokenizers.losses import (
    BackbonePerceptualDistance,
    LpipsDistance,
    adaptive_weight,
    contrastive_loss,
    generator_loss,
    hinge_discriminator_loss,
    semantic_loss,
)


def test_hinge_loss_equals_its_formula() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    expected = ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3) / 2
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(expected)


def test_contrastive_loss_keeps_its_precision_under_autocast() -> None:
    images, texts = (torch.nn.functional.normalize(torch.randn(16, 32), dim=1) for _ in range(2))
    scale = torch.tensor(100.0).log()
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(images, texts, scale)
    torch.testing.assert_close(found, contrastive_loss(images, texts, scale))


def test_hinge_loss_asks_nothing_more_of_sure_logits() -> None:
    real, fake = torch.tensor([1.5], requires_grad=True), torch.tensor([-1.5], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    assert float(real.grad) == float(fake.grad) == 0.0


def test_a_leaky_hinge_keeps_a_part_of_the_gradient_of_sure_logits() -> None:
    real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    loss = hinge_discriminator_loss(real, fake, 0.01)
    assert float(loss.detach()) == pytest.approx(((0.01 * -1 + 0.5) / 2 + 0.01 * -2) / 2)
    loss.backward()
    assert real.grad.tolist() == pytest.approx([-0.01 / 4, -1 / 4]) and fake.grad.tolist() == pytest.approx([0.01 / 2])


def test_generator_wants_higher_logits() -> None:
    logits = torch.randn(2, 1, 4, 4, requires_grad=True)
    loss = generator_loss(logits)
    torch.testing.assert_close(loss, -logits.mean())
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.full_like(logits, -1 / 32))


def test_adaptive_weight_equals_the_ratio_of_gradient_norms() -> None:
    torch.manual_seed(0)
    decoder, discriminator = nn.Conv2d(4, 3, 3), PatchDiscriminator(4, 1)
    target, drawn = torch.randn(2, 3, 14, 14), decoder(torch.randn(2, 4, 16, 16))
    reconstruction, adversarial = (drawn - target).square().mean(), generator_loss(discriminator(drawn))
    weight = adaptive_weight(reconstruction, adversarial, decoder.weight, (0.0, 1e4))
    (of_reconstruction,) = torch.autograd.grad(reconstruction, decoder.weight, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, decoder.weight, retain_graph=True)
    torch.testing.assert_close(weight, of_reconstruction.norm() / (of_adversarial.norm() + 1e-4))
    assert not weight.requires_grad
    assert float(adaptive_weight(reconstruction, adversarial, decoder.weight, (0.0, 1e-3))) == pytest.approx(1e-3)
    assert float(adaptive_weight(reconstruction, adversarial, decoder.weight, (2e4, 3e4))) == pytest.approx(2e4)
    (reconstruction + weight * adversarial).backward()  # the graph is still there


def test_semantic_loss_is_one_minus_cosine() -> None:
    target = torch.randn(2, 3, 4, 5)
    assert float(semantic_loss(target, target)) == pytest.approx(0, abs=1e-6)
    assert float(semantic_loss(7 * target, target)) == pytest.approx(0, abs=1e-6)
    assert float(semantic_loss(-target, target)) == pytest.approx(2)


class TestBackbonePerceptualDistance:
    @pytest.fixture
    def distance(self, backbone_teacher: BackboneTeacher) -> BackbonePerceptualDistance:
        return BackbonePerceptualDistance(backbone_teacher)

    def test_equal_images_have_no_distance_and_others_have_one(
        self, distance: BackbonePerceptualDistance, emoji: Callable[[str], Tensor]
    ) -> None:
        image, other = emoji("1f431"), emoji("1f697")
        values = distance(torch.cat([image, image, image]), torch.cat([image, other, image.roll(1, 3)]))
        assert values.shape == (3,)
        assert float(values[0]) == pytest.approx(0, abs=1e-7)
        assert float(values[1]) > float(values[2]) > 0

    def test_distance_grows_with_the_noise(
        self, distance: BackbonePerceptualDistance, emoji: Callable[[str], Tensor]
    ) -> None:
        image, noise = emoji("1f431"), torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        values = [float(distance(image + scale * noise, image)) for scale in (0.02, 0.1, 0.4)]
        assert values == sorted(values) and values[0] > 0

    def test_gradients_have_the_bits_of_a_written_out_loop(
        self, distance: BackbonePerceptualDistance, emoji: Callable[[str], Tensor]
    ) -> None:
        """Digests of trained tokenizers depend on the order in which the uses of a map are added up."""

        def maps(images: Tensor) -> list[Tensor]:
            backbone, found = distance.teacher.backbone, []
            hidden = backbone.bn1(backbone.conv_stem(((images + 1) / 2 - 0.5) / 0.5))
            for stage in backbone.blocks[:4]:
                hidden = stage(hidden)
                found.append(hidden * torch.rsqrt(hidden.float().square().sum(1, keepdim=True) + 1e-10))
            return found

        drawn = [(emoji("1f431") * 0.9).requires_grad_() for _ in range(2)]
        with torch.no_grad():
            targets = maps(emoji("1f697"))
        pairs = zip(maps(drawn[0]), targets, strict=True)
        torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum().backward()
        distance(drawn[1], emoji("1f697")).sum().backward()
        assert torch.equal(drawn[0].grad, drawn[1].grad)

    def test_teacher_gets_no_gradient_and_is_not_saved(
        self, distance: BackbonePerceptualDistance, emoji: Callable[[str], Tensor]
    ) -> None:
        drawn = (emoji("1f431") * 0.9).requires_grad_()
        distance(drawn, emoji("1f431")).mean().backward()
        assert float(drawn.grad.abs().sum()) > 0
        assert all(parameter.grad is None for parameter in distance.teacher.parameters())
        assert not distance.state_dict()


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        ("resnet18", [(64, 48), (64, 24), (128, 12), (256, 6)]),  # at the images' own size
        ("vit_tiny_patch16_224", [(192, 14)] * 4),  # takes no size but its own
    ],
)
def test_the_stand_in_takes_any_backbone(architecture: str, shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    config = BackboneTeacherConfig(architecture=architecture, input_size=224, feature_blocks=(3,), head=None)
    distance = BackbonePerceptualDistance(BackboneTeacher(config, None, None).freeze())
    images = (torch.rand(2, 3, 96, 96) * 2 - 1).requires_grad_()
    assert [(level.shape[1], level.shape[-1]) for level in distance._maps(images)] == shapes
    found = distance(images, images.detach().flip(0))
    assert found.shape == (2,) and bool((found > 0).all())
    found.sum().backward()
    assert float(images.grad.abs().sum()) > 0


class TestLpips:
    @pytest.fixture
    def vgg_state(self) -> dict[str, Tensor]:
        import torchvision

        with torch.device("meta"):
            shapes = torchvision.models.vgg16(weights=None).state_dict()
        generator = torch.Generator().manual_seed(0)
        # the classifier's 120M numbers stay on the meta device: LPIPS must not read them
        return {
            name: 0.05 * torch.randn(value.shape, generator=generator) if name.startswith("features.") else value
            for name, value in shapes.items()
        }

    def test_distance_equals_the_packages_with_the_same_trunk(self, vgg_state: dict[str, Tensor]) -> None:
        import lpips
        import torchvision

        reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
        with torch.device("meta"):
            trunk = torchvision.models.vgg16(weights=None).features
        features = {
            name.removeprefix("features."): value for name, value in vgg_state.items() if name.startswith("features.")
        }
        trunk.load_state_dict(features, assign=True)
        for index in range(1, 6):
            for name, layer in getattr(reference.net, f"slice{index}").named_children():
                layer.load_state_dict(trunk[int(name)].state_dict())
        images, others = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
        distance = LpipsDistance(vgg_state)
        torch.testing.assert_close(distance(images, others), reference(images, others).flatten())
        assert distance(images, others).shape == (2,)
        assert bool((distance(images, others) > 0).all())
        assert distance(images, images).tolist() == [0.0, 0.0]
        assert not list(distance.parameters()) and not distance.state_dict()

    def test_weights_of_another_network_are_refused_by_name(self, vgg_state: dict[str, Tensor]) -> None:
        broken = {name: value for name, value in vgg_state.items() if not name.startswith("features.28.")}
        with pytest.raises(ValueError, match="lpips_vgg_weights has no `features.28.bias`"):
            LpipsDistance(broken)
        other = vgg_state | {"features.28.bias": torch.zeros(3)}
        with pytest.raises(
            ValueError, match=r"evaluate\.vgg has a `features.28.bias` of shape \(3,\), VGG16's.*\(512,\)"
        ):
            LpipsDistance(other, "evaluate.vgg")

    def test_without_a_network_the_field_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import lpips

        def unreachable(**_: object) -> None:
            raise URLError("Temporary failure in name resolution")

        monkeypatch.setattr(lpips, "LPIPS", unreachable)
        message = r"tokenizer\.loss\.lpips_vgg_weights is empty and .* cannot be downloaded .*vgg16-397923af\.pth"
        with pytest.raises(ValueError, match=message):
            LpipsDistance(None, "tokenizer.loss.lpips_vgg_weights")
