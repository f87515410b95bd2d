"""--optimizer muon and shampoo: which parameters are matrices, and the learning rates."""

import json

import pytest

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.optim import Muon
from dist_lab.programs.cli import setup
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.explain import settings
from dist_lab.programs.explain.command import explain
from dist_lab.programs.train import loop

AT_THE_ENDS = {
    "gpt": {"model.embed_tokens.weight", "lm_head.weight"},
    "mlp": {"embed.weight", "project.weight", "head.weight"},
    "vit": {"embed.project.weight", "embed.positions", "head.weight"},
    "resnet18": {"conv1.weight", "fc.weight"},
}


@pytest.mark.slow_unless(lambda model: model == "gpt")
@pytest.mark.parametrize("model", AT_THE_ENDS)
def test_all_matrices_but_those_at_the_ends_of_a_model_are_muons(model):
    data = "glyphs" if model in ("vit", "resnet18") else "stdlib"
    config = parse(["--model", model, "--optimizer", "muon", "--data", data])
    meta = setup.draw_model(config, setup.open_run(config, init_mesh()), "meta")
    groups = loop.matrix_groups(config)
    shapes = {name: p.shape for name, p in meta.named_parameters()}
    kinds = {name: groups(name, shape)["matrices"] for name, shape in shapes.items()}
    assert {n for n in kinds if kinds[n] == "adamw" and len(shapes[n]) > 1} == AT_THE_ENDS[model]
    assert set(kinds.values()) == {"adamw", "flat" if model == "resnet18" else "one"}


@pytest.mark.slow
def test_adamws_part_has_a_learning_rate_of_its_own_with_the_same_schedule():
    flags = "--optimizer muon --lr 0.01 --adamw-lr 0.004 --warmup 10 --batch 4 --seq 8"
    config = parse([*flags.split(), "--data", __file__])
    data = setup.open_run(config, init_mesh())
    job = setup.build(config, init_mesh(), data)
    optimizer = loop.make_optimizer(job, config)
    assert isinstance(optimizer, Muon)
    loop.take_step(job, optimizer, *data.batch(0, slice(0, 4)), 5, config)
    rates = {group["matrices"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"one": pytest.approx(0.005), "adamw": pytest.approx(0.002)}


def test_a_learning_rate_for_adamws_part_is_refused_where_there_is_none():
    message = r"optimizer sgd has no part for adamw .* \(--adamw-lr\); leave it out, or give --opt"
    with pytest.raises(UserError, match=message):
        parse("--optimizer sgd --adamw-lr 0.1".split())


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda optimizer, mesh: (optimizer == "muon") == ("pp" in mesh))
@pytest.mark.parametrize("optimizer", ["muon", "shampoo"])
@pytest.mark.parametrize("mesh", ["dp=4", "fsdp=2,tp=2", "pp=2,fsdp=2"])
def test_explain_shows_the_bytes_and_the_memory_of_matrices(optimizer, mesh, tmp_path, capsys):
    flags = ["--optimizer", optimizer, "--mesh", mesh, "--seq", "16", "--out", str(tmp_path)]
    assert explain(settings.read(flags, None), init_mesh()) == 0
    found = json.loads((tmp_path / "explain.json").read_text())
    state = found["memory"]["kinds"]["optimizer"]
    assert state["own_peak"] == state["by_layout"] > 0
    calls = [c for c in found["calls"] if c["phase"] == "optimizer" and c["step"] == 2]
    assert {c["for"] for c in calls if c["op"] == "all_to_all"} >= {"updates of matrices"}
    assert all(c["sent"] == c["due"] > 0 for c in calls)
