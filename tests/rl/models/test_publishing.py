"""What goes to the hub, against a stub: cards, files, names, and one line for whatever the hub says."""

import json
from types import SimpleNamespace

import httpx
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors.torch import load_file
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.drafter_trainer.storage.checkpoint import load_drafter, save_drafter
from paceline.drafter_trainer.storage.export import export_drafter, hub_id
from paceline.rl.config.scale import LoraConfig
from paceline.rl.models import publishing
from paceline.rl.models.lora import AdapterBase, add_adapters, save_adapters
from tests.engines import tiny_eagle3, tiny_llama

runner = CliRunner()


class Hub:
    """Stands in for `HfApi`: keeps what it gets, and fails as it is told."""

    def __init__(self) -> None:
        self.made: dict[str, bool | None] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.public, self.error = set(), None

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        if self.error is not None:
            raise self.error
        self.made[repo_id] = private
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id):
        return SimpleNamespace(private=repo_id not in self.public)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        kept = {
            str(f.relative_to(folder_path)): f.read_bytes() for f in folder_path.rglob("*") if f.is_file()
        }
        self.files[repo_id] = {name: data for name, data in kept.items() if name not in ignore_patterns}

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
        self.files[repo_id][path_in_repo] = path_or_fileobj


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(publishing, "HfApi", lambda: made)
    monkeypatch.setattr(publishing.huggingface_hub, "get_token", lambda: "hf_secret")
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    policy = tiny_llama()
    save_drafter(tiny_eagle3(policy), run / "checkpoint" / "drafter", torch.float32)
    policy.save_pretrained(run / "checkpoint" / "policy")
    (run / "checkpoint" / "policy" / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\nthe card of the base\n"
    )
    add_adapters(policy, LoraConfig(rank=2), seed=0, base=AdapterBase("org/base", "0" * 40))
    weights = {n: p.detach() for n, p in policy.named_parameters() if ".lora_" in n}
    save_adapters(policy, weights, run / "checkpoint" / "adapter")
    (run / "config.json").write_text(
        json.dumps({"policy": {"model": "org/base"}, "rollout": {"temperature": 0.8}})
    )
    steps = [
        {"step": 0, "rollout/acceptance_length": 1.5},
        {"step": 1, "rollout/acceptance_length_eagle3": 2.25, "drafter/acceptance": [0.7, 0.5]},
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(s) + "\n" for s in steps) + '{"step": 2, "rollout/acc'
    )
    return run


def test_an_exported_drafter_says_what_it_is_for(run, tmp_path):
    path = export_drafter(run, tmp_path / "drafter")
    card = ModelCard.load(path / "README.md")
    assert (
        card.data.base_model == "org/base"
        and card.data.license == "apache-2.0"
        and card.data.library_name == "vllm"
    )
    assert {"eagle3", "speculative-decoding"} <= set(card.data.tags)
    for said in (
        "after 2 RL steps",
        "temperature 0.8",
        "run: 2.25 tokens",
        "0.70, 0.50",
        "vllm serve org/base",
        "sglang.launch_server",
    ):
        assert said in card.text
    assert '"method": "eagle3", "model": "drafter"' in card.text
    assert load_drafter(path, 97, 64).config.draft_vocab_size == 49


def test_a_policy_that_is_no_hubs_has_no_base_model(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_id("org/name", tmp_path) == "org/name"
    assert hub_id("models/mine", tmp_path / "runs" / "run") is None
    assert hub_id("tiny-llama", tmp_path) is None
    assert hub_id("/somewhere/else", tmp_path) is None
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/mine", tmp_path / "elsewhere") is None


def test_all_parts_are_pushed_with_their_cards(hub, run, tmp_path):
    options = ["--policy", "me/policy", "--adapter", "me/adapter", "--drafter", "me/drafter", "--private"]
    found = runner.invoke(app, ["push", str(run), *options])
    assert found.exit_code == 0, found.output
    assert "drafter: https://hub/me/drafter" in found.output
    assert hub.made == {"me/policy": True, "me/adapter": True, "me/drafter": True}
    assert {"config.json", "model.safetensors", "README.md"} <= hub.files["me/policy"].keys()
    assert set(hub.files["me/drafter"]) == {"config.json", "model.safetensors", "README.md"}
    drafter = ModelCard(hub.files["me/drafter"]["README.md"].decode())
    assert drafter.data.base_model == "me/policy" and '"model": "me/drafter"' in drafter.text
    policy = ModelCard(hub.files["me/policy"]["README.md"].decode())
    assert (
        policy.data.base_model == "org/base"
        and policy.data.license == "apache-2.0"
        and "the card of the base" not in policy.text
    )
    adapter = ModelCard(hub.files["me/adapter"]["README.md"].decode())
    assert adapter.data.base_model == "org/base" and adapter.data.library_name == "peft"
    for name, data in hub.files["me/adapter"].items():
        (tmp_path / name).write_bytes(data)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.revision, config.task_type) == (
        "org/base",
        "0" * 40,
        "CAUSAL_LM",
    )
    assert load_file(tmp_path / "adapter_model.safetensors")


def refusal(status: int, text: str = "") -> HfHubHTTPError:
    return HfHubHTTPError(
        text,
        response=httpx.Response(status, request=httpx.Request("POST", "https://hub")),
        server_message=text,
    )


ERRORS = {
    "no rights": (refusal(403), "--policy me/policy: the token has no write access"),
    "a wrong token": (refusal(401), "hf auth login"),
    "something else": (refusal(400, "bad\nname"), "bad name"),
    "no network": (httpx.ConnectError("no route"), "the hub cannot be reached (no route)"),
    "offline": (
        OfflineModeIsEnabled("HF_HUB_OFFLINE is set"),
        "the hub cannot be reached (HF_HUB_OFFLINE is set)",
    ),
}


@pytest.mark.parametrize("error, said", ERRORS.values(), ids=ERRORS)
def test_what_the_hub_refuses_is_one_line(hub, run, error, said):
    hub.error = error
    found = runner.invoke(app, ["push", str(run), "--policy", "me/policy"])
    assert found.exit_code == 2 and said in found.stderr and len(found.stderr.strip().splitlines()) == 1
    assert "hf_secret" not in found.output


def test_nothing_is_sent_before_all_is_known_to_be_there(hub, run, tmp_path, monkeypatch):
    def said(*options: str, of=run) -> str:
        found = runner.invoke(app, ["push", str(of), *options])
        assert found.exit_code == 2 and len(found.stderr.strip().splitlines()) == 1, found.output
        return found.stderr

    assert "name a different one for each" in said("--policy", "me/x", "--drafter", "me/x")
    assert "--policy me//x" in said("--policy", "me//x")
    hub.public.add("me/x")
    assert "exists and is public" in said("--policy", "me/x", "--private")
    broken = tmp_path / "broken"
    (broken / "checkpoint" / "drafter").mkdir(parents=True)
    tiny_llama().config.save_pretrained(broken / "checkpoint" / "policy")
    (broken / "config.json").write_bytes((run / "config.json").read_bytes())
    hub.made.clear()
    assert "config.json: missing" in said("--policy", "me/x", "--drafter", "me/y", of=broken)
    assert "only runs with scale.lora have one" in said("--policy", "me/x", "--adapter", "me/y", of=broken)
    assert not hub.made
    monkeypatch.setattr(publishing.huggingface_hub, "get_token", lambda: None)
    assert "hf auth login, or set HF_TOKEN" in said("--policy", "me/x")
