"""Generation by a server: a small process that speaks the completions protocol over the tiny model."""

from __future__ import annotations

import json
import multiprocessing
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedlora.adapters.writing import write_adapter
from seedlora.cli.main import main
from seedlora.evaluation import endpoint
from seedlora.evaluation.endpoint import EndpointGenerator
from seedlora.evaluation.generate import LENGTH, STOPPED, Prompt
from tests.helpers.models import built


def serve(base, adapters, pipe):
    """OpenAI's /v1/models and /v1/completions over PEFT adapters, with transformers' generation."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="seed_1")
    model.load_adapter(adapters[1], adapter_name="seed_2")
    model.eval()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.send({"data": [{"id": "seed_1"}, {"id": "seed_2"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert len(asked["stop"]) <= 4  # as vLLM has it; an answer without a status is a fault of the server
            ids = tokenizer(asked["prompt"], return_tensors="pt")
            with lock, torch.no_grad():
                model.set_adapter(asked["model"])
                said = model.generate(**ids, max_new_tokens=asked["max_tokens"], do_sample=False, pad_token_id=0)
            new = said[0, ids["input_ids"].shape[1] :]
            finish = "stop" if new[-1] == tokenizer.eos_token_id else "length"
            text = tokenizer.decode(new, skip_special_tokens=True)
            self.send({"choices": [{"text": text, "finish_reason": finish}], "usage": {"completion_tokens": len(new)}})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(server.server_address[1])
    server.serve_forever()


def test_a_server_gives_what_the_model_in_this_process_gives(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = built(tiny_llama, 1, 2)
    for replica in module.replicas:
        write_adapter(replica.name, module.stack.stored_factors(replica.name), module.options.lora_config())
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
    Path("gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "--task", "gsm8k", "--task_path", "gsm8k=gsm8k.jsonl", "--max_new_tokens", "10"]
    here = [word for name in ("seed_1", "seed_2") for word in ("--adapter", name)]
    assert main([*words, *here, "--dtype", "float32", "--out", "here"]) == 0
    ours, theirs = multiprocessing.Pipe()
    adapters = [str(tmp_path / name) for name in ("seed_1", "seed_2")]
    server = multiprocessing.get_context("fork").Process(target=serve, args=(tiny_llama, adapters, theirs), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{ours.recv()}/v1/"
        assert main([*words, *here, "--endpoint", url, "--out", "there"]) == 0
        assert main([*words, "--adapter", "fused", "--endpoint", url, "--out", "no"]) == 2
    finally:
        server.kill()
        server.join()
    assert "has no model 'fused'; it has seed_1, seed_2 (vLLM takes adapters by" in capsys.readouterr().err

    def answers(folder):
        lines = [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]
        return {(s["adapter"], s["item"]): (s["text"], s["tokens"], s["finish"]) for s in lines}

    assert answers("there") == answers("here")
    assert len(answers("there")) == 8


class Fake(BaseHTTPRequestHandler):
    """Answers with what the test put into ``script``: (status, body) pairs, the last one again and again."""

    models: ClassVar = {"data": [{"id": "a"}]}
    script: ClassVar[list] = []
    seen: ClassVar[list] = []

    def log_message(self, *args):
        pass

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.seen.append((self.path, json.loads(self.rfile.read(length) or b"null"), dict(self.headers)))
        if self.path.endswith("/models"):
            status, body = 200, self.models
        else:
            status, body = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer  # noqa: N815


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    Fake.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def ask(url, script, **options):
    Fake.script, found = list(script), []
    generate = EndpointGenerator(url, models={"x": "a"}, concurrency=1, **options)
    generate(
        {"x": [Prompt("Hi", False)]}, max_new_tokens=5, stops=("Q:", "END"), on_done=lambda *got: found.append(got)
    )
    return found


def completion(text, finish="stop"):
    return 200, {"choices": [{"text": text, "finish_reason": finish}], "usage": {"completion_tokens": 3}}


def test_what_is_asked_and_what_is_read(fake, monkeypatch):
    monkeypatch.setenv("SEEDLORA_ENDPOINT_KEY", "word")
    assert ask(fake, [completion("one END two", "length")]) == [("x", 0, ("one ", 3, STOPPED))]
    path, body, headers = Fake.seen[-1]
    assert path == "/v1/completions"
    assert body == {
        "model": "a", "prompt": "Hi", "max_tokens": 5, "temperature": 0, "stop": ["Q:", "END"],
        "add_special_tokens": False,
    }  # fmt: skip
    assert headers["Authorization"] == "Bearer word"
    assert ask(fake, [completion("one", "length")]) == [("x", 0, ("one", 3, LENGTH))]


def test_a_fault_that_passes_is_tried_again(fake):
    script = [(503, b"busy"), (429, {"error": {"message": "slow down"}}), (200, b"not json"), completion("ok")]
    assert ask(fake, script)[0][2].text == "ok"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([(400, {"error": {"message": "context length\nexceeded"}})], r"refused /v1/completions \(400: context length"),
        ([(401, {"detail": "no"})], r"refused /v1/completions \(401: "),
        ([(500, b"boom")], r"does not answer /v1/completions \(500: boom; 3 attempts\)"),
        ([(200, {"object": "error"})], "answered without choices"),
    ],
)
def test_a_fault_that_stays_is_one_sentence(fake, script, message):
    with pytest.raises(OSError, match=message):
        ask(fake, script, retries=2)


def test_a_wrong_address_is_said_without_a_second_attempt(monkeypatch):
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: pytest.fail(f"sleeps {seconds} s"))
    with pytest.raises(OSError, match=r"http://127.0.0.1:1 does not answer /v1/models \(.*refused\)"):
        EndpointGenerator("http://127.0.0.1:1", models={"x": "a"})


@pytest.mark.parametrize("answer", [[], {"data": 5}, {"data": [1]}, {"object": "list"}])
def test_a_server_of_another_kind(fake, monkeypatch, answer):
    monkeypatch.setattr(Fake, "models", answer)
    with pytest.raises(OSError, match=r"answered without a list of models"):
        EndpointGenerator(fake, models={"x": "a"})
