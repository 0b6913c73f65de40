"""EfficientNet-Lite0 classifies a photograph, and its motion features depend on motion and not on content."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from metrics.detectors import efficientnet_lite


def randomise(net: efficientnet_lite.EfficientNetLite0) -> efficientnet_lite.EfficientNetLite0:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in net.state_dict().items():
        if tensor.ndim >= 2:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("weight", "running_var")):
            tensor.uniform_(0.8, 1.2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)
    return net


def written_out(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map behind block 10, and the logits, by the tensors' names and shapes, and TensorFlow's padding."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        kernel, size = weight.shape[2], x.shape[2]
        total = max((int(np.ceil(size / stride)) - 1) * stride + kernel - size, 0)
        before, after = total // 2, total - total // 2
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (var + 1e-3).sqrt()
        return x * scale[:, None, None] + (state[f"{name}.bias"] - mean * scale)[:, None, None]

    x = norm(conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    middle = x
    for number in range(16):
        name, y = f"_blocks.{number}", x
        if f"{name}._expand_conv.weight" in state:
            y = norm(conv(y, f"{name}._expand_conv"), f"{name}._bn0").clamp(0, 6)
        y = conv(y, f"{name}._depthwise_conv", stride=2 if number in (1, 3, 5, 11) else 1)
        y = norm(conv(norm(y, f"{name}._bn1").clamp(0, 6), f"{name}._project_conv"), f"{name}._bn2")
        x = x + y if x.shape == y.shape else y
        middle = x if number == 10 else middle
    x = norm(conv(x, "_conv_head"), "_bn1").clamp(0, 6).mean(dim=[2, 3])
    return middle, x @ state["_fc.weight"].T + state["_fc.bias"]


def test_network_equals_the_one_written_out():
    net = randomise(efficientnet_lite.EfficientNetLite0())
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    middle, logits = written_out(net.state_dict(), x)
    assert middle.shape == (1, 112, 14, 14) and logits.std() > 0.1
    torch.testing.assert_close(net(x), logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(net.maps(x, 11), middle, rtol=1e-3, atol=1e-3)
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_652_008  # as public tables say


def test_a_photograph_of_a_cat_is_classified_as_one(published):
    """Classes 281, 282 and 285 of ImageNet are tabby, tiger cat and Egyptian cat."""
    samples = pytest.importorskip("iscc_samples")
    photograph = next(path for path in samples.images() if path.name == "demo.jpg")
    image = torch.tensor(np.asarray(Image.open(photograph).convert("RGB"))).permute(2, 0, 1)[None]
    probabilities = published("efficientnet-lite0")(efficientnet_lite.prepare(image)).softmax(dim=1)[0]
    assert sorted(probabilities.topk(3).indices.tolist()) == [281, 282, 285]
    assert probabilities[[281, 282, 285]].sum() > 0.6


def test_scaling_is_that_of_training(published):
    """The first normalisation remembers the mean of its inputs: the colour of ImageNet, scaled as `prepare` does."""
    net = published("efficientnet-lite0")
    found = torch.linalg.lstsq(net._conv_stem.weight.sum(dim=[2, 3]), net._bn0.running_mean[:, None]).solution
    colour = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1).expand(1, 3, 224, 224) * 255
    torch.testing.assert_close(found[:, 0], efficientnet_lite.prepare(colour)[0, :, 0, 0], rtol=0, atol=0.08)


def test_frames_have_features_whatever_their_size_and_grouping(published):
    net = published("efficientnet-lite0")
    images = torch.randint(256, (18, 3, 9, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = net.features(images)
    assert found.shape == (18, 1280) and found.dtype == torch.float32
    torch.testing.assert_close(found[17:], net.features(images[17:]), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Motion


def drifting(num_clips: int, num_frames: int) -> Tensor:
    """Soft colours that drift, each clip its own way: uint8 (N, 3, T, 48, 80)."""
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(num_clips, 3, 9, 14, generator=generator), size=(96, 160), mode="bicubic")
    fine = F.interpolate(torch.rand(num_clips, 3, 32, 54, generator=generator), size=(96, 160), mode="bicubic")
    still = (0.7 * coarse + 0.3 * fine).clamp(0, 1)
    speed = torch.rand(num_clips, 2, generator=generator) * 0.06 - 0.03
    frames = []
    for number in range(num_frames):
        theta = torch.eye(2).mul(0.5).expand(num_clips, 2, 2)
        grid = F.affine_grid(
            torch.cat([theta, number * speed[:, :, None]], 2), [num_clips, 3, 48, 80], align_corners=False
        )
        frames.append(F.grid_sample(still, grid, align_corners=False))
    return (torch.stack(frames, dim=2) * 255).round().byte()


def warped(video: Tensor, is_held: bool) -> Tensor:
    """Return every frame bent smoothly by about three pixels: the same way throughout a clip, or each its own way."""
    num_clips, _, num_frames, height, width = video.shape
    generator = torch.Generator().manual_seed(1)
    bend = torch.randn(num_clips, 1 if is_held else num_frames, 2, 4, 6, generator=generator).expand(
        -1, num_frames, -1, -1, -1
    )
    bend = F.interpolate(bend.flatten(0, 1), size=(height, width), mode="bicubic").permute(0, 2, 3, 1)
    rest = F.affine_grid(torch.eye(2, 3).expand(len(bend), 2, 3), [len(bend), 3, height, width], align_corners=False)
    frames = video.transpose(1, 2).flatten(0, 1).float()
    frames = F.grid_sample(
        frames, rest + bend * 6 / torch.tensor([width, height]), padding_mode="border", align_corners=False
    )
    return frames.round().byte().unflatten(0, (num_clips, num_frames)).transpose(1, 2)


def test_motion_depends_on_temporal_order_and_not_on_content(published):
    motion = published("efficientnet-lite0-motion")
    video = drifting(3, 6)
    clean = motion.features(video)
    assert clean.shape == (3, 224) and clean.min() > 0

    def change(other: Tensor) -> float:
        return ((motion.features(other) - clean).norm() / clean.norm()).item()

    held, anew = change(warped(video, is_held=True)), change(warped(video, is_held=False))
    shuffled = change(video[:, :, [3, 0, 5, 2, 4, 1]])
    assert held < 0.4 and anew > 1 and shuffled > 0.5, (held, anew, shuffled)
    assert change(video.flip(2)) < 1e-4  # reversal cannot be felt: differences have no sign


def test_static_video_has_no_motion(published):
    still = drifting(1, 1).expand(-1, -1, 3, -1, -1)
    assert published("efficientnet-lite0-motion").features(still).abs().max() < 1e-5


def test_motion_is_the_mean_absolute_difference_in_units_of_the_channels():
    net = randomise(efficientnet_lite.EfficientNetLite0())
    net.identity = {}
    video = drifting(1, 3)
    x = (F.interpolate(video[0].transpose(0, 1).float(), size=(224, 224), mode="bilinear") - 127) / 128
    maps = written_out(net.state_dict(), x)[0].double()
    # The cells of the 3x3 grid have rows and columns 0-4, 4-9 and 9-13: neighbours share a line.
    edges = ((0, 5), (4, 10), (9, 14))
    cells = [maps[:, :, a:b, c:d].mean(dim=[2, 3]) for a, b in edges for c, d in edges]
    scale = sum(net.state_dict()[f"_blocks.{block}._bn2.weight"].double() ** 2 for block in (8, 9, 10)) ** 0.5
    y = torch.stack(cells) / scale  # (9, 3, 112)
    first = ((y[:, 1] - y[:, 0]).abs() + (y[:, 2] - y[:, 1]).abs()) / 2
    second = (y[:, 2] - 2 * y[:, 1] + y[:, 0]).abs()
    expected = torch.cat([first.mean(0), second.mean(0)])[None].float()
    torch.testing.assert_close(efficientnet_lite.Motion(net).features(video), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="at least 3 frames and got 2"):
        efficientnet_lite.Motion(net).features(video[:, :, :2])
