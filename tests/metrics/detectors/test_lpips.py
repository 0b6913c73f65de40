"""LPIPS gives the published value, and is the formula of its paper."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metrics.detectors import lpips

# Known good values of the distance of black from white: 0.8140 is public for AlexNet; VGG16's was measured once.
GOLDEN = {"lpips-alex": (0.8140, 1e-4), "lpips-vgg": (0.4538, 1e-4)}


@pytest.mark.parametrize("name", GOLDEN)
def test_distance_of_black_from_white_is_the_known_one(name: str, published):
    net = published(name)
    black, white = (torch.full((1, 3, 64, 64), value, dtype=torch.uint8) for value in (0, 255))
    value, tolerance = GOLDEN[name]
    assert net.distance(black, white).item() == pytest.approx(value, abs=tolerance)
    assert net.distance(white.float() * 0 - 1, white.float() * 0 + 1).item() == pytest.approx(value, abs=tolerance)
    assert net.identity["verified"]


def random_net(trunk: lpips.Trunk) -> lpips.LPIPS:
    generator = torch.Generator().manual_seed(0)
    net = lpips.LPIPS(trunk)
    for name, tensor in net.state_dict().items():
        if name.startswith("heads"):
            tensor.uniform_(0, 1, generator=generator)
        elif tensor.ndim == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        else:
            tensor.normal_(0, 0.1, generator=generator)
    return net


def written_out(net: lpips.LPIPS, a: Tensor, b: Tensor, depths: list[list[tuple]]) -> list[float]:
    """Equation 1 of the paper for each pair, depth by depth; a depth is a pool or none, then convolutions."""
    state = net.state_dict()
    shift, scale = (torch.tensor(v)[:, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    x = (torch.cat([a, b]) - shift) / scale
    distances, number = np.zeros(len(a)), 0
    for depth, (pool, *convs) in enumerate(depths):
        x = F.max_pool2d(x, *pool) if pool else x
        for stride, padding in convs:
            weight, bias = state[f"convs.{number}.weight"], state[f"convs.{number}.bias"]
            x = F.conv2d(x, weight, bias, stride, padding).clamp_min(0)
            number += 1
        unit = F.normalize(x.double(), dim=1).numpy()
        difference = (unit[: len(a)] - unit[len(a) :]) ** 2
        head = state[f"heads.{depth}"].double().numpy()[None, :, None, None]
        distances += (head * difference).sum(1).mean(axis=(1, 2))
    return distances.tolist()


@pytest.mark.parametrize(
    ("trunk", "depths"),
    [
        (lpips.ALEX, [[(), (4, 2)], [(3, 2), (1, 2)], [(3, 2), (1, 1)], [(), (1, 1)], [(), (1, 1)]]),
        (
            lpips.VGG,
            [
                [(), (1, 1), (1, 1)],
                [(2, 2), (1, 1), (1, 1)],
                [(2, 2), (1, 1), (1, 1), (1, 1)],
                [(2, 2), (1, 1), (1, 1), (1, 1)],
                [(2, 2), (1, 1), (1, 1), (1, 1)],
            ],
        ),
    ],
    ids=["alex", "vgg"],
)
def test_distance_is_equation_1_of_the_paper(trunk: lpips.Trunk, depths: list):
    net = random_net(trunk)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(256, (3, 3, 36, 48), generator=generator, dtype=torch.uint8) for _ in range(2))
    expected = written_out(net, a / 127.5 - 1, b / 127.5 - 1, depths)
    assert net.distance(a, b).tolist() == pytest.approx(expected, rel=1e-4)
    assert net.distance(b, a).tolist() == pytest.approx(expected, rel=1e-4)
    assert net.distance(a, a).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("trunk", "edge"), [(lpips.ALEX, 31), (lpips.VGG, 16)])
def test_images_that_are_too_small_are_refused(trunk: lpips.Trunk, edge: int):
    net = random_net(trunk)
    image = torch.zeros(1, 3, edge, 40)
    assert net.distance(image, image).item() == 0
    with pytest.raises(ValueError, match=f"got images of {edge - 1}x40, and needs {edge} pixels"):
        net.distance(image[:, :, 1:], image[:, :, 1:])
