"""Ranks by Slurm, MPI, `torchrun` and several launchers: their variables, and small runs by each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import UserError
from align.runs.launchers import adopt_ranks, first_node
from tests import ranks
from tests.worlds import save_tiny_policy, write_jsonl

SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-1@1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_KVSNAME": "kvs_9_0"}
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node03", "MASTER_PORT": "29500",
}  # fmt: skip
DEEPSPEED = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "4"}
ONE = {"RANK": "0", "WORLD_SIZE": "1"}
ADDRESS = {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"}


def adopted(**variables: str) -> tuple[str | None, ...]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    adopt_ranks(variables)
    return tuple(variables.get(name) for name in names)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        (SLURM, ("5", "8", "1", "node03")),
        (SLURM | ADDRESS, ("5", "8", "1", "node7")),
        (OPEN_MPI, ("1", "2", "1", "127.0.0.1")),
        (OPEN_MPI | ADDRESS, ("1", "2", "1", "node7")),
        (MPICH, ("1", "2", "1", "127.0.0.1")),
        (SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8"}, ("5", "8", "1", "node03")),  # srun --mpi=pmi2
        (TORCHRUN, ("5", "8", "1", "node03")),
        (DEEPSPEED, ("5", "8", "1", "node03")),
        # One launcher on each node by srun, and mpirun whose daemons srun started.
        (SLURM | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ("5", "8", "1", "node03")),
        (SLURM | OPEN_MPI | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "a"}, ("1", "4", "1", "a")),
        # Variables that the user passed on by hand.
        (SLURM | TORCHRUN, ("5", "8", "1", "node03")),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "a,b"}, ("1", "2", "1", "a")),
        # One process: a batch script of a job with eight tasks, a step of one task, mpirun -n 1, nothing.
        ({"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}, (None, None, None, None)),
        (SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (None, None, None, None)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, (None, None, None, None)),
        (ONE, ("0", "1", None, None)),
        ({}, (None, None, None, None)),
        # One visible GPU for each task.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, ("5", "8", "0", "node03")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "2,3"}, ("5", "8", "1", "node03")),
        (TORCHRUN | {"ROCR_VISIBLE_DEVICES": "0"}, ("5", "8", "0", "node03")),
    ],
)  # fmt: skip
def test_each_starter(variables, found):
    assert adopted(**variables) == found
    twice = dict(variables)
    adopt_ranks(twice)
    once = dict(twice)
    adopt_ranks(twice)
    assert twice == once


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (SLURM | {"SLURM_LOCALID": ""}, r"SLURM_LOCALID: Slurm started 8 processes, this one as number 5; set this to the rank on its node"),
        (SLURM | {"SLURM_LOCALID": "", "PMI_RANK": "5", "PMI_SIZE": "8"}, "SLURM_LOCALID: Slurm started 8 processes"),
        (SLURM | {"SLURM_STEP_NODELIST": "", "SLURM_NODELIST": ""}, "MASTER_ADDR: Slurm started 8 .*`srun --export=ALL,MASTER_ADDR=node1,"),
        (SLURM | {"SLURM_PROCID": "8"}, "SLURM_PROCID: expected less than SLURM_STEP_NUM_TASKS, which is 8, got 8"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID: expected a number in this environment variable, got 'x'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR: Open MPI started 2 processes, .* several nodes.*`mpirun -x"),
        ({"WORLD_SIZE": "2"}, "RANK: WORLD_SIZE is 2, and this is not set"),
        ({"RANK": "1"}, "WORLD_SIZE: RANK is 1, and this is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "MASTER_ADDR: RANK and WORLD_SIZE are set for 2 processes"),
        ({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}, "LOCAL_RANK: RANK and WORLD_SIZE"),
        # srun -n 8 torchrun --nproc_per_node 4, srun -n 8 deepspeed --num_gpus 2, srun -n 2 mpirun -n 2, mpirun -n 2 srun -n 8
        (SLURM | TORCHRUN | {"WORLD_SIZE": "4", "RANK": "1"}, "Slurm started 8 processes.*the launcher started 4 .*8 runs of the same"),
        (SLURM | DEEPSPEED | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_SIZE": "2"}, "start the stage itself by srun"),
        (SLURM | OPEN_MPI | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "Slurm started 2 processes.*Open MPI started 2"),
        (OPEN_MPI | SLURM, "Slurm started 8 .*Open MPI started 2"),
        (OPEN_MPI | TORCHRUN | {"WORLD_SIZE": "4", "RANK": "1"}, "Start the stage itself by mpirun"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(variables, message):
    with pytest.raises(UserError, match=f"(?i){message}"):
        adopt_ranks(dict(variables))


def test_ranks_of_a_job_have_one_port_and_jobs_differ():
    def port(**changes: str) -> int:
        variables = SLURM | changes
        adopt_ranks(variables)
        return int(variables["MASTER_PORT"])

    assert port() == port(SLURM_PROCID="2", SLURM_LOCALID="2")
    assert 20_000 <= port() < 30_000
    assert len({port(), port(SLURM_JOB_ID="78"), port(SLURM_STEP_ID="1")}) == 3


def test_ranks_without_a_job_have_one_port_whatever_started_them():
    tasks = {name: value for name, value in SLURM.items() if name not in ("SLURM_JOB_ID", "SLURM_STEP_ID")}
    code = "from align.runs.launchers import adopt_ranks; import os; adopt_ranks(); print(os.environ['MASTER_PORT'])"
    ports = set()
    for shell in ("", "true; "):  # the second is a child of a shell that stays
        done = subprocess.run(
            ["sh", "-c", f"{shell}{sys.executable} -c \"{code}\"; true"], env={**os.environ, **tasks, "PYTHONPATH": str(ranks.ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        ports.add(done.stdout)
    assert len(ports) == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("node[03-05,8],other", "node03"), ("n[7,9]", "n7"), ("r[1-2]n[01-04]-x", "r1n01-x"), ("a1,b[2-3]", "a1")],
)  # fmt: skip
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


def write_recipe(folder: Path) -> Path:
    """One step of SFT."""
    if not (folder / "base").exists():
        save_tiny_policy(folder / "base", layers=1)
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "x", "completion": "yz"}]
    (folder / "1_sft.yaml").write_text(
        json.dumps({
            "stage": "sft", "model_name_or_path": str(folder / "base"), "output_dir": "out", "eval_fraction": 0, "max_steps": 1,
            "train_dataset": write_jsonl(folder / "rows.jsonl", rows), "train_batch_size": 2, "per_device_train_batch_size": 1,
        })
    )  # fmt: skip
    return folder / "1_sft.yaml"


def stage(words: list[str], variables: dict[str, str] | None = None, folder: str | None = None) -> int | None:
    """A stage as a process that something else than tests/ranks.py started."""
    from align.runs.launch import run_stage_cli

    rank = os.environ.pop("RANK")
    for name in ranks.LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({name: value.format(rank=rank) for name, value in (variables or {}).items()})
    if folder is not None:
        os.chdir(folder.format(rank=rank))
    run_stage_cli("sft", words)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "{rank}", "SLURM_STEP_NODELIST": "127.0.0.1"},
        {"OMPI_COMM_WORLD_RANK": "{rank}", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    ],
    ids=["srun", "mpirun"],
)  # fmt: skip
def test_tasks_of_srun_and_mpirun_are_ranks_of_one_run(tmp_path, variables):
    port = {"MASTER_PORT": str(ranks.free_port())}
    done = ranks.run(stage, [str(write_recipe(tmp_path))], variables | port, log=tmp_path / "rank", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["data"]["train_rows"] == 2


def test_nodes_that_do_not_share_the_output_folder(tmp_path):
    recipe = write_recipe(tmp_path)
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    variables = {
        **OPEN_MPI,
        "OMPI_COMM_WORLD_RANK": "{rank}",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
        "MASTER_PORT": str(ranks.free_port()),
    }
    started = ranks.start(
        stage, [str(recipe)], variables, str(tmp_path / "node{rank}"), ranks=2, log=tmp_path / "rank", cwd=tmp_path
    )
    assert started.wait() == [2, 2], started.stderr[-2000:]
    errors = [line for line in started.stderr.splitlines() if "error: " in line]  # one for each host
    assert len(errors) == 1
    assert "output_dir: out on" in errors[0]
    assert "a file system that all nodes share" in errors[0]
    assert "Traceback" not in started.stderr


def test_a_command_that_starts_ranks_itself_is_started_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "align", "run", tmp_path],
        env={**os.environ, **SLURM},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: align run: was started as 8 ranks; start it once, or start a stage as ranks.\n"


@pytest.mark.slow
def test_torchrun_on_two_nodes(tmp_path):
    ranks.torchrun_on_two_nodes("align.sft", str(write_recipe(tmp_path)), cwd=tmp_path)
    assert (tmp_path / "out" / "stage.json").is_file()
