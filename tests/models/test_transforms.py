import io
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from models.transforms import (
    CropConfig,
    RandomCrop,
    TransformConfig,
    ViewsConfig,
    load_image,
    normalise,
    random_view,
    shape_image,
    to_pil,
    to_pixels,
    to_tensor,
)

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
Encoder = Callable[..., bytes]


def halves(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def noise(size: tuple[int, int] = (48, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def config(size: int = 64, **fields: object) -> TransformConfig:
    return TransformConfig(image_size=size, **fields)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, encoded: Encoder) -> None:
    upright = noise((64, 64))
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    exif = Image.Exif()
    exif[0x0112] = undo.get(orientation, 1)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(upright, "PNG", exif=exif))))
    exif[0x0112] = orientation
    data = encoded(turned, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(data, config())), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_on_the_background(kind: str, encoded: Encoder) -> None:
    image = halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    image.paste((255, 0, 0, 128), (0, 32, 32, 64))
    data = encoded(image, kind, lossless=True)
    white, green = load_image(data, config()), load_image(data, config(background=(0, 255, 0)))
    assert white.getpixel((10, 10)) == WHITE
    assert green.getpixel((10, 10)) == (0, 255, 0)
    assert green.getpixel((50, 50)) == BLUE
    red, mixed_green, mixed_blue = white.getpixel((10, 50))
    assert red == 255 and mixed_green == mixed_blue
    assert abs(mixed_green - 127) <= 1


def test_grey_with_alpha_and_transparent_palettes_lie_on_the_background(encoded: Encoder) -> None:
    grey = Image.new("LA", (64, 64), (0, 0))
    palette = halves().quantize(4)
    index = palette.getpixel((0, 0))
    for data in (encoded(grey, "PNG"), encoded(palette, "PNG", transparency=index)):
        assert load_image(data, config()).getpixel((3, 3)) == WHITE


def test_palette_and_bilevel_images_keep_their_colours(encoded: Encoder) -> None:
    for kind in ("PNG", "GIF"):
        image = load_image(encoded(halves().quantize(4), kind), config())
        assert image.mode == "RGB"
        assert image.getpixel((3, 3)) == RED and image.getpixel((60, 3)) == BLUE
    black = Image.new("1", (64, 64), 0)
    assert load_image(encoded(black, "PNG"), config()).getpixel((3, 3)) == (0, 0, 0)


def test_cmyk_becomes_rgb(encoded: Encoder) -> None:
    image = load_image(encoded(halves().convert("CMYK"), "JPEG", quality=95), config())
    assert image.mode == "RGB"
    np.testing.assert_allclose(image.getpixel((8, 8)), RED, atol=8)
    np.testing.assert_allclose(image.getpixel((56, 8)), BLUE, atol=8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str, encoded: Encoder) -> None:
    ramp = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = np.asarray(load_image(encoded(Image.fromarray(ramp), kind), config()))
    np.testing.assert_array_equal(image, np.round(ramp / 257)[..., None].repeat(3, 2))


def test_grey_is_the_same_in_all_channels(encoded: Encoder) -> None:
    grey = noise((64, 64)).convert("L")
    image = np.asarray(load_image(encoded(grey, "PNG"), config()))
    np.testing.assert_array_equal(image, np.asarray(grey)[..., None].repeat(3, 2))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_damaged_bytes_raise_os_error(kind: str, encoded: Encoder) -> None:
    data = encoded(noise(), kind)
    load_image(data, config())
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for share in (0.0, 0.02, 0.1, 0.4, 0.8):
            with pytest.raises(OSError):  # noqa: PT011
                load_image(data[: int(share * len(data))], config())
        for _ in range(30):
            flipped = bytearray(data)
            for position in random.integers(0, min(80, len(data)), 5):
                flipped[position] = random.integers(256)
            try:
                load_image(bytes(flipped), config())  # some flips harm nothing
            except OSError:
                continue


def test_an_image_of_too_many_pixels_raises_os_error(encoded: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="more than 178956970 pixels"):
        load_image(encoded(noise(), "PNG"), config())


@pytest.mark.parametrize("resize", ["shortest_crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (7, 5), (200, 120)])
def test_every_shape_becomes_the_square(resize: str, size: tuple[int, int]) -> None:
    assert shape_image(Image.new("RGB", size), config(32, resize=resize)).size == (32, 32)


def test_shortest_crop_cuts_the_sides() -> None:
    image = Image.new("RGB", (128, 64), WHITE)
    image.paste(RED, (32, 0, 96, 64))
    assert np.asarray(shape_image(image, config())).reshape(-1, 3).tolist() == [list(RED)] * 64 * 64


def test_squash_keeps_everything() -> None:
    image = shape_image(halves((200, 100)), config(resize="squash"))
    assert image.getpixel((0, 30)) == RED and image.getpixel((63, 30)) == BLUE
    assert image.getpixel((28, 30)) == RED and image.getpixel((35, 30)) == BLUE


def test_pad_keeps_the_aspect_ratio_on_the_background() -> None:
    image = shape_image(halves((128, 64)), config(resize="pad", background=(0, 255, 0)))
    assert image.getpixel((5, 5)) == image.getpixel((60, 60)) == (0, 255, 0)
    assert image.getpixel((5, 32)) == RED and image.getpixel((60, 32)) == BLUE


@pytest.mark.parametrize("resize", ["shortest_crop", "squash", "pad"])
def test_an_image_of_the_right_size_is_untouched(resize: str) -> None:
    np.testing.assert_array_equal(
        np.asarray(shape_image(noise((64, 64)), config(resize=resize))), np.asarray(noise((64, 64)))
    )


def test_normalise_round_trips_every_value() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    images = normalise(pixels)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert torch.equal(to_pixels(images), pixels)


def test_to_pixels_clamps() -> None:
    assert to_pixels(torch.tensor([-1.7, 1.2, 0.0])).tolist() == [0, 255, 128]


def test_pictures_round_trip_through_tensors() -> None:
    images = [noise((8, 8)), halves((8, 8))]
    pixels = to_tensor(images)
    assert pixels.shape == (2, 3, 8, 8) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    for before, after in zip(images, to_pil(pixels), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


STILL = ViewsConfig(count=1, flip=False, zoom=(1.0, 1.0), shift=0.0, rotation=0.0, stretch=0.0)


def viewed(image: torch.Tensor, views: ViewsConfig, seed: int = 0) -> torch.Tensor:
    return random_view(image, views, torch.Generator().manual_seed(seed))


def test_a_view_within_no_limits_is_the_image() -> None:
    image = torch.rand(3, 16, 16) * 2 - 1
    torch.testing.assert_close(viewed(image, STILL), image, atol=1e-5, rtol=0)


def test_views_are_a_function_of_the_generator_and_mirror_half_of_the_time() -> None:
    image = torch.rand(3, 16, 16) * 2 - 1
    flipping = STILL.model_copy(update={"flip": True})
    mirrored = [bool((viewed(image, flipping, seed) - image.flip(2)).abs().max() < 1e-4) for seed in range(200)]
    assert 70 < sum(mirrored) < 130
    assert torch.equal(viewed(image, ViewsConfig(), 5), viewed(image, ViewsConfig(), 5))
    assert not torch.equal(viewed(image, ViewsConfig(), 5), viewed(image, ViewsConfig(), 6))


def test_content_grows_with_zoom_and_stays_within_the_shift() -> None:
    image = torch.full((3, 64, 64), 1.0)
    image[:, 24:40, 24:40] = -1.0

    def dark(views: ViewsConfig, seed: int = 0) -> torch.Tensor:
        return (viewed(image, views, seed)[0] < 0).nonzero().float()

    larger = len(dark(STILL.model_copy(update={"zoom": (1.5, 1.5)})))
    smaller = len(dark(STILL.model_copy(update={"zoom": (0.5, 0.5)})))
    assert smaller == 8 * 8 and larger == 24 * 24
    centres = torch.stack([dark(STILL.model_copy(update={"shift": 0.25}), seed).mean(0) for seed in range(100)])
    moved = centres - 31.5
    assert moved.abs().max() <= 16.5 and (moved.amax(0) > 10).all() and (moved.amin(0) < -10).all()


def test_what_lies_outside_repeats_the_border() -> None:
    image = torch.rand(1, 1, 1).expand(3, 16, 16).contiguous()
    wild = ViewsConfig(zoom=(0.3, 0.4), shift=0.5, rotation=90.0)
    torch.testing.assert_close(viewed(image, wild), image, atol=1e-5, rtol=0)


def boxes(width: int, height: int, image_size: int = 64, **fields: object) -> list[tuple[float, float, float, float]]:
    config = CropConfig(**fields)
    return [RandomCrop(config, seed).box(width, height, image_size) for seed in range(200)]


@pytest.mark.parametrize("kind", ["square", "area"])
@pytest.mark.parametrize(("width", "height"), [(100, 100), (160, 100), (70, 90), (1000, 20)])
def test_crops_lie_within_the_image_and_differ_by_seed(kind: str, width: int, height: int) -> None:
    found = boxes(width, height, kind=kind)
    for left, top, right, bottom in found:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert found == boxes(width, height, kind=kind)
    assert len(set(found)) > 10 or (kind, width) == ("area", 1000), "no such shape fits: the middle, every time"


def test_square_crops_take_a_part_of_the_shortest_side() -> None:
    """LlamaGen resizes the shortest side to 64..80 pixels and cuts 64 x 64 of it, anywhere."""
    found = boxes(200, 100, kind="square", smallest=0.8)
    sides = {round(right - left, 6) for left, _, right, _ in found}
    assert sides == {round(100 * 64 / size, 6) for size in range(64, 81)}
    assert all(right - left == pytest.approx(bottom - top) for left, top, right, bottom in found)
    assert min(left for left, *_ in found) < 10 and max(right for _, _, right, _ in found) > 190


def test_area_crops_take_a_part_of_the_area_in_another_shape() -> None:
    found = boxes(100, 100, kind="area", smallest=0.9)
    areas = [(right - left) * (bottom - top) / 1e4 for left, top, right, bottom in found]
    ratios = [(right - left) / (bottom - top) for left, top, right, bottom in found]
    assert 0.9 <= min(areas) < 0.91 and max(areas) <= 1
    assert 0.9 < min(ratios) < 0.95 and 1.05 < max(ratios) < 1 / 0.9, "what fits of 3:4 to 4:3"


@pytest.mark.parametrize(("width", "height"), [(1000, 20), (20, 1000)])
def test_area_crops_of_very_long_images_are_torchvisions_middle(width: int, height: int) -> None:

    from torchvision.transforms import RandomResizedCrop

    box = RandomCrop(CropConfig(kind="area", smallest=0.9), 0).box(width, height, 64)
    top, left, rows, columns = RandomResizedCrop.get_params(Image.new("L", (width, height)), (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == pytest.approx((left, top, left + columns, top + rows), abs=1)


def test_a_crop_takes_the_place_of_the_resize_mode(encoded: Encoder) -> None:
    data = encoded(Image.linear_gradient("L").convert("RGB"), "PNG")  # 256 rows, the row's number in each
    for seed in range(5):
        crop = RandomCrop(CropConfig(kind="square", smallest=0.5, largest=0.5), seed)
        rows = np.asarray(load_image(data, config(64), crop=crop))[:, 0, 0].astype(float)
        _, top, _, bottom = crop.box(256, 256, 64)
        np.testing.assert_allclose(rows, np.linspace(top, bottom, 65)[:-1] + (bottom - top) / 128 - 0.5, atol=1.5)


def test_limits_of_a_crop_are_in_order() -> None:
    with pytest.raises(ValueError, match="smallest=0.9 is larger than largest=0.5"):
        CropConfig(smallest=0.9, largest=0.5)
    with pytest.raises(ValueError, match="greater than 0"):
        CropConfig(smallest=0.0)
