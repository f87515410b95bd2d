"""Inputs of a pipeline that are not one tensor: dicts, tuples, and inputs that are refused."""

import pytest
import torch
from torch import nn

import dist_lab
from dist_lab.errors import UserError


class Unpacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)

    def forward(self, inputs):
        x, mask = (inputs["x"], inputs["mask"]) if isinstance(inputs, dict) else inputs
        return self.embed(x) * mask


def sequential():
    return nn.Sequential(Unpacks(), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, inputs):
        x = torch.tanh(self.a(inputs["x"]) * inputs["mask"])
        return self.c(torch.tanh(self.b(x)))


class OfTuple(OfDict):
    def forward(self, inputs):
        return super().forward({"x": inputs[0], "mask": inputs[1]})


class Skip(nn.Module):
    """Sets requires_grad on its input, as Wav2Vec2 does; fails if it already has a gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        x = x[:, :6]
        if self.training:
            x.requires_grad = True
        return self.linear(x)


class InputsToTheEnd(OfDict):
    """The last stage reads the model's input again."""

    def __init__(self):
        super().__init__()
        self.skip = Skip()

    def forward(self, inputs):
        return super().forward(inputs) + self.skip(inputs["x"])


def built(make):
    torch.manual_seed(0)
    return make().double()


def microbatches(kind):
    torch.manual_seed(1)
    pairs = []
    for _ in range(4):
        x, mask = torch.randn(3, 6).double(), torch.rand(3, 1).double()
        inputs = {"x": x, "mask": mask} if kind == "dict" else (x, mask)
        pairs.append((inputs, torch.randint(4, (3,))))
    return pairs


def loss(output, target):
    return dist_lab.cross_entropy_sum(output, target) / 12


@pytest.mark.slow_unless(
    lambda make, schedule: schedule == "zb" or (make is InputsToTheEnd and schedule == "1f1b")
)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (sequential, "dict"), (sequential, "tuple"), (OfDict, "dict"), (OfTuple, "tuple"),
        (InputsToTheEnd, "dict"),
    ],
)  # fmt: skip
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_dicts_and_tuples_as_inputs_equal_one_process(make, kind, schedule, mesh):
    pairs, plain = microbatches(kind), built(make)
    options = {} if make is sequential else {"example_inputs": pairs[0][0]}
    job = dist_lab.parallelize(built(make), mesh, "pp", schedule=schedule, **options)
    expected = sum(loss(plain(x), y) for x, y in pairs)
    expected.backward()
    assert job.run(pairs, loss) == pytest.approx(float(expected.detach()), rel=1e-12)
    job.finish()
    for name, gradient in job.full_gradients().items():
        expected_grad = plain.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected_grad, rtol=1e-10, atol=1e-12, msg=name)
    assert job.evaluate(pairs, loss) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("inputs", [{"x": torch.ones(3, 6)}, (torch.ones(3, 6),), None, "text"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_an_input_that_the_first_module_cannot_read_is_refused_in_a_line(inputs, mesh):
    job = dist_lab.parallelize(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), mesh, "pp")
    message = rf"the first module of stage 0 cannot take a {type(inputs).__name__} as input"
    for run in (job.run, job.evaluate):
        with pytest.raises(UserError, match=message) as refusal:
            run([(inputs, torch.zeros(3).long())] * 2, loss)
        assert "\n" not in str(refusal.value)


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_pytorchs_pipelining_refuses_inputs_that_cannot_be_concatenated(mesh):
    job = dist_lab.parallelize(built(sequential), mesh, "pp", "torch")
    with pytest.raises(UserError, match=r"which a dict does not allow; .* impl=\"hand\""):
        job.run(microbatches("dict"), loss)
