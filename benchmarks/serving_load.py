"""A server under load: many clients at once, of which a third leave early or send rubbish.

    python benchmarks/serving_load.py                              # 200 clients for 5 minutes, a tiny model
    python benchmarks/serving_load.py --clients 20 --minutes 0.2 --out /tmp/load.json
    python benchmarks/serving_load.py --minutes 0 --lm demo --rm runs/partial_bt --out /tmp/demo.json

Every answer is compared with the one that the same request had before the load. The server's memory is read once a
second. Before that, requests that behave are answered in turns by a session in Python (what `decode.py` does), by the
server's engine without HTTP, and by the server, for the ratios of their throughputs.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jax
import numpy as np

from pargs_jax.commands.demo import model_source
from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS
from pargs_jax.generation.plan import Settings
from pargs_jax.generation.session import Session
from pargs_jax.mesh import make_mesh
from pargs_jax.models.hf import save_model
from pargs_jax.serving.config import ServeConfig
from pargs_jax.serving.engine import Engine, Event, Finished, Order
from pargs_jax.serving.fields import Completion
from pargs_jax.serving.service import Service
from pargs_jax.testing import tiny_model, tiny_tokenizer
from pargs_jax.text.prompts import get_form

TOKENS, PLACES, KNOWN = 32, 32, 40
PROMPTS = (
    "My lamp broke after one week. Can I have a new one?",
    "What is your opinion of tea with a lot of milk?",
    "My kettle leaks, Anna, and I am not happy with it.",
    "Why is the sky blue in the day and red at night?",
    "Say something kind to a friend who is sad today.",
)
"""All are padded to 32 tokens, so that a session has a state as wide as the server's, which is made for the longest."""
RUBBISH = (b"", b"{", b"[1]", b'{"model": "tiny"}', b'{"model": "no", "prompt": "x"}', b"\xff" * 100, b'{"tools": 1}')


def requests() -> list[dict[str, Any]]:
    """Requests of mixed settings, each with a seed, so that its answer is known."""
    draw = random.Random(0)
    found = []
    for number in range(KNOWN):
        body = {"model": draw.choice(["tiny", "tiny+pargs"]), "prompt": draw.choice(PROMPTS), "id": str(number)}
        body |= {"seed": number, "max_tokens": draw.randint(8, TOKENS), "temperature": draw.choice([0.7, 1.0, 1.5])}
        if body["model"] != "tiny":
            body["weight"] = draw.uniform(0.5, 4)
        found.append(body)
    return found


def make_models(folder: Path) -> tuple[str, str]:
    """Tiny models with the demo's tokenizer: their folders."""
    for name, head, seed in (("tiny", "vocabulary", 0), ("rm", "reward", 1)):
        model, params = tiny_model("llama", head, seed=seed, vocab_size=tiny_tokenizer().vocab_size)
        save_model(folder / name, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": [2, 70, 300]})
        tiny_tokenizer().save(folder / name)
    return str(folder / "tiny"), str(folder / "rm")


def start_server(lm: str, rm: str) -> tuple[subprocess.Popen[str], str]:
    """A server of these models, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "serve.py", "--lm", lm, "--rm", rm, "--name", "tiny"]
    options = {"port": port, "batch-size": PLACES, "max-new-tokens": TOKENS, "max-prompt-tokens": 32, "queue": 400}
    options["format"] = "plain"
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if "listening" in line:
            return server, f"http://127.0.0.1:{port}"
    raise SystemExit("the server did not start")


def memory(process: int) -> float:
    """Resident memory of a process, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


class Load:
    """What many clients see."""

    def __init__(self, url: str, known: dict[int, str], bodies: list[dict[str, Any]]) -> None:
        self.url, self.known, self.bodies = url, known, bodies
        self.outcomes: Counter[str] = Counter()
        self.first_text: list[float] = []
        self.seconds: list[float] = []
        self.tokens = 0
        self.faults: list[str] = []

    async def client(self, number: int, until: float) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(timeout=120) as http:
            while time.monotonic() < until:
                kind = draw.random()
                try:
                    if kind < 1 / 6:
                        await self.send_rubbish(http, draw)
                    elif kind < 1 / 3:
                        await self.leave_early(http, draw)
                    else:
                        await self.ask(http, draw)
                except httpx.HTTPError as error:
                    self.faults.append(repr(error))

    async def send_rubbish(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        reply = await http.post(f"{self.url}/v1/completions", content=draw.choice(RUBBISH))
        error = reply.json()["error"]
        if reply.status_code not in (400, 404) or set(error) != {"message", "type", "param", "code"}:
            self.faults.append(f"rubbish got {reply.status_code} {reply.text}")
        self.outcomes["refused"] += 1

    async def leave_early(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        body = draw.choice(self.bodies) | {"stream": draw.random() < 0.5, "n": 2}
        try:
            await asyncio.wait_for(http.post(f"{self.url}/v1/completions", json=body), draw.uniform(0.01, 0.3))
            self.outcomes["stayed"] += 1
        except TimeoutError:
            self.outcomes["left"] += 1

    async def ask(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        body = draw.choice(self.bodies)
        began, text = time.monotonic(), ""
        async with http.stream("POST", f"{self.url}/v1/completions", json=body | {"stream": True}) as reply:
            if reply.status_code == 429:
                self.outcomes["told to come again"] += 1
                await reply.aread()
                return await asyncio.sleep(float(reply.headers["Retry-After"]))
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    if not text:
                        self.first_text.append(time.monotonic() - began)
                    text += json.loads(line[6:])["choices"][0]["text"]
        self.seconds.append(time.monotonic() - began)
        self.outcomes["answered"] += 1
        if text != self.known[body["seed"]]:
            self.faults.append(f"{body} got {text!r}, not {self.known[body['seed']]!r}")


async def under_load(url: str, process: int, given: argparse.Namespace) -> dict[str, Any]:
    bodies = requests()
    async with httpx.AsyncClient(timeout=120) as http:
        replies = [await http.post(f"{url}/v1/completions", json=body) for body in bodies]
    known = {body["seed"]: reply.json()["choices"][0]["text"] for body, reply in zip(bodies, replies, strict=True)}
    load = Load(url, known, bodies)
    until = time.monotonic() + 60 * given.minutes
    clients = [asyncio.create_task(load.client(number, until)) for number in range(given.clients)]
    memories = []
    while time.monotonic() < until:
        memories.append(memory(process))
        await asyncio.sleep(1)
    await asyncio.gather(*clients)
    async with httpx.AsyncClient() as http:
        metrics = (await http.get(f"{url}/metrics")).text
    tenth = max(1, len(memories) // 10)
    return {
        "clients": given.clients,
        "minutes": given.minutes,
        "outcomes": dict(load.outcomes),
        "faults": load.faults[:20],
        "fault_count": len(load.faults),
        "answers_a_second": load.outcomes["answered"] / (60 * given.minutes),
        "first_text_seconds": percentiles(load.first_text),
        "seconds": percentiles(load.seconds),
        "memory_mib": {"after a tenth": statistics.median(memories[tenth : 2 * tenth] or memories),
                       "at the end": statistics.median(memories[-tenth:])},
        "compilations": number(metrics, "pargs_compilations_total"),
        "running at the end": number(metrics, "pargs_answers_running"),
    }  # fmt: skip


def percentiles(values: list[float]) -> dict[str, float]:
    return {str(p): round(float(np.percentile(values, p)), 3) for p in (50, 90, 99)} if values else {}


def number(metrics: str, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)", metrics, re.MULTILINE)[1])


async def ask_all(url: str, bodies: list[dict[str, Any]]) -> None:
    """Has requests answered over `2 PLACES` connections that stay open. Written by hand to be cheap, because
    clients share the server's cores."""
    address = urlsplit(url)
    left = deque(bodies)

    async def client() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        while left:
            body = json.dumps(left.popleft()).encode()
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: server\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            reply = json.loads(await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1])))
            assert reply["choices"][0]["finish_reason"], reply
        writer.close()

    await asyncio.gather(*(client() for _ in range(2 * PLACES)))


def throughput(url: str, lm: str, rm: str, rounds: int, answers: int) -> dict[str, Any]:
    """How many times the answers a second of a session in Python the engine gives, and the server; the answers of a
    session; round by round."""
    prompts = [Prompt(str(n), PROMPTS[n % len(PROMPTS)]) for n in range(answers)]
    session = Session(model_source(lm), [rm], method=METHODS["pargs"])
    settings = Settings(METHODS["pargs"], max_new_tokens=TOKENS, batch_size=PLACES)
    usual = {"model": "tiny+pargs", "seed": 0, "max_tokens": TOKENS}
    bodies = [usual | {"prompt": prompt.text, "id": prompt.id} for prompt in prompts]
    lengths = {"max_prompt_tokens": 32, "max_new_tokens": TOKENS}
    service = Service(session, "pargs", get_form("plain"), name="tiny", k=None, most_answers=1, **lengths)
    engine = Engine(
        lambda: service.make_scheduler(PLACES, ServeConfig.steps),
        session.answers,
        jax.sharding.get_mesh(),
        places=PLACES,
        most_waiting=answers,
        warm_up=service.warm_up,
    )
    engine.wait_until_ready()

    def ask_engine() -> None:
        done = threading.Semaphore(0)

        def tell(events: list[Event]) -> None:
            for _ in (event for event in events if isinstance(event, Finished)):
                done.release()

        for body in bodies:
            engine.add(Order(service.requests(Completion(**body)), tell, follows=False))
        for _ in bodies:
            done.acquire()

    runs: dict[str, Callable[[], Any]] = {
        "session": lambda: list(session.answer(prompts, settings)),
        "engine": ask_engine,
        "server": lambda: asyncio.run(ask_all(url, bodies)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - began)
    engine.close(1)
    found: dict[str, Any] = {"answers a second of a session": answers / statistics.median(seconds["session"])}
    for name in ("engine", "server"):
        ratios = [own / other for own, other in zip(seconds["session"], seconds[name], strict=True)]
        found[name] = {"median": statistics.median(ratios), "rounds": [round(ratio, 3) for ratio in ratios]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", help="language model (default: a tiny one)")
    parser.add_argument("--rm", help="reward model, with --lm")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison of throughputs")
    parser.add_argument("--answers", type=int, default=256, help="in a round")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving_load_cpu.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, jax.set_mesh(make_mesh("auto", "decode")):
        lm, rm = (given.lm, given.rm) if given.lm else make_models(Path(name))
        server, url = start_server(lm, rm)
        try:
            found: dict[str, Any] = {
                "throughput, in those of a session": throughput(url, lm, rm, given.rounds, given.answers)
            }
            if given.minutes:
                found["load"] = asyncio.run(under_load(url, server.pid, given))
        finally:
            server.terminate()
            server.wait(60)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
