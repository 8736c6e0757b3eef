"""Starts the processes of a run on this node, through torch's own elastic launcher, and judges how they end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from trainbox.container.job import GRACE as GRACE_OF_SCRIPTS
from trainbox.container.job import bound_to_us
from trainbox.container.notices import is_echo
from trainbox.container.report import count_gpus, emit
from trainbox.errors import INTERRUPTED, KINDS, ConfigError, HardwareError, Interrupted, TrainboxError, TrainingError
from trainbox.spec.budget import Allowance
from trainbox.spec.checkpoint import SEAL, all_checkpoints
from trainbox.spec.distributed import World, check_strategy, fault_of, fitting, told
from trainbox.spec.recipe.custom import CustomRecipe
from trainbox.spec.recipe.sections import Recipe
from trainbox.spec.run import BOX_OUTPUT, OWN_FOLDER, RunSpec, box

PORT = 29500
"""Where the nodes meet, unless MASTER_PORT says otherwise."""
LOOK = 0.2
"""Seconds between two looks at the processes."""
GRACE = 5.0
"""Seconds that the others have to end by themselves once one is dead: there is nothing left for them to do."""
WORD = 20.0
"""Seconds that a node waits for the word of one that knows more."""
MEETING = 900
"""Seconds that the nodes wait for one another at the start."""
SILENCE = 60.0
"""Seconds without a sign of life after which a node counts as gone."""
BY_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a process that SIGTERM ended: at once, or by its own exit."""


# The world


def node() -> int:
    """This node's number."""
    return _number("NODE_RANK", 0)


def world_of(recipe: Recipe) -> World:
    """The processes that train a recipe here: by the environment, the recipe, and the GPUs that there are.

    Raises ConfigError where they do not go together, HardwareError where GPUs are lacking.
    """
    asked = recipe.distributed
    nodes = _number("NNODES", 1)
    if nodes == 1 and asked.nodes > 1:
        fault = f"the recipe is for {asked.nodes} nodes, and NNODES is not set"
        remedy = "each node needs NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, as `make launch` sets them"
        raise ConfigError(fault, place="distributed.nodes", remedy=remedy)
    if nodes > 1 and not os.environ.get("MASTER_ADDR"):
        raise ConfigError("is not set, and NNODES is more than 1", place="MASTER_ADDR", remedy="name node 0's address")
    if not 0 <= node() < nodes:
        raise ConfigError(f"{node()} is none of 0 to {nodes - 1}", place="NODE_RANK")
    world = World(nodes, _processes(recipe, nodes))
    if fault := fault_of(recipe, world.size):
        raise ConfigError(fault, place="distributed")
    check_strategy(recipe)
    return world


def _processes(recipe: Recipe, nodes: int) -> int:
    wanted, found = recipe.distributed.processes_per_node, count_gpus()
    if wanted is None:
        if isinstance(recipe, CustomRecipe):
            return 1
        number = fitting(recipe, max(found, 1), nodes)
        if number < found:
            emit("note", text=f"{number} of {found} GPUs are used: {fault_of(recipe, found * nodes)}")
        return number
    if found and wanted > found:
        fault = f"{wanted} processes want a GPU each, and there are {found}"
        raise HardwareError(fault, place="distributed.processes_per_node", remedy="lower it, or add GPUs: GPUS=")
    return wanted


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise ConfigError(f"{value!r} is not a number", place=name)
    return int(value)


def set_own_folder() -> None:
    """On all nodes but the first, turn what is written to a folder that no other node has."""
    if _number("NNODES", 1) > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of an end it would tell at length; read at its import
    if node():
        folder = box(BOX_OUTPUT) / f".node-{node()}"
        for path in folder.glob("*"):  # of an attempt before: the first node says what counts
            if path.name != "cache":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[OWN_FOLDER] = str(folder)


# The processes


@dataclass(frozen=True)
class Plan:
    """What a process is told."""

    spec: dict[str, Any]
    resume: str | None
    """Name of the checkpoint to go on from."""
    seconds: float | None
    """Those that are left of the budget."""
    limit: str
    most: float

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """What `run` wrote."""
        return cls(**json.loads((folder / "plan.json").read_text()))

    @property
    def allowed(self) -> Allowance:
        """What is left of the budget, from now on."""
        return Allowance(float("inf") if self.seconds is None else self.seconds, self.limit, self.most)


def run(world: World, spec: RunSpec, resume: Path | None, allowed: Allowance) -> dict[str, Any]:
    """Train in the processes of this node; what the first of them leaves for result.json.

    Raises the error of the process that failed first, on whichever node that was.
    """
    emit("note", text=told(spec.recipe, world))
    left = None if allowed.seconds_left == float("inf") else allowed.seconds_left
    plan = Plan(spec.model_dump(mode="json"), resume.name if resume else None, left, allowed.limit, allowed.most)
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps(asdict(plan)))
        keeper = Keeper(world, folder)
        argv = bound_to_us([sys.executable, "-m", "trainbox.container", "work", name])
        failed = _launch(world, argv, folder, keeper)
        keeper.finish(failed)
        if failed:
            raise keeper.first_error(failed)
        found: dict[str, Any] = json.loads((folder / "0.json").read_text())
        if error := found.pop("error", None):
            raise as_error(error)
        return found


def _launch(world: World, argv: list[str], folder: Path, keeper: Keeper) -> str:
    """Run them to their end by torch's agent; why it failed, empty where it did not."""
    # The keeper hands on the other signals.
    start = _elastic(world, argv, folder, signals_to_handle="SIGQUIT")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    keeper.begin()
    try:
        start()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        keeper.note(first.local_rank, {each.local_rank: each.exitcode for each in error.failures.values()})
        return str(first.message)
    except Exception as error:  # the nodes did not meet
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def _elastic(world: World, argv: list[str], folder: Path, **more: Any) -> Callable[[], Any]:
    """What runs a command in every process of this node by torch's agent."""
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))  # as the harness limits them
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // world.processes))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for library in ("GLOO", "NCCL")[: 2 if world.nodes > 1 else 1]:
        # On one node the box may have no other, and no name of its own; on several, the name may stand for 127.0.1.1.
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", _interface() if world.nodes > 1 else "lo")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.Logger.manager.loggerDict):  # what it says of an end is said here, in fewer words
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=world.nodes,
        max_nodes=world.nodes,
        nproc_per_node=world.processes,
        run_id="trainbox",
        rdzv_backend="static",
        rdzv_endpoint=_address() if world.nodes > 1 else _free_port(),
        rdzv_configs={"rank": node(), "timeout": MEETING},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "agent")),
        **more,
    )
    return lambda: elastic_launch(config, argv[0])(*argv[1:])


def _interface() -> str:
    """The network interface that leads to the first node."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], _number("MASTER_PORT", PORT)))  # sends nothing
        except OSError as error:
            fault = f"{os.environ['MASTER_ADDR']!r} cannot be reached: {error.strerror or error}"
            raise ConfigError(fault, place="MASTER_ADDR", remedy="name node 0's address") from None
        own = probe.getsockname()[0]
    known = psutil.net_if_addrs().items()
    return next(str(name) for name, addresses in known if any(each.address == own for each in addresses))


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT', PORT)}"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def spread(world: World, argv: list[str]) -> int:
    """Run a script in every process of this node, in the environment that torchrun gives; its exit code.

    A signal is handed on, and the script has its time to save.
    """
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(GRACE_OF_SCRIPTS))
        start = _elastic(world, bound_to_us(argv), Path(folder), signals_to_handle="SIGTERM,SIGINT")
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            start()
        except SignalException:
            return INTERRUPTED
        except ChildFailedError as error:
            code = int(error.get_first_failure()[1].exitcode)
            return code if code > 0 else 128 - code
    return 0


def as_error(told: dict[str, Any]) -> TrainboxError:
    """The error that a process, or another node, told."""
    return KINDS[told["kind"]](told["fault"], place=told["place"], remedy=told["remedy"])


class Keeper:
    """Watches over the processes of this node, and over the other nodes.

    Signals reach every process; a second one ends all at once. Where a process is dead, here or on another node, the
    others are given a few seconds: what they wait for will not come.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._asked_at: float | None = None
        self._signal = 0
        self._dead: dict[int, tuple[int, float]] = {}
        """Exit code (below 0: its signal) and time of those that ended badly, but for those killed here."""
        self._killed: set[int] = set()
        self._vanished: set[int] = set()
        """Those whose end torch's agent saw, and that said nothing themselves."""
        self._kill_at = float("inf")
        self.error: TrainboxError | None = None
        """What another node told."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._nodes: Nodes | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def begin(self) -> None:
        """Start to watch."""
        if self._world.nodes > 1:
            self._nodes = Nodes(_address(), self._world.nodes)
        self._thread.start()

    def note(self, first: int, codes: Mapping[int, int]) -> None:
        """How processes ended, by rank, as torch's agent saw it: some are gone too fast to be seen here.

        Once the `first` is gone, the agent ends the others by SIGTERM, which some answer by an exit code of their own.
        """
        for rank, code in codes.items():
            by_us = rank in self._killed - self._vanished and code == -signal.SIGKILL
            if rank != first and code in BY_SIGTERM:
                self._dead.pop(rank, None)
            elif not by_us:
                self._dead.setdefault(rank, (code, time.time()))

    def finish(self, failed: str) -> None:
        """The processes are over: tell the other nodes why, where they failed, and stop watching."""
        self._over.set()
        self._thread.join()
        if self._signal and any(code in BY_SIGTERM for code, _ in self._dead.values()):
            os._exit(128 + self._signal)  # they were not training yet: there is nothing to save
        if self._nodes and failed and not self.error:
            self.error = self._nodes.agree(self._own_error(), self._lost())

    def first_error(self, failed: str) -> TrainboxError:
        """Why the run failed: the first true error, of this node or another."""
        if self.error:
            return self.error
        if found := self._own_error():
            return as_error(found)
        if not self._dead:
            remedy = "is node 0 up, and its MASTER_ADDR and MASTER_PORT within reach of the others?"
            return TrainingError(f"the nodes did not meet: {failed}", place="distributed", remedy=remedy)
        if found := self._common_error():
            return as_error(found)
        others = [str(number) for number in range(self._world.nodes) if number != node()]
        who = f"node {' or '.join(others)}" if others else "another process"
        return _gone(who, saved=self._nodes.saved if self._nodes else _has_checkpoint())

    def _own_error(self) -> dict[str, Any] | None:
        """The first error of this node that is not about another process's end."""
        told = self._told()
        true = [(each["at"], each["error"]) for each in told.values() if "error" in each and not each["lost_peer"]]
        true += [(at, _death(rank, code)) for rank, (code, at) in self._dead.items() if code < 0 or rank not in told]
        return min(true, key=lambda each: each[0])[1] if true else None

    def _told(self) -> dict[int, dict[str, Any]]:
        """What each process of this node has left at its end, by its number."""
        return {int(path.stem): json.loads(path.read_text()) for path in self._folder.glob("[0-9]*.json")}

    def _lost(self) -> dict[str, Any] | None:
        """What a process says that could not talk to the others; None where one of this node is gone."""
        told = self._told()
        there = {*told, *(self._killed - self._vanished)}
        lost = [each for each in told.values() if each.get("lost_peer")]
        all_there = len(there) == self._world.processes
        return min(lost, key=lambda each: float(each["at"]))["error"] if lost and all_there else None

    def _common_error(self) -> dict[str, Any] | None:
        """What it was where processes cannot talk to one another and yet none is gone; None where one is."""
        everywhere = self._nodes.all_lost if self._nodes else True
        return self._lost() if everywhere else None

    # In a thread, while torch's agent has the main one

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            self._look()
            if self._nodes and not self.error:
                self.error = self._nodes.look()
                self._kill_at = min(self._kill_at, time.monotonic() + (0 if self.error else float("inf")))
            if time.monotonic() >= self._kill_at:
                self._kill()

    def _look(self) -> None:
        for rank, pid in self._pids().items():
            if rank in self._dead or rank in self._killed:
                continue
            try:
                end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # torch's agent reaps it
            except ChildProcessError:  # it has done so already, and will say with what exit code
                bad = not self._ended_well(rank)
                if bad and not (self._folder / f"{rank}.json").exists():
                    self._vanished.add(rank)
            else:
                bad = end is not None and (end.si_code != os.CLD_EXITED or end.si_status != 0)
                if end and bad:
                    self._dead[rank] = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, time.time()
            if bad:
                self._kill_at = min(self._kill_at, time.monotonic() + GRACE)

    def _ended_well(self, rank: int) -> bool:
        said = self._folder / f"{rank}.json"
        error = json.loads(said.read_text()).get("error") if said.exists() else {"kind": ""}
        return error is None or error["kind"] == "interrupted"

    def _pids(self) -> dict[int, int]:
        found = {int(path.stem): path.read_text() for path in self._folder.glob("*.pid")}
        return {rank: int(pid) for rank, pid in found.items() if pid}  # one that is being written is empty

    def _kill(self) -> None:
        for rank, pid in self._pids().items():
            if rank not in self._dead:
                self._killed.add(rank)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    def _handle(self, number: int, frame: Any) -> None:
        if self._asked_at is not None and is_echo(number, self._asked_at):
            return
        if self._asked_at is not None or not self._pids():
            self._kill()
            os._exit(128 + number)
        self._asked_at, self._signal = time.monotonic(), number
        for pid in self._pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _death(rank: int, code: int) -> dict[str, Any]:
    """The error of a process that could not tell one."""
    place = f"process {rank}" + (f" of node {node()}" if _number("NNODES", 1) > 1 else "")
    if code == -signal.SIGKILL:
        fault = "was killed by signal 9, most likely by the kernel for want of memory"
        remedy = "a smaller training.per_device_train_batch_size or data.max_length, fewer processes, or more memory"
        return {"kind": "hardware", "place": place, "fault": fault, "remedy": remedy}
    fault = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return {"kind": "training", "place": place, "fault": fault, "remedy": "its last lines are in the log"}


def _gone(who: str, *, saved: bool) -> TrainboxError:
    """Not this node's fault: where there is a checkpoint, it counts as interrupted, so that who can restarts it."""
    kind = Interrupted if saved else TrainingError
    remedy = "its own output may say why; started again, the run goes on from its newest checkpoint"
    return kind(f"{who} is gone", place="distributed", remedy=remedy)


def _has_checkpoint() -> bool:
    return any((path / SEAL).exists() for path in all_checkpoints(box(BOX_OUTPUT)))


class Nodes:
    """The signs of life and the errors of all nodes, in the store that torch's agents meet at."""

    def __init__(self, address: str, number: int) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._number = number
        self._store: Any = None
        self._beat = 0
        self._next = 0.0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self.saved = False
        """Whether the first node has a checkpoint."""
        self.all_lost = False
        """Whether every node is there, and says that another is not."""
        self._failing_since: float | None = None

    def look(self) -> TrainboxError | None:
        """Give a sign of life, and say what became of the others; None while all is well."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + 1
        try:
            store = self._open()
            if store is None:
                return None
            self._beat += 1
            store.set(f"beat/{node()}", str(self._beat))
            self._learn_of_checkpoints(store)
            self._failing_since = None
            return self._told(store) or self._silent(store)
        except Exception as error:  # the store is gone, and with it the first node; or it is busy
            self._failing_since = self._failing_since or time.monotonic()
            busy = "timeout" in str(error).lower() or "timed out" in str(error).lower()
            patient = busy and time.monotonic() - self._failing_since < SILENCE
            return None if patient else _gone("node 0", saved=self.saved)

    def agree(self, own: dict[str, Any] | None, lost: dict[str, Any] | None = None) -> TrainboxError | None:
        """This node failed: tell the others why, or wait a little for one of them that knows.

        `lost` is what it says where it only knows that others cannot be talked to.
        """
        with contextlib.suppress(Exception):
            store = self._open()
            if store is None:
                return None
            if own:
                store.set(f"error/{node()}", json.dumps(own))
                time.sleep(3)  # the first node holds the store: let the others read it
                return None
            if lost:
                store.set(f"lost/{node()}", "1")
            end = time.monotonic() + WORD
            while time.monotonic() < end:
                self._learn_of_checkpoints(store)  # there may be one since the last look
                if error := self._told(store):
                    return error
                time.sleep(LOOK)
            self.all_lost = all(store.check([f"lost/{number}"]) for number in range(self._number))
        return None

    def _open(self) -> Any:
        """A client of the store; None while the nodes have not met yet."""
        if self._store is None:
            from torch.distributed import PrefixStore, TCPStore

            with contextlib.suppress(Exception):
                # The first node holds the store, and goes on doing so when its agent is over: others have yet to read.
                client = TCPStore(
                    self._host,
                    int(self._port),
                    is_master=node() == 0,
                    timeout=timedelta(seconds=10),
                    wait_for_workers=False,
                    multi_tenant=True,
                )
                self._store = PrefixStore("keeper", client)
        return self._store

    def _learn_of_checkpoints(self, store: Any) -> None:
        if node() == 0 and not self.saved and _has_checkpoint():
            self.saved = True
            store.set("saved", "1")
        self.saved = self.saved or store.check(["saved"])

    def _told(self, store: Any) -> TrainboxError | None:
        for number in range(self._number):
            if number != node() and store.check([f"error/{number}"]):
                return as_error(json.loads(store.get(f"error/{number}")))
        return None

    def _silent(self, store: Any) -> TrainboxError | None:
        for number in range(self._number):
            if number == node() or not store.check([f"beat/{number}"]):
                continue
            beat, now = store.get(f"beat/{number}"), time.monotonic()
            if number not in self._seen or self._seen[number][0] != beat:
                self._seen[number] = beat, now
            elif now - self._seen[number][1] > SILENCE:
                return _gone(f"node {number}", saved=self.saved)
        return None
