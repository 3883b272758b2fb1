"""Which rank a process is, from the variables of what started it: `deepspeed`, `torchrun`, `srun` or `mpirun`.

Everything after the start reads the variables that `deepspeed` and `torchrun` set: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. `adopt_ranks` sets them under the others.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from align.errors import UserError

# Innermost first, with the variables of rank, number of ranks, rank on this node and number of ranks on this node.
STARTERS = {
    "the launcher": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # LOCAL_SIZE by `deepspeed`
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip
JOB = {  # variables that name a job
    "Open MPI": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    "MPI": ("PMI_KVSNAME",),
    "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
}
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
FIRST_PORT, PORTS = 20_000, 10_000  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True, slots=True)
class LaunchedProcess:
    """One of the processes that a launcher or scheduler started together."""

    starter: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None


def adopt_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of `torch.distributed` where Slurm or MPI started several ranks and no launcher of PyTorch's did.

    Raises:
        UserError: variables are missing or no numbers, or two starters disagree, as when `srun` starts launchers that
            know nothing of one another.
    """
    places = [place for name in STARTERS if (place := _place(name, environment)) is not None]
    if not places:
        return
    place = places[0]
    for outer in places[1:]:
        _check_nested(place, outer)
    if place.starter != "the launcher":
        local = next((each.local_rank for each in places if each.local_rank is not None), None)
        # Under Slurm, tasks may have the variables of its own PMI too.
        known = next(each for each in reversed(places) if (each.rank, each.size) == (place.rank, place.size))
        if local is None:
            raise UserError(f"{STARTERS[known.starter][2]}: {_describe(known)}; set this to the rank on its node.")
        environment.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(local))
        if place.local_size is not None:
            environment["LOCAL_WORLD_SIZE"] = str(place.local_size)
        _set_master(known, environment)
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(
            f"{missing[0]}: RANK and WORLD_SIZE are set for {place.size} processes, and this is not; start the ranks by "
            "`deepspeed` or `torchrun`, or unset RANK and WORLD_SIZE."
        )
    if any(environment.get(name) and "," not in environment[name] for name in VISIBLE):
        environment["LOCAL_RANK"] = "0"  # the index of the only GPU that this rank sees


def _place(starter: str, environment: MutableMapping[str, str]) -> LaunchedProcess | None:
    """The rank that a starter has set for this process; None if it started only one process."""
    names = STARTERS[starter]
    # A batch script is one process, though it has SLURM_PROCID and SLURM_NTASKS of its job; a step has both kinds.
    if starter == "Slurm" and names[1] not in environment and environment.get("ENVIRONMENT") != "BATCH":
        names = (names[0], "SLURM_NTASKS", *names[2:])
    rank, size, local_rank = (_number(name, environment) for name in names[:3])
    if size is None and rank and starter == "the launcher":
        raise UserError(
            f"{names[1]}: {names[0]} is {rank}, and this is not set; set both, or neither to run one process."
        )
    if size is None or (size == 1 and not rank):
        return None
    if rank is None:
        raise UserError(
            f"{names[0]}: {names[1]} is {size}, and this is not set; set both, or neither to run one process."
        )
    if rank >= size:
        raise UserError(f"{names[0]}: expected less than {names[1]}, which is {size}, got {rank}.")
    tasks = environment.get(names[3]) or environment.get("LOCAL_SIZE" if starter == "the launcher" else "", "")
    return LaunchedProcess(starter, rank, size, local_rank, int(tasks) if tasks.isdecimal() else None)


def _number(name: str, environment: MutableMapping[str, str]) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}: expected a number in this environment variable, got {text!r}.")
    return int(text)


def _check_nested(inner: LaunchedProcess, outer: LaunchedProcess) -> None:
    """Check that the ranks of `inner` are those of `outer`, or that `outer` started its part of them on each node."""
    same = (inner.rank, inner.size) == (outer.rank, outer.size)
    if not same and inner.size != outer.size * (inner.local_size or inner.size):
        raise UserError(
            f"{_describe(outer)}, but {_describe(inner)}: these would be {outer.size} runs of the same recipe. Start the "
            f"stage itself by {'srun' if outer.starter == 'Slurm' else 'mpirun'}, or one launcher on each node that counts the ranks of all."
        )


def _describe(place: LaunchedProcess) -> str:
    return f"{place.starter} started {place.size} processes, this one as number {place.rank}"


def _set_master(place: LaunchedProcess, environment: MutableMapping[str, str]) -> None:
    """Set where rank 0 listens, unless the user did; the same on every rank, without any communication."""
    if not environment.get("MASTER_ADDR"):
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
        if place.starter == "Slurm" and nodes:
            environment["MASTER_ADDR"] = first_node(nodes)
        elif place.local_size == place.size:
            environment["MASTER_ADDR"] = "127.0.0.1"
        else:
            command = "mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500"
            if place.starter == "Slurm":
                command = "srun --export=ALL,MASTER_ADDR=node1,MASTER_PORT=29500"
            raise UserError(
                f"MASTER_ADDR: {_describe(place)}, maybe on several nodes; set MASTER_ADDR to the node of rank 0 and MASTER_PORT to "
                f"a free port there for all of them, as in `{command}`."
            )
    if not environment.get("MASTER_PORT"):
        # Two jobs on one node differ in it, and the ranks of one do not: those of one node have one parent under MPI.
        job = [environment[name] for name in JOB[place.starter] if name in environment]
        if not job and place.starter != "Slurm" and place.local_size == place.size:
            job = [str(os.getppid())]
        environment["MASTER_PORT"] = str(FIRST_PORT + zlib.crc32(" ".join(job).encode()) % PORTS)


def first_node(nodes: str) -> str:
    """The first name in a list of Slurm's, as `node[03-05,8],other`."""
    name = re.match(r"[^,\[]*", nodes)[0]  # type: ignore[index]  # it matches the empty text
    rest = nodes[len(name) :]
    if not rest.startswith("["):
        return name
    inside, _, after = rest[1:].partition("]")
    return first_node(name + re.split("[-,]", inside)[0] + after)
