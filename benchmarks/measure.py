"""Timing, the machine's ceilings, and result files: what the benchmark scripts share."""

import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Another framework shares the device's memory. JAX reads this when it first looks for devices.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

STAT = Path("/proc/stat")
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds, in which the system counts CPU time
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "torch", "transformers", "numpy")


MOST_OTHERS = 0.05
"""A round is spoilt if other processes had more than this share of all cores' time in it."""

MOST_ROUNDS = 3
"""At most this many times the wanted rounds are run, to find enough that are not spoilt."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """One quantity measured several times: its median, its extremes, and every value in the order measured; and the
    median share of all cores' time that other processes had meanwhile, where that is known."""

    median: float
    low: float
    high: float
    runs: tuple[float, ...]
    others: float | None = None

    @classmethod
    def of(cls, runs: Iterable[float], others: float | None = None) -> "Spread":
        runs = tuple(runs)
        return cls(statistics.median(runs), min(runs), max(runs), runs, others)

    def scaled(self, factor: float) -> "Spread":
        """The same quantity in other units."""
        return Spread.of((factor * run for run in self.runs), self.others)

    def rate(self, units: float) -> "Spread":
        """Units per second, where this is seconds for `units` of them (tokens, say)."""
        return Spread.of(units / seconds for seconds in self.runs)

    def over(self, other: "Spread") -> "Spread":
        """This divided by `other`, run by run: for contestants that `interleaved` timed in the same rounds."""
        return Spread.of(mine / theirs for mine, theirs in zip(self.runs, other.runs, strict=True))

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(self.low)} to {_digits(self.high)})"


def time_it(run: Callable[[], object], repeats: int = 5, warmup: int = 1) -> Spread:
    """Seconds that `run` takes, after `warmup` calls that are not counted.

    `run` must return only when its result is there: JAX needs `block_until_ready`, torch on a GPU needs `synchronize`.
    """
    return interleaved({"only": run}, repeats, warmup)["only"]


def interleaved(
    contestants: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1
) -> dict[str, Spread]:
    """Seconds for each contestant, timed in turns in one process, so that the machine's drift hits all alike.

    Every other round goes through them backwards, so that none always runs after the same neighbour. Rounds that other
    processes spoilt are dropped, and others run in their place (`MOST_OTHERS`, `MOST_ROUNDS`); if less than half as
    many as wanted are left, all rounds count, and a warning says so. See `time_it` for what a contestant must do.
    """
    for run in contestants.values():
        for _ in range(warmup):
            run()
    rounds: list[dict[str, float]] = []
    shares: list[float] = []
    order = list(contestants)
    while sum(share <= MOST_OTHERS for share in shares) < repeats and len(rounds) < MOST_ROUNDS * repeats:
        seconds = {}
        before = CpuTime.now()
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            seconds[name] = time.perf_counter() - start
        rounds.append(seconds)
        shares.append(before.others_share(CpuTime.now()))
        order.reverse()
    quiet = [index for index, share in enumerate(shares) if share <= MOST_OTHERS]
    if 2 * len(quiet) < repeats:
        warnings.warn(
            f"other processes had {statistics.median(shares):.0%} of the CPU time (median of {len(rounds)} rounds), "
            f"and {len(quiet)} rounds were quiet; all count",
            stacklevel=2,
        )
        quiet = list(range(len(rounds)))
    others = statistics.median(shares[index] for index in quiet)
    return {name: Spread.of((rounds[index][name] for index in quiet), others) for name in contestants}


class CpuTime(NamedTuple):
    """Seconds that cores have worked, since they started: for all processes, and for this one with its children; and
    the time of day. Where the system does not tell (`/proc/stat` is Linux's), all processes are this one."""

    everyone: float
    own: float
    clock: float

    @classmethod
    def now(cls) -> "CpuTime":
        own = sum(os.times()[:4])
        everyone = own
        if STAT.exists():
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text().split("\n")[0].split()[1:])
            everyone = (user + nice + system + irq + softirq + steal) * TICK
        return cls(everyone, own, time.perf_counter())

    def others_share(self, later: "CpuTime") -> float:
        """The share of all cores' time that other processes had between this and a later time, less the counters'
        resolution."""
        others = (later.everyone - self.everyone) - (later.own - self.own) - 2 * TICK
        return max(0.0, others) / ((later.clock - self.clock) * (os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The best rates seen on one device: bytes read per second, operations per second in large matrix products."""

    bandwidth: float
    matmul: float

    def least_seconds(self, bytes_read: float, operations: float) -> float:
        """No program that reads so many bytes and does so many operations is faster, even with both overlapped."""
        return max(bytes_read / self.bandwidth, operations / self.matmul)


def ceilings(dtype: jnp.dtype) -> Ceilings:
    """Both ceilings of JAX's default device, the products in `dtype`, at sizes that fill it."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    return Ceilings(memory_bandwidth(), matmul_rate(dtype, (size, size, size)))


def memory_bandwidth(size: int = 2**30, repeats: int = 10) -> float:
    """Bytes per second that JAX's default device reads, from summing an array of `size` bytes, far above any cache.

    Reading, not copying: decoding reads weights and caches, and writes next to nothing.
    """
    array = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return size / time_it(lambda: total(array).block_until_ready(), repeats).low


def matmul_rate(dtype: jnp.dtype, shape: tuple[int, int, int], repeats: int = 10) -> float:
    """Operations per second of JAX's default device in a product of (m, k) and (k, n) in `dtype`, for `shape` m, k, n.

    A multiplication and an addition count as two. At the precision JAX takes by default on the device. The numbers are
    random: a GPU multiplies constants faster, since it draws less power.
    """
    m, k, n = shape
    left = jax.random.normal(jax.random.key(0), (m, k), dtype)
    right = jax.random.normal(jax.random.key(1), (k, n), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * m * k * n / time_it(lambda: product(left, right).block_until_ready(), repeats).low


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers: processor, usable cores, load, devices, versions, date."""
    devices = jax.devices()
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A markdown table, its columns the first row's keys; numbers right-aligned, floats in three significant digits."""
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    numeric = [all(isinstance(row[column], int | float | Spread) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]

    def line(parts: Sequence[str]) -> str:
        padded = [
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(parts) for parts in [columns, rule, *cells])


def _cell(value: object) -> str:
    return _digits(value) if isinstance(value, float) else str(value)


def _digits(value: float) -> str:
    """Three significant digits without an exponent; all digits before the point are kept."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def write_result(name: str, payload: Mapping[str, Any], markdown: str) -> Path:
    """Write `results/<name>.json` (the payload and the machine) and `results/<name>.md` (the text and the machine).

    Dataclasses in the payload, `Spread` among them, become objects. Returns the path of the markdown.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    described = machine()
    content = json.dumps({"machine": described, **payload}, indent=2, default=dataclasses.asdict)
    (RESULTS / f"{name}.json").write_text(content + "\n")
    path = RESULTS / f"{name}.md"
    facts = "\n".join(f"- {fact}: {value}" for fact, value in described.items() if value is not None)
    path.write_text(f"{markdown.rstrip()}\n\nMachine:\n\n{facts}\n")
    return path
