"""Image models: equal to torchvision's, and with the properties that strategies rely on."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models import in_stage_order
from torch import Tensor, nn

from dist_lab import zoo
from dist_lab.programs.cli import config
from dist_lab.transforms.init import draw, initialize
from dist_lab.zoo.resnet import ResNet18
from dist_lab.zoo.vit import Attention, ViT, from_torchvision

V = 19
IMAGE = (2, 12, 20)
VIT = {"image": IMAGE, "patch": 4, "layers": 3, "width": 48, "heads": 6, "ffn": 40}
MODELS = {"vit": lambda: ViT(V, **VIT), "resnet18": lambda: ResNet18(V, image=IMAGE)}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    with torch.device("meta"):
        model = MODELS[name]().to(dtype)
    initialize(model, seed)
    return model


def images(rows: int = 4, shape: tuple[int, ...] = IMAGE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)


def disturb(model: nn.Module) -> None:
    """Change all parameters, because norms of one and biases of zero would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))


# ---- logits


def test_torchvisions_vision_transformer_loads_and_gives_the_same_logits() -> None:
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = VisionTransformer(
            image_size=24, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=56,
            num_classes=V,
        ).double()  # fmt: skip
    disturb(theirs)  # its head and biases are initially zero
    ours = ViT(V, image=(3, 24, 24), patch=8, layers=3, width=32, heads=4, ffn=56).double()
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    pixels = images(shape=(3, 24, 24))
    expected = theirs.eval()(pixels)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(pixels), expected, rtol=0, atol=1e-12)


def test_every_weight_of_vit_b_16_is_converted() -> None:
    from torchvision.models import vit_b_16

    with torch.device("meta"):
        theirs = vit_b_16().state_dict()
        shape = {"patch": 16, "layers": 12, "width": 768, "heads": 12, "ffn": 3072}
        ours = ViT(1000, image=(3, 224, 224), **shape).state_dict()
    converted = from_torchvision(theirs)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}
    assert sum(t.numel() for t in converted.values()) == sum(t.numel() for t in theirs.values())


def test_a_weight_that_a_vision_transformer_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.weight is not a parameter of torchv"):
        from_torchvision({"layer1.0.conv1.weight": torch.zeros(1)})


def test_the_resnet_equals_torchvisions_except_for_its_stem() -> None:
    from torchvision.models import resnet18

    ours = make("resnet18")
    disturb(ours)
    theirs = resnet18(num_classes=V).double()
    theirs.conv1 = nn.Conv2d(2, 64, 3, padding=1, bias=False).double()
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    for train in (True, False):  # with batch statistics, then with running statistics
        expected = theirs.train(train)(images())
        torch.testing.assert_close(ours.train(train)(images()), expected, rtol=0, atol=1e-12)
    assert ours.bn1.num_batches_tracked == 1
    assert torch.equal(ours.bn1.running_var, theirs.bn1.running_var)


def test_each_token_depends_only_on_its_own_patch() -> None:
    """The class token depends on none."""
    embed = make("vit").embed
    changed = images()
    changed[:, :, 4:8, 8:12] += 1  # the third patch of the second row; a row has five
    differs = (embed(images()) - embed(changed)).abs().amax((0, 2)) > 1e-12
    assert differs.nonzero().flatten().tolist() == [1 + 5 + 2]


@pytest.mark.slow_unless(lambda dtype: dtype == torch.float32)
@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_parameter_gets_a_finite_gradient_of_its_dtype(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    logits = model(images().to(dtype))
    assert (logits.shape, logits.dtype) == ((4, V), dtype)
    F.cross_entropy(logits, torch.arange(4)).backward()
    for fqn, parameter in model.named_parameters():
        assert parameter.grad is not None, fqn
        assert parameter.grad.dtype == dtype, fqn
        assert parameter.grad.stride() == parameter.stride(), fqn  # otherwise DDP warns
        assert parameter.grad.isfinite().all(), fqn
        assert parameter.grad.any() or fqn.endswith("k_proj.bias"), fqn  # softmax cancels it


@every_model
def test_the_first_loss_is_that_of_guessing(name: str) -> None:
    """Logits with deviation 1 give about ln V + 1/2 nat; a wrong scale gives several nats more."""
    targets = torch.arange(64) % V
    loss = F.cross_entropy(make(name, torch.float32)(images(64).float()), targets)
    assert abs(loss - torch.tensor(V).log() - 0.5) < 0.8


# ---- stages and units


@every_model
def test_running_the_stages_in_order_equals_the_forward(name: str) -> None:
    model, x = make(name).eval(), images()
    for module in in_stage_order(model).values():
        x = module(x)
    assert torch.equal(x, model(images()))


@every_model
def test_every_parameter_and_buffer_is_in_exactly_one_stage(name: str) -> None:
    model = make(name)
    stages = in_stage_order(model).items()
    held = [f"{stage}.{fqn}" for stage, module in stages for fqn in module.state_dict()]
    assert sorted(held) == sorted(model.state_dict())


def test_units_are_the_blocks() -> None:
    from torchvision.models.resnet import BasicBlock

    vit, resnet = make("vit"), make("resnet18")
    assert [m for m in vit.modules() if isinstance(m, vit.units)] == list(vit.layers.values())
    blocks = [name for name, m in resnet.named_modules() if isinstance(m, BasicBlock)]
    assert list(resnet.units) == blocks
    assert len(blocks) == 8


def test_attention_on_two_halves_of_the_heads_adds_up_to_the_whole() -> None:
    whole = make("vit").layers["0"].self_attn
    disturb(whole)
    x = images(shape=(5, 48))
    parts = [Attention(width=48, heads=6).double() for _ in range(2)]
    for name, dim in {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}.items():
        linear = getattr(whole, name)
        for i, part in enumerate(parts):
            half = getattr(part, name)
            half.weight = nn.Parameter(linear.weight.chunk(2, dim)[i])
            half.bias = nn.Parameter(linear.bias.chunk(2)[i] if dim == 0 else linear.bias / 2)
    torch.testing.assert_close(parts[0](x) + parts[1](x), whole(x), rtol=0, atol=1e-12)


# ---- sizes, building and initial weights


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vit", "tiny", 1_017_826),
        ("vit", "small", 8_022_562),
        ("vit", "25m", 25_272_354),
        ("vit", "124m", 124_251_810),
        ("resnet18", "tiny", 11_185_122),
    ],
)
def test_each_size_has_the_documented_number_of_parameters(
    name: str, size: str, expected: int
) -> None:
    model = zoo.build(name, size, vocab=34, image=(1, 28, 28), seed=0, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_registry_agrees_with_the_models_on_what_they_read_and_their_sizes() -> None:
    assert config.MODELS.keys() == zoo.MODELS.keys()
    for name, row in config.MODELS.items():
        assert row.reads == zoo.MODELS[name].reads
        assert list(row.sizes) == list(zoo.SIZES[name])
        assert {size.get("patch", 1) for size in zoo.SIZES[name].values()} == {row.patch}


@pytest.mark.slow_unless(lambda image: image == (3, 17, 9))
@pytest.mark.parametrize("image", [(1, 9, 9), (3, 17, 9)])
def test_the_resnet_trains_on_a_single_image_of_the_smallest_size(
    image: tuple[int, int, int],
) -> None:
    row = config.MODELS["resnet18"]
    assert row.smallest == min(image[1:])
    model = zoo.build("resnet18", "tiny", vocab=V, image=image, seed=0)
    model(torch.zeros(1, *image))
    smaller = zoo.build("resnet18", "tiny", vocab=V, image=(1, 8, 8), seed=0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        smaller(torch.zeros(1, 1, 8, 8))


def test_an_image_shape_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="vit reads images, not image=None"):
        zoo.build("vit", "tiny", vocab=V, seed=0)
    with pytest.raises(ValueError, match=r"gpt reads text, not image=\(1, 28, 28\)"):
        zoo.build("gpt", "tiny", vocab=V, image=(1, 28, 28), seed=0)
    with pytest.raises(ValueError, match="not 30 x 28 by patch=4"):
        zoo.build("vit", "tiny", vocab=V, image=(1, 30, 28), seed=0)


@pytest.mark.slow_unless(lambda name, dtype: name == "vit" or dtype == torch.float32)
@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_is_the_same_drawn_alone_or_from_meta_or_in_place(
    name: str, dtype: torch.dtype
) -> None:
    random_state = torch.random.get_rng_state()
    model = make(name, dtype, seed=5)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    with torch.random.fork_rng():
        used = MODELS[name]().to(dtype)
    used(images().to(dtype))  # changes the running statistics
    initialize(used, seed=5)
    for fqn, tensor in used.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[fqn]), fqn
    for fqn, parameter in reversed(list(model.named_parameters())):
        alone = draw(fqn, parameter.shape, 5, model.init_weight)
        assert torch.equal(parameter, alone.to(dtype)), fqn


def test_initial_buffers_equal_torchvisions_and_keep_their_dtype() -> None:
    from torchvision.models import resnet18

    theirs = resnet18().state_dict()
    buffers = dict(make("resnet18").named_buffers())
    assert len(buffers) == 60
    for fqn, buffer in buffers.items():
        assert torch.equal(buffer, theirs[fqn].to(buffer.dtype)), fqn
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float64, torch.int64}


def test_the_default_data_is_what_the_model_reads() -> None:
    chosen = {name: config.Config(model=name).to_dict()["data"] for name in config.MODELS}
    assert chosen == {"gpt": "stdlib", "mlp": "stdlib", "vit": "glyphs", "resnet18": "glyphs"}
    given = config.Config(model="vit", data="mnist")
    assert dataclasses.replace(given, steps=3).data == "mnist"
