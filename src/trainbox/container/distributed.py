"""What the processes of a run say to one another. In a run of one process all of this does nothing, at no cost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from trainbox.container.report import mute
from trainbox.errors import TrainingError
from trainbox.spec.checkpoint import SEAL, fault_of, hash_folder

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long processes wait for the one that prepares data, evaluates or saves; one that is gone is noticed at once."""
STUCK = timedelta(hours=1)
"""After this a GPU's collective operation counts as one that never ends."""
CHUNK = 2**24
"""Bytes of a file that are sent at a time."""
LOST = (
    "DistBackendError", "DistNetworkError", "DistStoreError", "gloo/", "Gloo ", "NCCL", "Connection closed by peer",
    "Connection reset by peer", "Broken pipe", "Connection refused",
)  # fmt: skip
"""How torch says that another process is gone."""

_group: Any = None
"""A group on the CPU: a GPU would have to finish what it is at before it could say anything."""


def join() -> None:
    """Meet the other processes that the launcher started, and leave the talking to the first."""
    global _group
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        from accelerate.utils import check_cuda_p2p_ib_support

        torch.cuda.set_device(local_rank())
        if not check_cuda_p2p_ib_support():  # consumer cards: NCCL would try what they cannot do
            os.environ.setdefault("NCCL_P2P_DISABLE", "1")
            os.environ.setdefault("NCCL_IB_DISABLE", "1")
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo", timeout=STUCK)
    _group = dist.new_group(backend="gloo", timeout=PATIENCE)
    if rank():
        mute()


def size() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if _group is not None else 1


def rank() -> int:
    """This one's number; the first speaks, saves and evaluates what one is enough for."""
    return int(os.environ["RANK"]) if _group is not None else 0


def local_rank() -> int:
    """This one's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that speaks and saves."""
    return rank() == 0


def barrier() -> None:
    """Wait until all are here."""
    if _group is not None:
        import torch.distributed as dist

        dist.barrier(group=_group)


def any_of(flag: bool) -> bool:
    """Whether it is so in any process."""
    if _group is None:
        return flag
    return total([float(flag)])[0] > 0


def total(values: list[float]) -> list[float]:
    """The sums over all processes, in float64."""
    if _group is None:
        return values
    import torch
    import torch.distributed as dist

    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed, group=_group)
    return summed.tolist()  # type: ignore[no-any-return]


def gathered(value: T) -> list[T]:
    """What each process has, by rank; all get all."""
    if _group is None:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value, group=_group)
    return found


def shared(value: T) -> T:
    """What the first process has."""
    if _group is None:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, group=_group)
    return values[0]


def once_per_node(work: Callable[[], T]) -> T:
    """Let the first process of each node do it; the others do it after, and find it done."""
    if _group is not None and local_rank():
        barrier()
    result = work()
    if _group is not None and not local_rank():
        barrier()
    return result


def by_first(work: Callable[[], T]) -> T | None:
    """Let the first process do it while the others wait."""
    result = work() if is_first() else None
    barrier()
    return result


def is_lost_peer(error: BaseException) -> bool:
    """Whether this says no more than that another process is gone."""
    chain: list[BaseException] = []
    here: BaseException | None = error
    while here is not None and here not in chain:  # an error may be its own cause
        if any(sign in f"{type(here).__name__}: {here}" for sign in LOST):
            return True
        chain.append(here)
        here = here.__cause__ or here.__context__
    return False


# A checkpoint, to nodes that share no disk with the first


def received(source: Path | None, output: Path) -> Path | None:
    """The first process's checkpoint as this node has it, in `output`; nodes that lack it get it sent, checksummed."""
    name = shared(source.name if source else None)
    if name is None or _group is None:
        return source
    here = output / name
    seal = shared((source / SEAL).read_bytes() if source else b"")
    lacks = source is None and not local_rank() and not _is_same(here, seal)
    if any_of(lacks):
        _send(source, here.with_name(f".{name}.tmp") if lacks else None)
        if lacks:
            _settle(here.with_name(f".{name}.tmp"), here, seal)
    barrier()
    return source or here


def _is_same(folder: Path, seal: bytes) -> bool:
    return (folder / SEAL).exists() and (folder / SEAL).read_bytes() == seal and not fault_of(folder)


def _settle(staged: Path, final: Path, seal: bytes) -> None:
    (staged / SEAL).write_bytes(seal)
    if fault := fault_of(staged):
        raise TrainingError(f"the copy of {final.name} {fault}", place=str(final.parent), remedy="start again")
    shutil.rmtree(final, ignore_errors=True)
    staged.rename(final)


def _send(source: Path | None, target: Path | None) -> None:
    """Every file, in chunks, to every process; those that need none of it let it pass."""
    import torch
    import torch.distributed as dist

    names = sorted(hash_folder(source)) if source and is_first() else []
    sizes = shared([(name, (source / name).stat().st_size) for name in names] if source else [])
    if target:
        shutil.rmtree(target, ignore_errors=True)
    for name, length in sizes:
        chunks = _chunks(source / name) if source and is_first() else iter([])
        file = None
        if target:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            file = (target / name).open("wb")
        for start in range(0, length, CHUNK):
            data = next(chunks, bytearray(min(CHUNK, length - start)))
            tensor = torch.frombuffer(data, dtype=torch.uint8)
            dist.broadcast(tensor, src=0, group=_group)
            if file:
                file.write(tensor.numpy().tobytes())
        if file:
            file.close()


def _chunks(path: Path) -> Iterator[bytearray]:
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield bytearray(data)
