"""Text models: equal to independent references, and with the properties that strategies rely on."""

import pytest
import torch
import torch.nn.functional as F
from models import in_stage_order
from torch import Tensor, nn

from dist_lab import zoo
from dist_lab.inference.cache import Contiguous
from dist_lab.transforms.init import draw, initialize
from dist_lab.zoo.gpt import GPT, Attention
from dist_lab.zoo.mlp import MLP

V = 19
GPT_SHAPE = {"layers": 3, "width": 48, "heads": 6, "kv_heads": 2, "ffn": 40}
MLP_SHAPE = {"layers": 3, "width": 24, "ffn": 40, "context": 4, "features": 8}
MODELS = {
    "gpt": lambda: GPT(V, **GPT_SHAPE),
    "gpt-tied": lambda: GPT(V, **GPT_SHAPE, tied=True),
    "mlp": lambda: MLP(V, **MLP_SHAPE),
}
every_model = pytest.mark.parametrize("name", MODELS)
each_gpt = pytest.mark.parametrize("name", ["gpt", "gpt-tied"])


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    model = MODELS[name]().to(dtype)
    initialize(model, seed)
    return model


def some_tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """In float64 a different order of sums changes about 1e-15, and a wrong term far more."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# ---- logits


def gpt_by_hand(w: dict[str, Tensor], sequence: Tensor) -> Tensor:
    """The gpt, one head and one position at a time, with complex rotations. (T,) -> (T, V)"""
    heads, sharing, size = 6, 3, 8

    def norm(x: Tensor, name: str) -> Tensor:
        return x / ((x * x).sum(-1, keepdim=True) / 48 + 1e-5).sqrt() * w[name]

    def rotated(x: Tensor) -> Tensor:  # (T, Dh): row t is rotated by t
        angles = [[t / 10_000 ** (2 * i / size) for i in range(size // 2)] for t in range(len(x))]
        turn = torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
        pairs = turn * torch.complex(x[:, : size // 2], x[:, size // 2 :])
        return torch.cat([pairs.real, pairs.imag], -1)

    def attention(x: Tensor, at: str) -> Tensor:
        mixed = []
        for head in range(heads):
            own, shared = (slice(i * size, (i + 1) * size) for i in (head, head // sharing))
            q = rotated(x @ w[f"{at}.q_proj.weight"][own].T)
            k = rotated(x @ w[f"{at}.k_proj.weight"][shared].T)
            v = x @ w[f"{at}.v_proj.weight"][shared].T
            scores = [q[t] @ k[: t + 1].T / size**0.5 for t in range(len(x))]
            mixed.append(torch.stack([s.softmax(0) @ v[: len(s)] for s in scores]))
        return torch.cat(mixed, -1) @ w[f"{at}.o_proj.weight"].T

    def mlp(x: Tensor, at: str) -> Tensor:
        gate, up = (x @ w[f"{at}.{side}_proj.weight"].T for side in ("gate", "up"))
        return (gate / (1 + torch.exp(-gate)) * up) @ w[f"{at}.down_proj.weight"].T

    x = w["model.embed_tokens.weight"][sequence]
    for at in (f"model.layers.{layer}" for layer in range(3)):
        x = x + attention(norm(x, f"{at}.input_layernorm.weight"), f"{at}.self_attn")
        x = x + mlp(norm(x, f"{at}.post_attention_layernorm.weight"), f"{at}.mlp")
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def mlp_by_hand(w: dict[str, Tensor], sequence: Tensor) -> Tensor:
    """The mlp, one position at a time. (T,) -> (T, V)"""

    def linear(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    logits, seen = [], [torch.zeros(8, dtype=torch.float64)] * 4
    for token in sequence:
        seen = [*seen[1:], w["embed.weight"][token]]
        x = linear(torch.cat(seen), "project")
        for at in (f"blocks.{layer}" for layer in range(3)):
            hidden = linear(norm(x, f"{at}.norm"), f"{at}.up")
            x = x + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{at}.down")
        logits.append(linear(norm(x, "norm"), "head"))
    return torch.stack(logits)


@every_model
def test_logits_equal_those_of_a_reference_written_out_by_hand(name: str) -> None:
    model, by_hand = make(name), mlp_by_hand if name == "mlp" else gpt_by_hand
    with torch.no_grad():
        for parameter in model.parameters():  # norms of one and biases of zero would hide mistakes
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    expected = torch.stack([by_hand(model.state_dict(), row) for row in some_tokens()])
    assert_same(model(some_tokens()), expected)


def where_logits_change(model: nn.Module, position: int) -> list[bool]:
    tokens, changed = some_tokens(), some_tokens()
    changed[:, position] = (changed[:, position] + 1) % V
    return (model(tokens) - model(changed)).abs().gt(1e-12).all(-1).all(0).tolist()


@each_gpt
def test_logits_depend_only_on_past_tokens(name: str) -> None:
    assert where_logits_change(make(name), 6) == [False] * 6 + [True] * 5


def test_logits_of_the_mlp_depend_only_on_its_context() -> None:
    assert where_logits_change(make("mlp"), 3) == [False] * 3 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("lengths", [[1] * 11, [4, 1, 6], [11]], ids=str)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text(lengths: list[int]) -> None:
    model, tokens = make("gpt"), some_tokens()
    cache = [Contiguous() for _ in range(GPT_SHAPE["layers"])]
    decoded = [model(part, cache=cache) for part in tokens.split(lengths, dim=1)]
    assert_same(torch.cat(decoded, dim=1), model(tokens))


def test_logits_depend_only_on_distances_between_positions() -> None:
    model, tokens = make("gpt"), some_tokens()
    assert_same(model(tokens, positions=torch.arange(100, 111)), model(tokens))
    stretched = model(tokens, positions=torch.arange(0, 22, 2))
    assert not torch.isclose(stretched[:, 1:], model(tokens)[:, 1:]).any()


def test_positions_are_exact_in_bfloat16() -> None:
    """257 rounds to 256 in bfloat16: a table in bfloat16 would give both tokens one position."""
    model, tokens = make("gpt", torch.bfloat16), some_tokens(batch=8, length=2)
    near, far, same = (
        model(tokens, positions=torch.tensor(at)).float() for at in ([0, 1], [256, 257], [0, 0])
    )
    assert (near - far).abs().mean() < 0.5 * (near - same).abs().mean()


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_parameter_gets_a_finite_gradient_of_its_dtype(name: str, dtype: torch.dtype) -> None:
    model, tokens = make(name, dtype), some_tokens(length=12)
    logits = model(tokens[:, :-1])
    assert (logits.shape, logits.dtype) == ((2, 11, V), dtype)
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for fqn, parameter in model.named_parameters():
        assert parameter.grad is not None, fqn
        assert parameter.grad.dtype == dtype, fqn
        assert parameter.grad.isfinite().all(), fqn
        assert parameter.grad.any(), fqn


# ---- names, stages and units


@each_gpt
def test_the_gpt_has_the_names_and_shapes_of_hugging_face_llama(name: str) -> None:
    block = {
        "input_layernorm.weight": (48,),
        "self_attn.q_proj.weight": (48, 48),
        "self_attn.k_proj.weight": (16, 48),
        "self_attn.v_proj.weight": (16, 48),
        "self_attn.o_proj.weight": (48, 48),
        "post_attention_layernorm.weight": (48,),
        "mlp.gate_proj.weight": (40, 48),
        "mlp.up_proj.weight": (40, 48),
        "mlp.down_proj.weight": (48, 40),
    }
    expected = {"model.embed_tokens.weight": (V, 48)}
    expected |= {f"model.layers.{i}.{fqn}": shape for i in range(3) for fqn, shape in block.items()}
    expected |= {"model.norm.weight": (48,), "lm_head.weight": (V, 48)}
    assert {fqn: tuple(value.shape) for fqn, value in make(name).state_dict().items()} == expected


def test_a_tied_head_is_the_embedding() -> None:
    model = make("gpt-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@every_model
def test_running_the_stages_in_order_equals_the_forward(name: str) -> None:
    model, x = make(name), some_tokens()
    for module in in_stage_order(model).values():
        x = module(x)
    assert torch.equal(x, model(some_tokens()))


@every_model
def test_every_parameter_is_in_exactly_one_stage_and_there_are_no_buffers(name: str) -> None:
    model = make(name)
    held = [
        f"{stage}.{fqn}"
        for stage, module in in_stage_order(model).items()
        for fqn, _ in module.named_parameters()
    ]
    assert sorted(held) == sorted(model.state_dict())
    assert not list(model.buffers())


def test_deleting_layers_on_a_stage_does_not_rename_the_others() -> None:
    whole, first, last = make("gpt"), make("gpt"), make("gpt")
    first.model.norm = first.lm_head = last.model.embed_tokens = nn.Identity()
    del first.model.layers["2"], last.model.layers["0"], last.model.layers["1"]
    assert sorted([*first.state_dict(), *last.state_dict()]) == sorted(whole.state_dict())
    assert torch.equal(last(first(some_tokens())), whole(some_tokens()))


@every_model
def test_units_are_the_blocks(name: str) -> None:
    model = make(name)
    blocks = model.blocks if name == "mlp" else model.model.layers
    units = [module for module in model.modules() if isinstance(module, model.units)]
    assert units == list(blocks.values())


def test_attention_on_two_halves_of_the_heads_adds_up_to_the_whole() -> None:
    whole = make("gpt").model.layers["0"].self_attn
    x = torch.randn(2, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [Attention(width=48, heads=6, kv_heads=2, rope_base=10_000.0) for _ in range(2)]
    for name, dim in {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}.items():
        for part, weight in zip(parts, getattr(whole, name).weight.chunk(2, dim), strict=True):
            getattr(part, name).weight = nn.Parameter(weight)
    assert_same(parts[0](x) + parts[1](x), whole(x))


# ---- sizes, building and initial weights


@pytest.mark.parametrize(
    ("size", "gpt", "mlp"),
    [
        ("tiny", 1_000_576, 955_488),
        ("small", 7_999_744, 8_229_408),
        ("25m", 25_436_672, 25_444_560),
        ("124m", 124_019_712, 124_867_344),
    ],
)
def test_each_size_has_the_documented_number_of_parameters(size: str, gpt: int, mlp: int) -> None:
    for name, expected in {"gpt": gpt, "mlp": mlp}.items():
        model = zoo.build(name, size, vocab=256, seed=0, device="meta")
        assert all(parameter.is_meta for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("1b", 1_100_048_384), ("7b", 6_738_415_616), ("13b", 13_015_864_320),
     ("70b", 68_976_648_192), ("405b", 405_853_388_800)],
)  # fmt: skip
def test_the_sizes_of_published_models_have_their_number_of_parameters(size, parameters) -> None:
    model = zoo.build("gpt", size, vocab=256, seed=0, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_for_an_unknown_name_or_size_the_error_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="no model named 'gtp': choose from gpt, mlp"):
        zoo.build("gtp", "tiny", vocab=V, seed=0)
    with pytest.raises(ValueError, match="gpt has no size '9b': choose from tiny, small, 25m, 124"):
        zoo.build("gpt", "9b", vocab=V, seed=0)
    with pytest.raises(ValueError, match="width=48 heads=6 kv_heads=4"):
        GPT(V, **GPT_SHAPE | {"kv_heads": 4})


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_parameter_is_the_same_drawn_alone_or_from_meta_and_in_any_dtype(
    name: str, dtype: torch.dtype
) -> None:
    random_state = torch.random.get_rng_state()
    with torch.device("meta"):
        model = MODELS[name]().to(dtype)
        initialize(model, seed=5)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    in_place, other = make(name, dtype, seed=5).state_dict(), make(name, dtype).state_dict()
    for fqn, parameter in reversed(list(model.named_parameters())):
        assert torch.equal(parameter, in_place[fqn]), fqn
        alone = draw(fqn, parameter.shape, 5, model.init_weight)
        assert torch.equal(parameter, alone.to(dtype)), fqn
        assert parameter.ndim == 1 or not torch.isclose(parameter, other[fqn]).all(), fqn


def test_the_random_numbers_of_a_seed_and_a_name_never_change() -> None:
    def normal(fqn: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(generator=generator)

    numbers = torch.cat([draw(fqn, [1], seed, normal) for seed in (0, 1) for fqn in ("a.w", "b.w")])
    torch.testing.assert_close(
        numbers, torch.tensor([0.8792, 1.0263, 0.2350, 1.5513]), rtol=0, atol=1e-4
    )


@every_model
def test_the_first_loss_is_that_of_guessing(name: str) -> None:
    """Logits with deviation 1 give about ln V + 1/2 nat; a wrong scale gives several nats more."""
    tokens = some_tokens(8, 65)
    logits = make(name)(tokens[:, :-1]).flatten(0, 1)
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
    assert abs(loss - torch.tensor(V).log() - 0.5) < 0.5


def test_initialize_keeps_tied_weights_frozen_weights_and_the_optimizers_parameters() -> None:
    with torch.device("meta"):
        model = GPT(V, **GPT_SHAPE, tied=True)
    model.model.norm.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    initialize(model, seed=0)
    embedding = model.model.embed_tokens.weight
    assert optimizer.param_groups[0]["params"][0] is embedding is model.lm_head.weight
    assert torch.equal(embedding, make("gpt", torch.float32).model.embed_tokens.weight)
    assert not model.model.norm.weight.requires_grad


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2))


def fill_weights_only(fqn: str, tensor: Tensor, generator: torch.Generator) -> None:
    if fqn.endswith("weight"):
        tensor.fill_(0.5)


def test_a_module_without_init_weight_needs_an_init_fn_and_real_buffers() -> None:
    model = Foreign()
    initialize(model, seed=0, init_fn=lambda fqn, tensor, generator: tensor.fill_(0.5))
    assert model.linear.bias.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="Foreign has no init_weight"):
        initialize(model, seed=0)
    with pytest.raises(ValueError, match=r"left values of linear\.bias unset"):
        initialize(model, seed=0, init_fn=fill_weights_only)
    with pytest.raises(ValueError, match=r"buffers on the meta device \(scale, 1 in all\)"):
        initialize(Foreign().to("meta"), seed=0, init_fn=fill_weights_only)
