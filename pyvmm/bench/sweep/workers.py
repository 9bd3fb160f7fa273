# SPDX-License-Identifier: Apache-2.0
"""The workers of a sweep: this machine, labs, or a fleet. Each kind is a ``concurrent.futures.Executor``.

A set of workers owns its executor and its processes, labs or connection. ``stop`` ends all of it, including current
measurements. The owner calls it in the thread that made the workers.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from pyvmm import __version__
from pyvmm.bench.model import BenchError
from pyvmm.bench.sweep import work
from pyvmm.bench.sweep.plan import Task
from pyvmm.bench.sweep.work import Answer, Job, LostError, MismatchError, PointError
from pyvmm.errors import HostError, PyvmmError, UsageError, pip_install

if TYPE_CHECKING:
    from pyvmm.lab import Lab

CONNECT_SECONDS: Final = 15.0
"""How long a scheduler is looked for, at first and when it is lost."""


class Workers(ABC):
    """An executor and how its workers measure a point. ``window`` points are submitted at a time, None for all."""

    window: int | None

    def __init__(self) -> None:
        self._sweep = uuid.uuid4().hex
        """Names what is measured for us, where others measure too."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    @abstractmethod
    def title(self) -> str:
        """A description of the present workers."""

    @abstractmethod
    def submit(self, task: Task) -> Future[Answer]:
        """Submit a point for measurement."""

    @abstractmethod
    def stop(self) -> None:
        """End everything, at once. May be called again."""

    def judge(self, error: BaseException) -> PyvmmError:
        """Classify an error: LostError tries the point again, PointError gives it up, others end the sweep."""
        if isinstance(error, PyvmmError):
            return error
        return BenchError(f"{type(error).__name__}: {error}")

    def _job(self, task: Task, python: tuple[str, ...] = ()) -> Job:
        return Job(task.case, task.point, task.deadline, self._sweep, python=python)


class Here(Workers):
    """This machine, one point at a time."""

    window = 1

    def __init__(self, python: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._python = python
        # A thread waits for the measuring process. That one has no threads of pyvmm, since it may fork.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="pyvmm-sweep")

    @property
    def title(self) -> str:
        return "this machine"

    def submit(self, task: Task) -> Future[Answer]:
        return self._executor.submit(work.measure, self._job(task, self._python))

    def stop(self) -> None:
        work.cancel(self._sweep)
        self._executor.shutdown(cancel_futures=True)


class Labs(Workers):
    """Several labs at once. A lab boots at its first point, and again at the next point after it was lost."""

    def __init__(self, count: int, make: Callable[[], Lab], python: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.window = count
        self._make = make
        self._python = python or ("python3", *work.INSIDE)
        self._own = threading.local()
        self._guard = threading.Lock()
        self._labs: list[Lab] = []
        self._stopped = False
        # A lab ends with the thread that booted it: each belongs to a thread of the pool.
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="pyvmm-sweep-lab")

    @property
    def title(self) -> str:
        return f"{self.window} lab{'s' if self.window != 1 else ''}"

    @property
    def pids(self) -> list[int]:
        """The ids of the QEMU processes of running labs."""
        with self._guard:
            return [lab.pid for lab in self._labs]

    def submit(self, task: Task) -> Future[Answer]:
        return self._executor.submit(self._measure, self._job(task))

    def stop(self) -> None:
        with self._guard:
            self._stopped = True
            doomed, self._labs = self._labs, []
        for lab in doomed:
            lab.close()
        self._executor.shutdown(cancel_futures=True)

    def _measure(self, job: Job) -> Answer:
        from pyvmm.lab import LabError

        lab = self._lab()
        started = time.time()
        try:
            done = lab.capture([*self._python, work.request(job)], timeout=job.deadline + work.GRACE)
        except LabError as error:
            self._drop(lab)
            raise LostError(str(error)) from error
        name = f"lab of {threading.current_thread().name} on {socket.gethostname()}"
        return work.answer(done.status, done.stdout, done.stderr, name, started)

    def _lab(self) -> Lab:
        """Return this thread's lab. Raises LabError if it does not boot: the others would not boot either."""
        lab: Lab | None = getattr(self._own, "lab", None)
        if lab is not None:
            return lab
        lab = self._make()
        lab.__enter__()
        with self._guard:
            if not self._stopped:
                self._labs.append(lab)
                self._own.lab = lab
                return lab
        lab.close()
        raise LostError("the sweep has ended")

    def _drop(self, lab: Lab) -> None:
        self._own.lab = None
        with self._guard, contextlib.suppress(ValueError):
            self._labs.remove(lab)
        lab.close()


class Fleet(Workers):
    """The workers of a dask.distributed scheduler at ``address``; they may join and leave.

    The scheduler gives the point of a lost worker to another one. If it loses several with the same point, it gives
    the point up (its setting ``distributed.scheduler.allowed-failures``).
    """

    window = None

    def __init__(self, address: str, python: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._address = address
        self._python = python
        self._client = _connect(address)
        try:
            self._check()
        except BaseException:
            self._client.close()
            raise
        # Not pure: the same point may be submitted again. No retries: a point that fails, and is not lost, fails again.
        self._executor = self._client.get_executor(pure=False, retries=0)

    @property
    def title(self) -> str:
        try:
            count = len(self._client.nthreads())
        except Exception:  # the scheduler is gone: the futures of its points report that
            return self._address
        return f"{count} worker{'s' if count != 1 else ''} of {self._address}"

    def submit(self, task: Task) -> Future[Answer]:
        future: Future[Answer] = self._executor.submit(measure_for_fleet, self._job(task, self._python))
        return future

    def stop(self) -> None:
        self._executor.shutdown(wait=False)
        with contextlib.suppress(Exception):  # workers that cannot be reached end at their points' deadlines
            self._client.run(work.cancel, self._sweep)
        self._client.close()

    def judge(self, error: BaseException) -> PyvmmError:
        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        if isinstance(error, KilledWorker):
            return PointError(f"the scheduler gave it up: {error}")
        if isinstance(error, CancelledError | CommClosedError):
            return BenchError(f"the scheduler at {self._address} is gone")
        if isinstance(error, PyvmmError):
            return error
        return self._unfit(error)

    def _check(self) -> None:
        """Raise MismatchError if a machine is unfit. Workers that join later are checked with their first point."""
        try:
            self._client.run_on_scheduler(work.check_version, __version__)  # it unpacks the data for workers
            self._client.run(check_worker, __version__)
        except MismatchError:
            raise
        except Exception as error:  # a machine without pyvmm may raise anything
            raise self._unfit(error) from None

    def _unfit(self, error: BaseException) -> BenchError:
        return BenchError(
            f"the fleet at {self._address} cannot measure: {type(error).__name__}: {error}",
            hint="pyvmm must be installed where the scheduler and the workers run, in the same version",
        )


def measure_for_fleet(job: Job) -> Answer:
    """Measure a point on a worker of a fleet; raises as :func:`pyvmm.bench.sweep.work.measure`."""
    from distributed import get_worker

    check_worker(job.version)
    return work.measure(job, f"{get_worker().address} on {socket.gethostname()}")


def check_worker(version: str, dask_worker: Any = None) -> None:
    """Raise MismatchError if a worker must not measure for a sweep of pyvmm ``version``.

    ``Client.run`` fills in ``dask_worker``. A task looks its worker up.
    """
    work.check_version(version)
    if dask_worker is None:
        from distributed import get_worker

        dask_worker = get_worker()
    if (threads := dask_worker.state.nthreads) > 1:
        raise MismatchError(
            f"the worker {dask_worker.address} would measure {threads} points at once, which cost each other",
            hint="start it with: dask worker --nthreads 1",
        )


def _connect(address: str) -> Any:
    """Return a client of a scheduler; its methods have no types."""
    import asyncio

    try:
        import distributed
    except ImportError as error:
        raise HostError(f"a fleet needs dask.distributed: {error}", hint=pip_install("distributed")) from None
    try:
        asyncio.run(_reach(address))
        client: Any = distributed.Client
        return client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{address!r} is no scheduler's address: {error}", hint="tcp://HOST:8786 is") from None
    except (OSError, TimeoutError) as error:
        raise BenchError(
            f"no scheduler answers at {address}: {error}", hint="dask scheduler --port 8786 starts one"
        ) from None


async def _reach(address: str) -> None:
    """Connect to a scheduler once; raises as a client does. A client that cannot connect leaves its thread running."""
    import distributed
    import distributed.comm

    security: Any = distributed.Security
    comm: Any = distributed.comm
    link = await comm.connect(address, timeout=CONNECT_SECONDS, **security().get_connection_args("client"))
    await link.close()
