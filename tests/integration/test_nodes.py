"""Two nodes: TP across them, and weights from shards on the other one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import documentation
import models
import pytest

from integration.jobs import environment, run_job
from integration.nodes import Node
from integration.ray_cluster import ray_cluster
from spmd_engine.trainer.environment import with_this_package

# SGLang on the plain CPU cannot load KV heads that are fewer than the TP ranks.
HEADS = {"num_key_value_heads": 4}
# From a cut cable to the error of every rank: 10 s until the kernel gives up, and some for the search for a cause.
NOTICED_S = 25.0
FULL_PRODUCT = pytest.mark.skipif(
    not os.environ.get("ALL_LAUNCHERS"), reason="ALL_LAUNCHERS=1 runs torchrun and Ray over IPv4 and IPv6 each"
)


def check_update(values, expected, tp):
    """All ranks have the weights of `expected`, and each node got what it needs of the other one's shards once."""
    for rank, value in enumerate(values):
        assert {name: value[name] for name in ("checksums", "tokens")} == expected[rank % tp]
    # At TP 2 that is half of the model; at TP 4 a quarter of what is cut along its rows, as all else lies where it is
    # needed.
    model = values[0]["model_bytes"]
    wanted = 0.5 * model if tp == 2 else values[0]["row_parallel_bytes"] / 4
    for number, node in enumerate((values[:2], values[2:])):
        arrived = sum(value["network_bytes"] for value in node)
        assert wanted <= values[0]["explained"][number] <= arrived  # buckets are padded
        assert wanted <= arrived < wanted + 0.01 * model
        assert arrived <= sum(value["staged_bytes"] for value in node) + 0.01 * model


@pytest.mark.one_version
def test_weights_from_the_other_node(tmp_path, checkpoint, reference, nodes):
    expected = reference("qwen2", 2, True, **HEADS)
    path = checkpoint("qwen2", 1, **HEADS)
    check_update(run_job("nodes.update", 4, tmp_path, path=path, tp=2, config=HEADS, nodes=nodes).values, expected, 2)


@pytest.mark.one_version
def test_a_trainer_over_two_nodes(tmp_path, checkpoint, nodes):
    run_job("nodes.sources", 4, tmp_path, path=checkpoint("qwen2", 1), nodes=nodes)


MY_TRAINER = """
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

batches = [["the quick brown", "fox"], ["jumps over"]]

def build_model(path):
    return fully_shard(AutoModelForCausalLM.from_pretrained(path))

def train(model, outputs):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return len(outputs)
"""


def write_recipe(directory, launcher, changes):
    """A recipe's program as `train.py`, with what it leaves to the reader."""
    models.save_tokenizer(directory)
    models.save_model("qwen2", directory, seed=1, **HEADS)
    (program,) = documentation.recipe(launcher, "python")
    (directory / "train.py").write_text(documentation.replaced(program, {"Qwen/Qwen2-7B": str(directory), **changes}))
    (directory / "my_trainer.py").write_text(MY_TRAINER)


@pytest.mark.one_version
def test_the_torchrun_recipe(tmp_path, nodes):
    set_device = 'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))'
    write_recipe(tmp_path, "torchrun", {'", 4': '", 2', set_device: "", "cpu:gloo,cuda:nccl": "gloo"})
    commands = next(text for text in documentation.recipe("torchrun", "bash") if "--nnodes" in text).splitlines()
    own = {"10.0.0.1": nodes[0].ipv4, "--nproc_per_node 8": "--nproc_per_node 1"}
    processes = []
    for node, command in zip(nodes, commands, strict=True):
        words = shlex.split(documentation.replaced(command, own))
        env = with_this_package({**environment(tmp_path), **node.environment(nodes[0], ipv6=False)})
        launch = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        processes.append(
            subprocess.Popen(launch, cwd=tmp_path, env=env, preexec_fn=node.enter, stdout=subprocess.PIPE, text=True)
        )
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for node in nodes:
            node.end_all()
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = re.findall(r"loss (\d), weights of version (\d) in", outputs[0])
    assert found == [("2", "1"), ("1", "2")], outputs


class CutOff:
    """Cuts a node off as soon as all ranks work, until the block is left.

    Attributes:
        at: when that was, in seconds since the epoch.
    """

    def __init__(self, directory: Path, node: Node) -> None:
        self._ready = [directory / f"ready{rank}" for rank in range(4)]
        self._results = [directory / f"rank{rank}.json" for rank in range(4)]
        self._node, self._over = node, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.at = 0.0

    def _watch(self) -> None:
        while not all(path.exists() for path in self._ready):
            if self._over.wait(0.05):
                return
        self._node.cut_off()
        self.at = time.time()

    def is_known_to_all(self) -> bool:
        """Whether every rank has left what it got."""
        return all(path.exists() for path in self._results)

    def check(self) -> list[Any]:
        """Every rank has the cause, within seconds. Returns what else the ranks left."""
        values = [json.loads(path.read_text()) for path in self._results]
        failures = [value["failure"] for value in values]
        for rank, failure in enumerate(failures):
            assert failure["rank"] in ((2, 3) if rank < 2 else (0,)), failures  # each half misses the other one
            assert "cannot be reached any more" in failure["message"], failures
            assert 0 < failure["at"] - self.at < NOTICED_S, (self.at, failures)
            print(f"rank {rank} knew {failure['at'] - self.at:.1f} s after the cut")
        return values

    def __enter__(self) -> CutOff:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._node.configure()


@pytest.mark.one_version
@pytest.mark.parametrize("ipv6", [pytest.param(True, marks=FULL_PRODUCT), False])
def test_torchrun_over_two_nodes_and_one_is_cut_off(tmp_path, checkpoint, reference, nodes, ipv6):
    expected = reference("qwen2", 4, True, **HEADS)
    path = checkpoint("qwen2", 1, **HEADS)
    with CutOff(tmp_path, nodes[1]) as cut:
        run_job(
            "nodes.update_and_cut_off", 4, tmp_path, path=path, config=HEADS, nodes=nodes, torchrun=True, ipv6=ipv6,
            until=cut.is_known_to_all,
        )  # fmt: skip
    check_update(cut.check(), expected, 4)


@pytest.mark.one_version
@pytest.mark.parametrize("ipv6", [True, pytest.param(False, marks=FULL_PRODUCT)])
def test_doctor_tries_the_way_to_another_node(nodes, ipv6):
    host = nodes[0].ipv6 if ipv6 else nodes[0].ipv4
    target = f"[{host}]:29500" if ipv6 else f"{host}:29500"

    def ask(node):
        doctor = [sys.executable, "-m", "spmd_engine.cli", "doctor", "--json"]
        options = ["--only=rendezvous", f"--rendezvous={target}"]
        env = with_this_package(os.environ)
        done = subprocess.run(
            [*doctor, *options], env=env, preexec_fn=node.enter, capture_output=True, text=True, timeout=60
        )
        return done.returncode, json.loads(done.stdout)["findings"][0]

    status, found = ask(nodes[1])
    assert status == 0 and "the host answers at port 29500" in found["found"], found
    status, found = ask(nodes[0])
    assert status == 0 and "this very node" in found["found"], found
    nodes[0].cut_off()
    try:
        status, found = ask(nodes[1])
    finally:
        nodes[0].configure()
    assert status == 1 and found["status"] == "failure" and found["fix"], found


@pytest.fixture(scope="module", params=[pytest.param("ipv4", marks=FULL_PRODUCT), "ipv6"])
def cluster(request, nodes):
    pytest.importorskip("ray", reason="the extra `test` has it")
    with ray_cluster(nodes, ipv6=request.param == "ipv6", cpus_per_node=2) as found:
        yield found


def drive(cluster, directory, scenario, timeout_s=400.0, **arguments):
    """Run a scenario on four ranks of the Ray cluster; what the driver has then."""
    directory.mkdir(exist_ok=True)
    return run_driver(cluster, directory, ["integration.ray_driver", scenario, json.dumps(arguments)], timeout_s)


def run_driver(cluster, directory, command, timeout_s):
    """Run the program of a driver on the first node; what it leaves."""
    done = cluster.run(["-m", *command, str(directory)], timeout_s=timeout_s, cwd=directory)
    assert done.returncode == 0, done.stdout
    return json.loads((directory / "driver.json").read_text())


@pytest.mark.one_version
def test_ranks_on_ray(cluster, tmp_path):
    values = run_driver(cluster, tmp_path, ["integration.ray_calls"], 200.0)["values"]
    hosts = [node.ipv6 if "[" in cluster.address else node.ipv4 for node in cluster.nodes]
    assert [value["total"] for value in values] == [10] * 4
    assert [value["node"] for value in values] == [hosts[0]] * 2 + [hosts[1]] * 2
    assert [value["environment"] for value in values] == [
        [str(rank), "4", str(rank % 2), "2", values[0]["node"]] for rank in range(4)
    ]


@pytest.mark.one_version
def test_the_ray_recipe(cluster, tmp_path):
    write_recipe(tmp_path, "ray", {"2, 4": "2, 1"})
    done = cluster.run(["train.py"], timeout_s=200.0, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[2, 2]", "[1, 1]"], done.stdout


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("how", "cause", "message"),
    [
        pytest.param("raise", "ZeroDivisionError", "reward of rank 3", marks=FULL_PRODUCT),
        pytest.param("unpicklable", "RuntimeError", "Odd: cannot travel", marks=FULL_PRODUCT),
        ("kill", "ActorDiedError", "rank 3 failed first"),
    ],
)
def test_the_driver_gets_the_first_cause(cluster, tmp_path, how, cause, message):
    found = drive(cluster, tmp_path, "ray.fail", rank=3, how=how)
    assert (found["kind"], found["rank"], found["cause"]) == ("RankFailedError", 3, cause), found
    assert message in found["message"].splitlines()[0]


@pytest.mark.one_version
def test_the_demo_on_ray(cluster, tmp_path):
    """TP 2 over two nodes; its random model does not get far in three steps, which the exit status says."""
    example = Path(__file__).parents[2] / "examples" / "grpo_ray.py"
    command = [str(example), "--nodes=2", "--ranks-per-node=1", "--steps=3", f"--out={tmp_path}"]
    done = cluster.run(command, timeout_s=300.0, cwd=tmp_path)
    assert done.stdout.count("|Δ logprob| ") == 3 and "reward rose from" in done.stdout, done.stdout
    differences = [float(line.split("|Δ logprob|")[1].split()[0]) for line in done.stdout.splitlines() if "|Δ" in line]
    assert max(differences) < 1e-5, done.stdout
    assert (tmp_path / "grpo.png").stat().st_size > 10_000


@pytest.mark.one_version
def test_ray_over_two_nodes_and_one_is_cut_off(cluster, tmp_path, checkpoint, reference):
    """The last test of a cluster, which it breaks."""
    expected = reference("qwen2", 4, True, **HEADS)
    path = checkpoint("qwen2", 1, **HEADS)
    with CutOff(tmp_path, cluster.nodes[1]) as cut:
        found = drive(cluster, tmp_path, "nodes.update_and_cut_off", path=path, config=HEADS, on_ray=True)
        assert (found["kind"], found["cause"]) == ("RankFailedError", "SchedulerDiedError"), found
        assert found["rank"] in (2, 3) and found["at"] - cut.at < NOTICED_S + 25.0, found
    check_update(cut.check(), expected, 4)
