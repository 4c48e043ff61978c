"""After `update_weights`, an engine is bit for bit one that loaded the same weights from disk."""

from __future__ import annotations

import pytest

from integration.jobs import run_job
from integration.scenarios.sleep import SHAPE
from spmd_engine import LinkSpeeds
from spmd_engine.on_paper.plan import Cluster, plan_on_paper

ONE_VERSION = pytest.mark.one_version
# name, TP, world; tokens are not compared where SGLang's plain CPU attention cannot run the model (MLA).
LAYOUTS = [
    ("qwen2", 2, 2),
    ("qwen3_moe", 2, 2),
    *(pytest.param(*at, marks=ONE_VERSION) for at in (("llama", 2, 2), ("qwen2", 1, 2))),
]
OTHERS = [
    *(pytest.param(name, marks=ONE_VERSION) for name in ("mixtral", "gemma", "phi3")),
    "deepseek_v2",
]


def check(tmp_path, checkpoint, reference, name, tp, world, **how):
    generates = name != "deepseek_v2"
    expected = reference(name, tp, generates)
    job = run_job(
        "weights.update",
        world,
        tmp_path,
        name=name,
        path=checkpoint(name, 1),
        tp=tp,
        generates=generates,
        **how,
    )
    for value in job.values:
        wanted = expected[value["tp_rank"]]
        assert value["checksums"] == wanted["checksums"]
        assert value["tokens"] == wanted["tokens"]
    return job.values


@pytest.mark.parametrize(("name", "tp", "world"), LAYOUTS)
def test_bit_for_bit_what_sglang_loads(tmp_path, checkpoint, reference, name, tp, world):
    values = check(tmp_path, checkpoint, reference, name, tp, world)
    assert all(value["fallback"] == [] for value in values)


@ONE_VERSION
def test_replicas_of_ranks_that_are_no_neighbours(tmp_path, checkpoint, reference):
    values = check(tmp_path, checkpoint, reference, "qwen2", 2, 4, strided=True)
    assert [value["tp_rank"] for value in values] == [0, 0, 1, 1]


@ONE_VERSION
def test_code_for_the_former_verl_engine(tmp_path, checkpoint, reference):
    values = run_job("former.job", 2, tmp_path, name="qwen2", path=checkpoint("qwen2", 1)).values
    assert values == reference("qwen2", 2, True)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path, checkpoint, reference, name):
    values = check(tmp_path, checkpoint, reference, name, 2, 2)
    # Gemma's loader adds one to every norm: those weights take the model's own loader, and no others do.
    norms = [name for name in values[0]["fallback"] if "norm" in name]
    assert values[0]["fallback"] == norms and bool(norms) == (name == "gemma")
    if name == "deepseek_v2":
        assert plan_on_paper(checkpoint(name, 1), Cluster(fsdp=2, tp=2)).to_dict() == values[0]["report"]


def test_expert_parallelism_reads_no_expert_of_another_rank(tmp_path, checkpoint):
    # Weights only: SGLang's experts on the plain CPU cannot run with expert parallelism.
    path, other = checkpoint("qwen3_moe", 1), checkpoint("qwen3_moe", 2)
    values = run_job("weights.expert_parallel", 2, tmp_path, path=path, other=other).values
    assert plan_on_paper(path, Cluster(fsdp=2, tp=2, ep=2)).to_dict() == values[0]


@pytest.mark.one_version
def test_a_report_says_what_an_update_moves(tmp_path, checkpoint):
    values = run_job("weights.explain", 4, tmp_path, path=checkpoint("gemma", 1)).values
    assert all(value == values[0] for value in values)
    assert values[0]["floor_s"] == values[0]["floors_s"]["nvlink"] and len(values[0]["matrix"]) == 4
    assert set(values[0]["fallback"].values()) == {"its loader applies add_ in place"}
    speeds = LinkSpeeds(nvlink=1e6)
    assert plan_on_paper(checkpoint("gemma", 1), Cluster(fsdp=4, tp=2), speeds=speeds).to_dict() == values[0]


@pytest.mark.one_version
def test_a_plain_module_moves_no_byte_between_ranks(tmp_path, checkpoint, reference):
    values = check(tmp_path, checkpoint, reference, "qwen2", 2, 2, replicate=True)
    assert all(value["remote"] == 0 for value in values)


@pytest.mark.one_version
def test_optimizer_steps_do_not_race_updates(tmp_path, checkpoint):
    run_job("weights.racing_steps", 2, tmp_path, path=checkpoint("llama", 1, **SHAPE), shape=SHAPE)


def test_sources_that_are_taken_and_refused(tmp_path, checkpoint):
    run_job("weights.update_sources", 2, tmp_path, path=checkpoint("qwen2", 1), other=checkpoint("qwen2", 2))
