"""The 3-D VQGAN: published numbers, sizes, constant clips, chunks."""

import pytest
import torch

from tests import golden_files
from torch_utils.precision import cpu_has_bf16, set_precision
from training.modules.chunks import Pointwise, Residual, Windowed, cut, pad, push_all
from training.modules.discriminators import PatchDiscriminator
from training.modules.vqgan3d import VQGAN3D, SameConv3d, SameConvTranspose3d

# Arguments of the release by the names of its command line, with the defaults of the golden numbers.
ARGUMENTS = {
    "n_hiddens": ("hidden", 4),
    "embedding_dim": ("embedding_dim", 8),
    "n_codes": ("num_codes", 16),
    "downsample": ("downsample", [4, 8, 8]),
    "norm_type": ("norm", "batch"),
    "padding_type": ("padding", "replicate"),
    "image_channels": ("channels", 3),
}


def golden_network(arguments, shape, salt=0):
    """A network with the weights of the golden numbers, in eval mode."""
    options = {ours: arguments.get(theirs, default) for theirs, (ours, default) in ARGUMENTS.items()}
    network = VQGAN3D(shape[3], shape[4], shape[2], **options)
    network.load_state_dict(golden_files.wave_fill(network.state_dict(), salt))
    return network.eval()


@golden_files.cases("tats", "vqgan_eval*")
@torch.no_grad()
def test_network(entry, golden):
    shape = entry["x"]["shape"]
    network = golden_network(entry["args"], shape, golden_files.salt_of(golden))
    x = golden_files.wave(shape, entry["x"]["f"], entry["x"].get("p", 0), entry["x"].get("a", 0.5))
    golden_files.check(network.encoder(x), entry["encoder"], where="encoder")
    z = network.features(x)
    golden_files.check(z, entry["pre_vq"], where="pre_vq")
    quantized = network.quantizer(z)
    assert list(quantized.codes.shape) == entry["codes_shape"]
    assert quantized.codes.flatten().tolist() == entry["codes"]
    golden_files.check(quantized.output, entry["st_embeddings"], where="st_embeddings")
    golden_files.check(network.generate(quantized.output), entry["decode"], where="decode")
    assert torch.equal(network.encode(2 * x), quantized.codes), "frames in [-1, 1] go in"
    golden_files.check(network.decode(quantized.codes) / 2, entry["decode"], where="decode")
    judges = [PatchDiscriminator(axes, shape[1], 4) for axes in (2, 3)]
    own = network.state_dict().keys() - {"codebook.initialised"}
    assert len(own) + sum(len(judge.state_dict()) for judge in judges) == entry["n_state"]


@golden_files.cases("tats", "samepad*")
@torch.no_grad()
def test_same_convolution(entry, golden, request):
    case = request.node.callspec.id.partition("samepad-")[2]
    kernel, _, strides = case.removeprefix("T_").partition("_")[0].removeprefix("k").partition("s")
    t, h, w = map(int, strides if len(strides) == 3 else strides * 3)
    if case.startswith("T_"):
        layer, names = SameConvTranspose3d(2, 3, int(kernel), (t, h, w)), "convt"
    else:
        layer, names = SameConv3d(2, 3, int(kernel), (t, h, w), *case.split("_")[1:]), "conv"
    state = {f"{case}.{name}": value for name, value in layer.state_dict().items()}
    assert all(name.startswith(f"{case}.{names}.") for name in state)
    filled = golden_files.wave_fill(state, golden_files.salt_of(golden))
    layer.load_state_dict({name[len(case) + 1 :]: v for name, v in filled.items()})
    y = layer(golden_files.wave(entry["x"]["shape"], entry["x"]["f"], entry["x"].get("p", 0), entry["x"].get("a", 0.5)))
    golden_files.check(y, entry["y"], where=case)


def test_published_size():
    """The files of UCF-101, Sky Timelapse and Taichi-HD: 242 tensors, of which 50 are of discriminators, 33 of VGG."""
    with torch.device("meta"):
        network = VQGAN3D()
    assert len(network.state_dict()) == 242 - 50 - 33 + 1
    assert sum(p.numel() for p in network.encoder.parameters()) == 7_403_648
    assert sum(p.numel() for p in network.decoder.parameters()) == 16_116_995
    assert (network.encoder.reach(), network.decoder.reach()) == ((32, 28), (6, 6))


@pytest.mark.parametrize("padding", ["replicate", "reflect"])
@torch.no_grad()
def test_constant_clips_have_constant_latents(padding):
    network = golden_network({"padding_type": padding, "n_hiddens": 2}, (1, 3, 16, 16, 16))
    x = golden_files.wave((1, 3, 1, 16, 16), 0.05).expand(-1, -1, 16, -1, -1)
    z = network.features(x)
    assert (z - z[:, :, :1]).abs().max() == 0


@torch.no_grad()
def test_codes_move_with_the_clip():
    network = golden_network({"downsample": [4, 4, 4], "n_hiddens": 2}, (1, 3, 64, 8, 8))
    x = golden_files.wave((1, 3, 64, 8, 8), 0.05)
    margin = 4
    whole, shifted = network.encode(x), network.encode(x[:, :, 4:])
    assert torch.equal(whole[:, 1 + margin : -margin], shifted[:, margin:-margin])


@pytest.mark.parametrize("downsample", [[4, 8, 8], [4, 4, 4], [2, 4, 8], [1, 8, 8], [8, 8, 8]])
@torch.no_grad()
def test_chunks_equal_the_whole(downsample):
    network = golden_network({"downsample": downsample, "n_hiddens": 2}, (1, 3, 64, 8, 8))
    t = downsample[0]
    x = golden_files.wave((2, 3, 64, 8, 8), 0.05, a=1.0)
    whole = network.encode(x)
    for chunk, sizes in ((t, [5, 1, 58]), (24, [16, 48]), (100, [64])):
        codes = torch.cat(list(network.encode_stream(x.split(sizes, dim=2), chunk)), dim=1)
        assert torch.equal(codes, whole)
    video = network.decode(whole)
    for chunk, sizes in ((1, [64 // t]), (5, [1, 64 // t - 1]), (100, [64 // t])):
        parts = torch.cat(list(network.decode_stream(whole.split(sizes, dim=1), chunk)), dim=2)
        assert parts.shape == video.shape
        assert (parts - video).abs().max() < 1e-5


@pytest.mark.parametrize("padding", ["constant", "reflect"])
@torch.no_grad()
def test_chunks_of_other_paddings_equal_the_whole(padding):
    network = golden_network({"padding_type": padding, "n_hiddens": 2}, (1, 3, 24, 16, 16))
    x = golden_files.wave((1, 3, 24, 16, 16), 0.05, a=1.0)
    z = network.latents(x)
    layers = [*network.encoder.in_chunks(), Pointwise(network.pre_vq_conv)]
    parts = [push_all(layers, part * 0.5, end) for part, end in cut([x], 4, axis=2)]
    assert (torch.cat([part for part in parts if part is not None], dim=2) - z).abs().max() < 1e-5
    assert torch.equal(torch.cat(list(network.encode_stream([x], 8)), dim=1), network.encode(x))


@pytest.mark.parametrize("num_latents", [1, 2, 3])
@torch.no_grad()
def test_short_videos_in_chunks_equal_the_whole(num_latents):
    network = golden_network({"n_hiddens": 2}, (1, 3, 16, 8, 8))
    codes = torch.arange(num_latents).view(1, -1, 1, 1)
    parts = torch.cat(list(network.decode_stream([codes], 1)), dim=2)
    assert (parts - network.decode(codes)).abs().max() < 1e-5
    assert list(network.decode_stream([])) == []


@torch.no_grad()
def test_parts_need_exactly_their_margins():
    """With the reach of the layers parts equal the whole, with less they do not."""
    network = golden_network({"n_hiddens": 2}, (1, 3, 96, 8, 8))
    codes = torch.arange(20).view(1, 20, 1, 1) % 16
    video = network.decode(codes)
    for start, stop in ((0, 20), (0, 1), (3, 5), (18, 20)):
        assert (network.decode_part(codes, start, stop) - video[:, :, 4 * start : 4 * stop]).abs().max() < 1e-5
    less = network.decode(codes[:, 4:16])[:, :, 16:-16]  # 4 instead of 6
    assert (less - video[:, :, 32:48]).abs().max() > 1e-4
    x = golden_files.wave((1, 3, 96, 8, 8), 0.05, a=1.0)
    latents = network.latents(x)
    assert (network.latents(x[:, :, 8:80])[:, :, 8:10] - latents[:, :, 10:12]).abs().max() < 1e-6
    assert (network.latents(x[:, :, 16:80])[:, :, 5:6] - latents[:, :, 9:10]).abs().max() > 1e-6


@torch.no_grad()
def test_layers_hold_few_frames():
    network = golden_network({"n_hiddens": 2}, (1, 3, 16, 8, 8))
    layers = [Pointwise(network.post_vq_conv), *network.decoder.in_chunks()]
    held = []
    for number in range(12):
        push_all(layers, network.quantizer.lookup(torch.full((1, 4, 1, 1), number)), end=False)
        windows = [layer for layer in layers if isinstance(layer, Windowed)]
        windows += [part for layer in layers if isinstance(layer, Residual) for part in layer.layers]
        held.append(
            sum(layer.held.shape[2] for layer in windows if isinstance(layer, Windowed) and layer.held is not None)
        )
    assert max(held) == held[1], "what is kept does not grow"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"norm_type": "group", "n_hiddens": 16}, "spans all frames"),
        ({"padding_type": "circular"}, "joins both ends"),
    ],
)
def test_what_cannot_work_in_chunks_is_refused(arguments, words):
    network = golden_network(arguments, (1, 3, 16, 8, 8))
    with pytest.raises(ValueError, match=words):
        network.encode_stream([torch.zeros(1, 3, 16, 8, 8)])


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="powers of two"):
        VQGAN3D(downsample=[4, 6, 6])
    with pytest.raises(ValueError, match="multiple of 32"):
        VQGAN3D(norm="group", hidden=8)
    network = golden_network({}, (1, 3, 16, 16, 16))
    with pytest.raises(ValueError, match="got 6x16x16 .* blocks of 4x8x8"):
        network.encode(torch.zeros(1, 3, 6, 16, 16))


@pytest.mark.parametrize("mode", ["replicate", "constant", "reflect"])
@pytest.mark.parametrize("padding", [(1, 2, 2, 1, 1, 0), (0, 0, 0, 0, 2, 1), (2, 0, 0, 1, 0, 0), (0,) * 6])
@torch.no_grad()
def test_padding_by_blocks_is_that_of_torch(padding, mode):
    x = torch.randn(2, 3, 5, 4, 6)[:, :, 1:]  # no contiguous tensor
    assert torch.equal(pad(x, padding, mode), torch.nn.functional.pad(x, padding, mode=mode))


@pytest.mark.skipif(not cpu_has_bf16(), reason="bfloat16 is emulated, tens of times slower")
@torch.no_grad()
def test_half_precision_is_near_single_precision_in_chunks_too():
    torch.manual_seed(0)
    network = VQGAN3D(32, 32, 16, hidden=16, embedding_dim=8, num_codes=16).eval()
    codes = torch.randint(0, 16, (1, 6, 4, 4))
    expected = network.decode(codes)
    assert set_precision([network], "bf16") == "bf16"
    whole, chunks = network.decode(codes), torch.cat(list(network.decode_stream([codes], 2)), dim=2)
    for found in (whole, chunks):
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        assert (found - expected).norm() < 0.02 * expected.norm()
    set_precision([network], "fp32")
    assert torch.equal(network.decode(codes), expected)
