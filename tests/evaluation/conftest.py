"""Tiny models on disk, answers files and a local endpoint, shared by the tests of this folder."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pargs_jax.models.hf import save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory):
    """Saves a random model with the demo's tokenizer and returns its folder."""

    def save(head, *, seed=0):
        folder = tmp_path_factory.mktemp(head)
        model, params = tiny_model("llama", head, seed=seed, vocab_size=tiny_tokenizer().vocab_size)
        save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
        tiny_tokenizer().save(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def lm(save_tiny):
    return save_tiny("vocabulary")


@pytest.fixture(scope="session")
def rm(save_tiny):
    return save_tiny("reward", seed=1)


@pytest.fixture
def answers_file(tmp_path):
    """Writes an answers file of these responses, to prompts p0, p1, ..., and returns its path."""

    def write(name, responses, **fields):
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"id": f"p{i}", "prompt": "My lamp broke.", "response": text} | fields for i, text in enumerate(responses)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def longer_wins(a, b):
    return "I prefer the longer one. " + ("[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]")


class FakeEndpoint:
    """Answers chat completions by `reply(a, b)`: a text, an HTTP status, or seconds to hang. Keeps the requests."""

    def __init__(self, reply=longer_wins):
        self.reply = reply
        self.requests, self.keys = [], []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append(body)
                fake.keys.append(self.headers["Authorization"])
                user = body["messages"][-1]["content"]
                a, b = re.search(r"# Answer A\n(.*)\n\n# Answer B\n(.*)", user, re.DOTALL).groups()
                said = fake.reply(a, b)
                if isinstance(said, float):
                    time.sleep(said)
                    said = "too late [[A]]"
                status = said if isinstance(said, int) else 200
                content = {"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}
                payload = json.dumps({"error": {"message": "no"}} if isinstance(said, int) else content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(payload)))
                    self.end_headers()
                    self.wfile.write(payload)
                except BrokenPipeError:
                    pass

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint():
    fake = FakeEndpoint()
    yield fake
    fake.close()
