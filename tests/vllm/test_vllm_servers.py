"""Two ``vllm serve`` processes that one trainer feeds: what each decodes after updates, and what the trainer
is told when one of them fails. The tests share the servers; each leaves them as they were started.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rl.models.policies import fetch_policy
from paceline.rollout import Request, SamplingParams
from paceline.rollout.backends.exchange import make_token, token_file
from paceline.rollout.backends.serve_command import serve_command, serve_environment
from paceline.rollout.backends.vllm_server import VllmServers
from paceline.rollout.drafters.eagle3_model import Eagle3Model
from tests.engines import tiny_eagle3, tiny_llama, worst_gap
from tests.vllm.servers import environment_of_server, wait_until_healthy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
VOCAB, DRAFT_VOCAB = 99, 50
REPEATED = 5  # greedily, the policy says nothing else after the prompts of `asked`


class Server:
    """A server in a process group of its own, which drafts three tokens in every step."""

    def __init__(self, folder, exchange, port):
        self.url, self._log = f"http://127.0.0.1:{port}", folder / f"{port}.log"
        command = serve_command(
            folder / "policy",
            drafter=folder / "drafter",
            depth=3,
            schedule=[(1, 8, 3)],
            port=port,
            max_slots=8,
            max_context=256,
            updates=True,
            more=["--enforce-eager", "--dtype", "float32"],
        )
        command[0] = str(Path(sys.executable).parent / "vllm")
        environment = environment_of_server(**serve_environment(exchange, "127.0.0.1"))
        self._token = environment["PACELINE_UPDATE_TOKEN"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self):
        """Waits until the server answers."""
        wait_until_healthy(self.url, self._process, self._log)

    def ask(self, path, method="GET"):
        headers = {"Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(self.url + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    def accepted(self):
        """The number of draft tokens that were accepted since the server was started."""
        name = "vllm:spec_decode_num_accepted_tokens_total"
        return float(re.search(rf"^{name}\S* (\S+)", self.ask("/metrics"), re.M)[1])

    def freeze(self):
        os.killpg(self._process.pid, signal.SIGSTOP)

    def kill(self):
        """Ends all of the server's processes at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)

    def engine_processes(self):
        """The engine core and its worker; the API server is their parent."""
        return psutil.Process(self._process.pid).children(recursive=True)


class Pair:
    """A policy and two servers, of which the second reads weights from a part of the first's exchange."""

    def __init__(self, folder):
        self.folder, self.exchange, self.shared = folder, folder / "exchange", folder / "exchange" / "shared"
        self.policy = tiny_llama(VOCAB, layers=8, sharpness=8.0, hidden=256)
        self.policy.save_pretrained(folder / "policy")
        for tokenizer in fetch_policy("tiny-llama").glob("tokenizer*"):
            shutil.copy(tokenizer, folder / "policy")
        save_drafter(tiny_eagle3(self.policy, DRAFT_VOCAB), folder / "drafter", torch.float32)
        token = make_token(self.exchange)
        self.shared.mkdir()
        token_file(self.shared).write_text(token)
        for name, first in (("good", REPEATED), ("useless", 0)):
            save_drafter(self.constant(first), self.shared / name, torch.float32)
        self.weights = self.shared / "policy.safetensors"
        self.token = token
        self.servers = [Server(folder, self.exchange, 8751), Server(folder, self.shared, 8752)]

    def constant(self, token):
        """A drafter that always drafts one token."""
        drafter = tiny_eagle3(self.policy, DRAFT_VOCAB)
        drafter = Eagle3Model(drafter.config, torch.arange(token, token + DRAFT_VOCAB))
        with torch.no_grad():
            drafter.lm_head.weight.zero_()
        return drafter

    def client(self, *urls, **options):
        urls = urls or [server.url for server in self.servers]
        return VllmServers(urls, 8, token=self.token, **options)

    def accepted(self, client):
        """Greedy tokens of both servers and the number of drafts that each accepted."""
        before = [server.accepted() for server in self.servers]
        rollouts = client.generate(asked(temperature=0.0))
        assert {t for r in rollouts for t in r.token_ids} == {REPEATED}, [r.error for r in rollouts]
        return [server.accepted() - n for server, n in zip(self.servers, before, strict=True)]

    @contextmanager
    def changed_policy(self):
        """Other weights, in ``self.policy`` and in a file."""
        kept = {name: p.detach().clone() for name, p in self.policy.named_parameters()}
        with torch.no_grad():
            for p in self.policy.parameters():
                p.add_(0.05 * torch.randn_like(p))
            save_file({n: p.detach().clone() for n, p in self.policy.named_parameters()}, self.weights)
            yield
            for name, p in self.policy.named_parameters():
                p.copy_(kept[name])
        save_file(kept, self.weights)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("servers"))
    try:
        for server in pair.servers:
            server.wait()
        yield pair
    finally:
        for server in pair.servers:
            server.kill()


def asked(tokens=16, **options):
    """Requests of which each server gets half."""
    params = SamplingParams(max_tokens=tokens, **options)
    return [Request([(5, 8, 24, 5)[i // 2], 5, 6, 7], params, seed=i, group=i) for i in range(8)]


def test_both_servers_decode_with_the_new_policy_and_the_new_drafter(pair):
    client = pair.client()
    assert worst_gap(pair.policy, client.generate(asked())) < 2e-3
    with pair.changed_policy():
        assert worst_gap(pair.policy, client.generate(asked())) > 0.1
        client.update_policy([pair.weights], version=5)
        rollouts = client.generate(asked())
        assert worst_gap(pair.policy, rollouts) < 2e-3
        assert all(r.segments == [(5, 16)] for r in rollouts)
    client.update_policy([pair.weights], version=6)
    client.update_drafter(pair.shared / "useless")
    assert pair.accepted(client) == [0, 0]
    client.update_drafter(pair.shared / "good")
    assert min(pair.accepted(client)) > 30
    assert worst_gap(pair.policy, client.generate(asked())) < 2e-3
    client.close()


def test_a_drafter_that_one_server_cannot_read_costs_it_speed_only(pair):
    """The other takes it, and nobody's tokens change."""
    client = pair.client()
    client.update_drafter(pair.shared / "useless")
    save_drafter(pair.constant(REPEATED), pair.exchange / "good", torch.float32)
    with pytest.raises(ConnectionError) as found:
        client.update_drafter(pair.exchange / "good")
    line = str(found.value)
    assert line.startswith(f"{pair.servers[1].url}/update_weights: ") and "rollout.vllm.exchange" in line
    assert line.endswith("(1 of 2 servers took the weights)") and "\n" not in line
    first, second = pair.accepted(client)
    assert first > 30 and second == 0
    assert worst_gap(pair.policy, client.generate(asked())) < 2e-3
    client.update_drafter(pair.shared / "good")
    assert min(pair.accepted(client)) > 30
    client.close()


@pytest.mark.parametrize("start", ["/start_weight_update", "/start_draft_weight_update"])
def test_an_update_that_a_killed_trainer_left_open_stops_nothing(pair, start):
    """Neither the servers' completions, nor the next trainer's updates."""
    pair.servers[0].ask(start, "POST")
    client = pair.client()
    assert worst_gap(pair.policy, client.generate(asked())) < 2e-3
    with pair.changed_policy():
        client.update_policy([pair.weights], version=1)
        assert worst_gap(pair.policy, client.generate(asked())) < 2e-3
    client.update_policy([pair.weights], version=2)
    client.close()


def test_a_server_that_is_killed_during_an_update_is_named(pair):
    """The other has the new weights; a server started in its place gets them with the next update."""
    client, (first, second) = pair.client(), pair.servers
    with pair.changed_policy():
        second.freeze()
        threading.Timer(2, second.kill).start()
        began = time.monotonic()
        with pytest.raises(ConnectionError) as found:
            client.update_policy([pair.weights], version=1)
        assert time.monotonic() - began < 60
        assert str(found.value).startswith(f"{second.url}/start_weight_update: ")
        assert str(found.value).endswith("(1 of 2 servers took the weights)") and "\n" not in str(found.value)
        assert worst_gap(pair.policy, pair.client(first.url).generate(asked())) < 2e-3
        with pytest.raises(ConnectionError, match=rf"{second.url}/start_draft_weight_update: "):
            client.update_drafter(pair.shared / "good")
        assert [bool(r.error) for r in client.generate(asked())] == [False, True] * 4
        client.close()
        pair.servers[1] = Server(pair.folder, pair.shared, 8752)
        pair.servers[1].wait()
        client = pair.client()
        client.update_policy([pair.weights], version=2)
        assert worst_gap(pair.policy, client.generate(asked())) < 2e-3
    client.update_policy([pair.weights], version=3)
    client.update_drafter(pair.shared / "good")
    assert min(pair.accepted(client)) > 30
    client.close()


def test_a_server_whose_engine_dies_during_a_drafter_update_is_named(pair):
    client, (_, second) = pair.client(), pair.servers
    processes = second.engine_processes()
    for process in processes:
        process.suspend()
    threading.Timer(2, lambda: [process.kill() for process in processes]).start()
    began = time.monotonic()
    with pytest.raises(ConnectionError) as found:
        client.update_drafter(pair.shared / "good")
    assert time.monotonic() - began < 60
    assert second.url in str(found.value) and "\n" not in str(found.value)
    assert str(found.value).endswith("(1 of 2 servers took the weights)")
    client.close()
