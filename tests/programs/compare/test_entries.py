"""The words of --strategies: strategies, and meshes with the mix of strategies that they imply."""

import pytest

from dist_lab.errors import UserError
from dist_lab.programs.compare.entries import ListedStrategy, entries
from dist_lab.programs.compare.settings import read

ISSUE = "fsdp,fsdp2xtp2,pp2xfsdp2,zero1:pp2xdp2,pp2xfsdp2@torch"


def runs_of(arguments: str):
    settings = read([*arguments.split(), "--oversubscribe"])
    settings = settings.fitted(settings.nproc)
    return {entry.label: settings.of(entry) for entry in settings.entries()}


def test_a_word_is_a_strategy_or_a_mesh_with_its_strategies():
    assert entries(["fsdp", "zero1:pp2xdp2@torch", "dp2xfsdp2", "pp4@hand"]) == [
        ListedStrategy("fsdp", "fsdp", "hand"),
        ListedStrategy("zero1:pp2xdp2@torch", "zero1", "torch", {"pp": 2, "dp": 2}),
        ListedStrategy("dp2xfsdp2", "hsdp", "hand", {"dp": 2, "fsdp": 2}),
        ListedStrategy("pp4", "pp", "hand", {"pp": 4}),
    ]
    labels = [entry.label for entry in entries(["pp2xtp2", "tp4", "pp2xtp2", "pp2xtp2@torch"])]
    assert labels == ["pp2xtp2", "tp4", "pp2xtp2#2", "pp2xtp2@torch"]


def test_each_entry_runs_on_its_own_mesh_with_one_global_batch():
    runs = runs_of(f"--nproc 4 --strategies {ISSUE},ddp --microbatches 3")
    assert [run.mesh for run in runs.values()] == [
        None, {"fsdp": 2, "tp": 2}, {"pp": 2, "fsdp": 2}, {"pp": 2, "dp": 2},
        {"pp": 2, "fsdp": 2}, None,
    ]  # fmt: skip
    mixes = [run.strategies for run in runs.values()]
    assert mixes == [
        ("fsdp",), ("tp", "fsdp"), ("pp", "fsdp"), ("pp", "zero1"), ("pp", "fsdp"), ("ddp",)
    ]  # fmt: skip
    assert {run.batch for run in runs.values()} == {36}  # of 4 x 3 parts, 2 x 3 and 2 x 3
    assert [run.impl for run in runs.values()].count("torch") == 1


def test_mesh_is_for_the_entries_without_a_mesh_of_their_own():
    runs = runs_of("--nproc 4 --mesh dp=2,tp=2 --strategies ddp,zero1,pp2xfsdp2,single")
    meshes = [run.mesh for run in runs.values()]
    assert meshes == [{"dp": 2, "tp": 2}, {"dp": 2, "tp": 2}, {"pp": 2, "fsdp": 2}, None]
    assert runs["zero1"].strategies == ("tp", "zero1")


def test_the_model_gets_as_many_blocks_as_the_longest_pipeline_has_stages():
    options = "--nproc 8 --schedule interleaved --strategies fsdp,pp2xfsdp4,pp4xtp2"
    assert {run.layers for run in runs_of(options).values()} == {8}


def test_a_setting_goes_to_the_entries_that_have_it():
    options = "--sequence-parallel --schedule zb --keep-gathered --bucket-mb 2"
    runs = runs_of(f"--nproc 4 --strategies fsdp,tp2xfsdp2,pp2xtp2,zero1:pp2xdp2 {options}")
    given = {
        label: (run.sequence_parallel, run.schedule, run.keep_gathered, run.bucket_mb)
        for label, run in runs.items()
    }
    assert given == {
        "fsdp": (None, None, True, None),
        "tp2xfsdp2": (True, None, True, None),
        "pp2xtp2": (True, "zb", None, None),
        "zero1:pp2xdp2": (None, "zb", None, 2),
    }


def test_all_are_the_strategies_that_a_mesh_of_several_axes_allows():
    every = [entry.label for entry in read("--nproc 4 --mesh dp=2,tp=2".split()).entries()]
    assert every == ["single", "dp", "ddp", "zero1", "zero2"]  # no mix that torch cannot do
    every = [entry.label for entry in read("--nproc 4 --mesh pp=2,fsdp=2".split()).entries()]
    assert every == ["single", "fsdp", "fsdp@torch"]


def test_a_mix_that_an_implementation_lacks_is_listed_with_the_reason_and_the_others_run():
    settings = read(
        ["--nproc", "4", "--strategies", "ddp,zero1:dp2xtp2@torch,pp2xfsdp2@accelerate"]
    )
    reasons = {entry.label: settings.misfit(entry) for entry in settings.entries()}
    assert reasons["ddp"] == ""
    assert reasons["zero1:dp2xtp2@torch"].startswith("tp x zero1 by torch: its ZeroRedundancy")
    assert reasons["zero1:dp2xtp2@torch"].endswith("; leave out @torch")
    assert reasons["pp2xfsdp2@accelerate"].startswith("no strategy fsdp@accelerate; accelerate")
    assert settings.axes(4) == {"dp": 4}


AXES = "give pp, dp, fsdp or tp"
COLON = "a strategy is named before a colon: zero1:dp2xtp2"
ONCE = "give each axis once, with a size of 1 or more: pp2xfsdp2"
BAD_LISTS = [
    ("fsd2xtp2", "no mesh axis 'fsd' in 'fsd2xtp2' (--strategies); "
        f"{AXES} (did you mean fsdp?); {COLON}"),
    ("zero2xtp2", f"no mesh axis 'zero' in 'zero2xtp2' (--strategies); {AXES}; {COLON}"),
    ("zero3:pp2xdp2", "no strategy 'zero3' in 'zero3:pp2xdp2' (--strategies); give dp, ddp, zero1, "
        "zero2, fsdp or hsdp (did you mean zero2?)"),
    ("pp2xfsdp2@torhc", "no impl 'torhc' in 'pp2xfsdp2@torhc' (--strategies); give hand, torch or "
        "accelerate (did you mean torch?)"),
    ("fsdp=4", "no strategy 'fsdp=4' (--strategies); write a mesh without punctuation, such as "
        "pp2xfsdp2, or give it as --mesh"),
    ("fsdp2xtp", f"mesh cannot be 'fsdp2xtp' (--strategies); {ONCE}"),
    ("pp2xpp2", f"mesh cannot be 'pp2xpp2' (--strategies); {ONCE}"),
    ("pp0xfsdp2", f"mesh cannot be 'pp0xfsdp2' (--strategies); {ONCE}"),
    ("zero1:", f"mesh cannot be '' (--strategies); {ONCE}"),
    ("zero1:fsdp4", "the mesh is fsdp=4, but zero1 runs along dp ('zero1:fsdp4' in --strategies); "
        "give zero1:dp4 or fsdp:fsdp4"),
    ("pp:pp2xfsdp2", "the mesh is pp=2 x fsdp=2, and pp is not the strategy of its data axes; pp "
        "is implied ('pp:pp2xfsdp2' in --strategies); give fsdp:pp2xfsdp2"),
    ("fsdp,pp2xfsdp4", "pp2xfsdp4 has 8 ranks, 4 were started (--strategies); give a mesh of 4 "
        "ranks, or type torchrun --nproc_per_node=8 ... or --nproc 8"),
    ("fsdp4,pp2xfsdp4", "fsdp4 has 4 ranks and pp2xfsdp4 has 8 (--strategies); all run in the same "
        "ranks: give meshes of one number of ranks"),
    ("pp2xtp2@accelerate", "none of the strategies can run (--strategies); pp2xtp2@accelerate: "
        "strategy pp has no impl 'accelerate'; leave out @accelerate"),
]  # fmt: skip


@pytest.mark.parametrize(("listed", "line"), BAD_LISTS, ids=[listed for listed, _ in BAD_LISTS])
def test_a_wrong_word_is_refused_in_one_line(listed, line):
    with pytest.raises(UserError) as caught:
        read(["--nproc", "4", "--strategies", listed])
    assert str(caught.value) == line


def test_a_single_process_is_told_how_many_ranks_the_meshes_need():
    with pytest.raises(UserError, match="add --nproc 8, or start it with torchrun --nproc_per"):
        read(["--strategies", "fsdp,pp2xfsdp4"]).axes(1, plain=True)
