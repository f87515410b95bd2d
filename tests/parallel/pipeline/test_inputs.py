"""Inputs of a pipeline that are no single tensor: dicts, tuples, and what cannot be an input."""

import pytest
import torch
from torch import nn

import dist_lab
from dist_lab.errors import UserError


class TakesApart(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)

    def forward(self, given):
        x, mask = (given["x"], given["mask"]) if isinstance(given, dict) else given
        return self.embed(x) * mask


def in_turn():
    return nn.Sequential(TakesApart(), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, given):
        x = torch.tanh(self.a(given["x"]) * given["mask"])
        return self.c(torch.tanh(self.b(x)))


class OfTuple(OfDict):
    def forward(self, given):
        return super().forward({"x": given[0], "mask": given[1]})


class Skip(nn.Module):
    """As Wav2Vec2 does with the wave that it is given: fails if what was given has a gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        x = x[:, :6]
        if self.training:
            x.requires_grad = True
        return self.linear(x)


class InputsToTheEnd(OfDict):
    """The input skips a stage, and is read again by the last."""

    def __init__(self):
        super().__init__()
        self.skip = Skip()

    def forward(self, given):
        return super().forward(given) + self.skip(given["x"])


def built(make):
    torch.manual_seed(0)
    return make().double()


def microbatches(kind):
    torch.manual_seed(1)
    pairs = []
    for _ in range(4):
        x, mask = torch.randn(3, 6).double(), torch.rand(3, 1).double()
        given = {"x": x, "mask": mask} if kind == "dict" else (x, mask)
        pairs.append((given, torch.randint(4, (3,))))
    return pairs


def loss(output, target):
    return dist_lab.cross_entropy_sum(output, target) / 12


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (in_turn, "dict"), (in_turn, "tuple"), (OfDict, "dict"), (OfTuple, "tuple"),
        (InputsToTheEnd, "dict"),
    ],
)  # fmt: skip
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_dicts_and_tuples_are_inputs_as_in_one_process(make, kind, schedule, mesh):
    pairs, plain = microbatches(kind), built(make)
    options = {} if make is in_turn else {"example_inputs": pairs[0][0]}
    job = dist_lab.parallelize(built(make), mesh, "pp", schedule=schedule, **options)
    wanted = sum(loss(plain(x), y) for x, y in pairs)
    wanted.backward()
    assert job.run(pairs, loss) == pytest.approx(float(wanted.detach()), rel=1e-12)
    job.finish()
    for name, gradient in job.full_gradients().items():
        its = plain.get_parameter(name).grad
        torch.testing.assert_close(gradient, its, rtol=1e-10, atol=1e-12, msg=name)
    assert job.evaluate(pairs, loss) == pytest.approx(float(wanted.detach()), rel=1e-12)


@pytest.mark.parametrize("given", [{"x": torch.ones(3, 6)}, (torch.ones(3, 6),), None, "text"])
@pytest.mark.ranks(2, mesh={"pp": 2})
def test_an_input_that_the_first_module_cannot_read_is_refused_in_a_line(given, mesh):
    job = dist_lab.parallelize(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), mesh, "pp")
    said = rf"the input is a {type(given).__name__}, which the first module of stage 0 is given"
    for run in (job.run, job.evaluate):
        with pytest.raises(UserError, match=said) as refusal:
            run([(given, torch.zeros(3).long())] * 2, loss)
        assert "\n" not in str(refusal.value)


@pytest.mark.ranks(2, mesh={"pp": 2})
def test_the_twin_refuses_inputs_that_it_cannot_put_together(mesh):
    job = dist_lab.parallelize(built(in_turn), mesh, "pp", "torch")
    with pytest.raises(UserError, match=r"a dict is not put together; .* impl=\"hand\""):
        job.run(microbatches("dict"), loss)
