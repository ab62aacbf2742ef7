"""The terms of the tokenizer's training loss. Shape legend: B batch, H W pixels, C channels, E shared channels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from models.config import Config, CountsByContent, Fraction, InOrder
from models.ranks import gather_rows
from models.teachers.backbone import BackboneTeacher
from models.tokenizers.convolutional import gradient_norm


class LossConfig(Config):
    """Terms of the tokenizer's training loss and their weights (MUSE-VL, eq. 3-5; LlamaGen, section 2.1)."""

    l2_weight: NonNegativeFloat = 1.0
    """Weight of the mean squared error of pixels in [-1, 1]."""
    l1_weight: NonNegativeFloat = 0.0
    """Weight of the mean absolute error of pixels in [-1, 1]."""
    perceptual: Literal["lpips", "backbone", "none"] = "lpips"
    """`lpips` (VGG, v0.1), `backbone` (the same distance on the backbone teacher's features: a substitute if LPIPS's
    weights are not available, whose values are not comparable with LPIPS) or `none`."""
    perceptual_weight: NonNegativeFloat = 1.0
    """Weight of the perceptual distance."""
    perceptual_fraction: Fraction = 1.0
    """Fraction of each batch that the perceptual distance is computed on: an unbiased saving if it dominates a step."""
    lpips_vgg_weights: Annotated[str | None, CountsByContent()] = None
    """Path of torchvision's VGG16 state dict, for machines without a hub; `null` lets `lpips` download it."""
    adversarial_weight: NonNegativeFloat = 0.5
    """Weight of the adversarial loss; MUSE-VL's lambda_G is not published, 0.5 is LlamaGen's."""
    adversarial_adaptive: bool = False
    """Whether the adversarial loss is scaled by the ratio of the gradient norms of the reconstruction loss and of
    itself, at the decoder's last layer (VQGAN, eq. 7)."""
    adversarial_l2_weight: NonNegativeFloat | None = None
    """Weight of the squared error in the reconstruction loss of that ratio; `null`: `l2_weight`. DualToken's released
    code has 1, while its loss has 5."""
    adversarial_clamp: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], InOrder] = (0.0, 10.0)
    """Smallest and largest value of that ratio."""
    adversarial_start: NonNegativeInt = 20_000
    """Step at which the discriminator starts to train and the adversarial loss starts to count."""
    discriminator: Literal["patchgan", "residual"] = "patchgan"
    """`patchgan`: strided convolutions (LlamaGen); `residual`: blocks with skip connections (DualToken's release)."""
    discriminator_channels: PositiveInt = 64
    """Channels of the discriminator's first layer."""
    discriminator_layers: PositiveInt = 3
    """Number of strided layers of the discriminator."""
    discriminator_schedule: Literal["training", "own"] = "training"
    """Step count of the discriminator's learning-rate schedule: `training` counts all steps of the training; `own`
    counts from `adversarial_start`, so that the warm-up begins with the discriminator (DualToken's release)."""
    hinge_slope: Fraction = 0.0
    """Slope of the hinge loss beyond its margin, the fraction of the gradient that the discriminator still gets there;
    DualToken's release: 0.01."""


class SemanticLossConfig(LossConfig):
    """Loss of the kinds whose codes are decoded to the teacher's features."""

    semantic_weight: NonNegativeFloat = 1.0
    """Weight of the semantic loss `1 - cos(Dec_s(z_q), T)`; DualToken: 5."""
    semantic_mse_weight: NonNegativeFloat = 0.0
    """Weight of the mean squared error of the predicted `T`, in units of `semantic_weight`; DualToken: 1."""
    pooled_weight: NonNegativeFloat = 0.0
    """Weight of the same two terms, without `semantic_weight`, for the pooled vector that the rest of the teacher's
    tower computes from the predicted features (`Teacher.pool`); DualToken: 1."""


class ContrastiveLossConfig(LossConfig):
    """Loss of the kind that is aligned with captions."""

    contrastive_weight: NonNegativeFloat = 1.0
    """Weight of the contrastive loss with the captions; VILA-U: 1."""


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor, slope: float = 0.0) -> Tensor:
    """Return the hinge loss `(mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2`, leaky with a slope.

    Source: Geometric GAN (arXiv 1705.02894).
    """
    beyond = [F.leaky_relu(1 - real_logits, slope).mean(), F.leaky_relu(1 + fake_logits, slope).mean()]
    return (beyond[0] + beyond[1]) / 2


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the generator's adversarial loss, `- mean D(x_hat)`."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, clamp: tuple[float, float]
) -> Tensor:
    """Return the clamped ratio of the two losses' gradient norms at the decoder's last layer (VQGAN, eq. 7)."""
    ratio = gradient_norm(reconstruction_loss, last_layer) / (gradient_norm(adversarial_loss, last_layer) + 1e-4)
    return ratio.clamp(*clamp)


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of matching images with texts (CLIP, arXiv 2103.00020, section 2.3).

    Args:
        images: unit vectors `[B, E]`; with several ranks, the batches of all ranks are gathered.
        texts: unit vectors `[B, E]`; row b is the text of image b.
        logit_scale: logarithm of the inverse temperature, scalar.

    Returns:
        Scalar, nats.
    """
    images, texts = gather_rows(images), gather_rows(texts)
    with torch.autocast(images.device.type, enabled=False):  # bf16 would round a logit of 30 to a multiple of 1/8
        logits = logit_scale.exp().clamp(max=100.0) * images.float() @ texts.float().T
    own = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def semantic_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of `1 - cos` over the vectors of `[..., C]`: positions of a grid (MUSE-VL, eq. 3), or pooled."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


class BackbonePerceptualDistance(nn.Module):
    """LPIPS's distance on a backbone's features: unit-normalised channels, mean squared difference, sum over stages.

    It lacks LPIPS's learned channel weights, so it is a substitute for training and for comparing runs with each other;
    its values are not comparable with those of papers.
    """

    teacher: BackboneTeacher

    def __init__(self, teacher: BackboneTeacher, stages: int = 4) -> None:
        super().__init__()
        self.__dict__["teacher"] = teacher  # not registered: the weights belong to the teacher's artifact
        self.stages = stages

    def _maps(self, images: Tensor) -> list[Tensor]:
        teacher = self.teacher
        # at the images' own size if the backbone accepts it: the distance is about textures, and small maps are cheap
        shown = teacher.normalisation.standardise if teacher.takes_any_size else teacher.normalisation
        maps = teacher.stage_maps(shown(images), min(self.stages, teacher.num_stages) - 1)
        return [level * torch.rsqrt(level.float().square().sum(1, keepdim=True) + 1e-10) for level in maps]

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the distance of each pair of images `[B, 3, H, W]` in [-1, 1]; `[B]`."""
        with torch.no_grad():
            targets = self._maps(references)
        pairs = zip(self._maps(images), targets, strict=True)
        return torch.stack([(a - b).float().square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)


class LpipsDistance(nn.Module):
    """LPIPS v0.1 with VGG16 (arXiv 1801.03924); input in [-1, 1]."""

    network: Any

    def __init__(self, vgg_state: dict[str, Tensor] | None, field: str = "lpips_vgg_weights") -> None:
        """
        Args:
            vgg_state: state dict of torchvision's VGG16; None lets lpips download it.
            field: the field of the recipe that names it, for messages.

        Raises:
            ValueError: the state dict belongs to another network, or the download fails.
        """
        super().__init__()
        import lpips

        try:
            # pnet_rand keeps lpips from downloading the trunk; the learned channel weights ship with the package
            network = lpips.LPIPS(net="vgg", version="0.1", pnet_rand=vgg_state is not None, verbose=False)
        except (OSError, RuntimeError) as error:  # no connection, or a download with a wrong hash
            raise ValueError(
                f"{field} is empty and LPIPS's VGG16 cannot be downloaded ({error}); give the path of torchvision's "
                f"vgg16-397923af.pth, or choose another tokenizer.loss.perceptual: `backbone` or `none`"
            ) from error
        if vgg_state is not None:
            _load_trunk(network.net, vgg_state, field)
        self.__dict__["network"] = network.requires_grad_(False).eval()

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the distance of each pair of images `[B, 3, H, W]` in [-1, 1]; `[B]`."""
        return self.network.to(images.device)(images.float(), references.float()).flatten()


def _load_trunk(trunk: nn.Module, vgg_state: dict[str, Tensor], field: str) -> None:
    """Load torchvision's `features.7.weight` and so on into LPIPS's names, which have slices: `slice2.7.weight`."""
    own = trunk.state_dict()
    wanted = {key: f"features.{key.split('.', 1)[1]}" for key in own}
    for key, name in sorted(wanted.items()):
        value = own[key]
        found = vgg_state.get(name)
        if not isinstance(found, Tensor) or found.shape != value.shape:
            shape = f"a `{name}` of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"no `{name}`"
            raise ValueError(
                f"{field} has {shape}, VGG16's has shape {tuple(value.shape)}; give torchvision's VGG16 state dict"
            )
    trunk.load_state_dict({key: vgg_state[name] for key, name in wanted.items()})
