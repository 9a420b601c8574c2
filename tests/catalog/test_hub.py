"""`hf://` locations, through huggingface_hub's own client, against a server that speaks the hub's endpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from sae_models import load
from steer_server.catalog import CatalogError, resolve_location
from tests.catalog.hub_server import served
from tests.sae_models.build import build_sae

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "sae_models" / "fixtures"
SHIPPED = ROOT / "sae_models" / "pretrained" / "smollm2-135m-l15"


def refused(location, *says, **options):
    with pytest.raises(CatalogError) as caught:
        resolve_location(location, **options)
    for part in says:
        assert part in str(caught.value)


def snapshot(commit, repo="org/sae"):
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def test_the_shipped_sae_from_the_hub_is_the_shipped_sae(hub):
    commit = hub.publish("org/sae", SHIPPED)
    path = resolve_location("hf://org/sae")
    assert path == str(snapshot(commit))
    assert load(path).sha256 == load(SHIPPED).sha256
    assert hub.downloads() == ["cfg.json", "sae_weights.safetensors"]


def test_only_what_is_needed_is_downloaded_weights_last(hub, tmp_path):
    build_sae(tmp_path / "repo" / "a" / "l1")
    build_sae(tmp_path / "repo" / "a" / "l2")
    for name in ("a/l1/sparsity.safetensors", "a/l1/README.md", "a/l1/features.sqlite", "a/l1/x.pt", "a/config.json"):
        (tmp_path / "repo" / name).write_bytes(b"{}")
    (tmp_path / "repo" / "a" / "l1" / "big_config.json").write_bytes(b" " * (2 << 20))
    commit = hub.publish("org/sae", tmp_path / "repo")
    assert resolve_location("hf://org/sae/a/l1?k=3") == f"{snapshot(commit) / 'a/l1'}?k=3"
    assert hub.downloads() == ["a/l1/cfg.json", "a/config.json", "a/l1/sae_weights.safetensors"]
    resolve_location("hf://org/sae/a/l1/")
    assert len(hub.downloads()) == 3, "downloaded again"


@pytest.mark.parametrize(
    ("files", "path", "place", "downloaded"),
    [
        (
            ["layer_3.safetensors", "layer_4.safetensors", "config.yaml", "features/0.bin"],
            "layer_4.safetensors", "layer_4.safetensors", ["config.yaml", "layer_4.safetensors"],
        ),
        (["layer_4.safetensors"], "layer_4", "layer_4.safetensors", ["layer_4.safetensors"]),
        (
            ["W_enc_0.safetensors", "W_dec_0.safetensors", "W_enc_1.safetensors", "W_dec_1.safetensors", "config.yaml"],
            "W_enc_1.safetensors", "W_enc_1.safetensors", ["config.yaml", "W_dec_1.safetensors", "W_enc_1.safetensors"],
        ),
        (
            ["L3R/hyperparams.json", "L3R/checkpoints/step1.safetensors", "L3R/checkpoints/final.safetensors"],
            "L3R", "L3R", ["L3R/hyperparams.json", "L3R/checkpoints/final.safetensors"],
        ),
        (
            ["layer_1/width_16k/average_l0_9/params.npz", "layer_1/width_16k/average_l0_80/params.npz"],
            "layer_1/width_16k/average_l0_9", "layer_1/width_16k/average_l0_9",
            ["layer_1/width_16k/average_l0_9/params.npz"],
        ),
        (
            ["cfg.json", "sae_weights.safetensors", "activation_whitening.safetensors", "activation_scaler.json"],
            "", "",
            ["activation_scaler.json", "cfg.json", "activation_whitening.safetensors", "sae_weights.safetensors"],
        ),
    ],
    ids=["circuit-tracer", "without its ending", "clt", "llama scope", "gemma scope", "whitening"],
)  # fmt: skip
def test_layouts_of_the_families(hub, files, path, place, downloaded):
    commit = hub.publish("org/sae", {name: name.encode() for name in sorted(files)})
    assert resolve_location(f"hf://org/sae/{path}") == str(snapshot(commit) / place)
    assert hub.downloads() == downloaded


def test_a_published_layout_loads(hub):
    """What SAELens wrote, from a folder of a repository."""
    case = FIXTURES / "sae_lens" / "jumprelu"
    commit = hub.publish("org/sae", case)
    path = resolve_location("hf://org/sae/blocks.3.hook_resid_post")
    assert path == str(snapshot(commit) / "blocks.3.hook_resid_post")
    assert load(path).sha256 == load(case / "blocks.3.hook_resid_post").sha256


def test_a_revision_is_pinned_to_a_commit(hub, tmp_path):
    first = hub.publish("org/sae", build_sae(tmp_path / "1", seed=1))
    second = hub.publish("org/sae", build_sae(tmp_path / "2", seed=2))
    third = hub.publish("org/sae", build_sae(tmp_path / "3", seed=3), branch="refs/pr/1")
    hub.refs["org/sae", "v1.0"] = first
    assert resolve_location("hf://org/sae") == str(snapshot(second))
    assert resolve_location("hf://org/sae@v1.0") == str(snapshot(first))
    assert resolve_location(f"hf://org/sae@{first}") == str(snapshot(first))
    asked = [line for line in hub.requests if "/resolve/" in line]
    assert all(f"/resolve/{first}/" in line or f"/resolve/{second}/" in line for line in asked), (
        "a branch was asked for"
    )
    refused("hf://org/sae@v2.0", "org/sae has no revision 'v2.0'")
    refused(f"hf://org/sae@{'0' * 40}", "has no revision")
    assert third not in {commit.name for commit in snapshot("x").parent.iterdir()}


def test_offline_with_a_cache(hub, offline, tmp_path):
    commit = hub.publish("org/sae", {f"a/{p.name}": p.read_bytes() for p in build_sae(tmp_path / "s").iterdir()})
    online = resolve_location("hf://org/sae/a")
    offline()
    hub.requests.clear()
    assert resolve_location("hf://org/sae/a") == online
    assert resolve_location(f"hf://org/sae/a@{commit}") == online
    assert hub.requests == []
    refused("hf://org/sae/b", "HF_HUB_OFFLINE is set", "does not hold it", "give a folder of this machine")


def test_offline_without_a_cache(hub, offline):
    offline()
    says = ("HF_HUB_OFFLINE is set", constants.HF_HUB_CACHE, "give a folder of this machine")
    refused("hf://org/sae", *says)
    refused(f"hf://org/sae@{'0' * 40}", *says)
    assert hub.requests == []


def test_an_interrupted_download_is_not_taken_for_an_sae(hub, offline, tmp_path):
    commit = hub.publish("org/sae", build_sae(tmp_path / "s"))
    whole = dict(hub.commits["org/sae", commit])
    del hub.commits["org/sae", commit]["sae_weights.safetensors"]
    refused("hf://org/sae", "there are no weights (.safetensors, .npz) in it; it holds: cfg.json")
    hub.commits["org/sae", commit] = whole
    hub.fails_on = "sae_weights.safetensors"
    refused("hf://org/sae", f"the hub ({constants.ENDPOINT}) does not give it", "403")
    offline()
    refused("hf://org/sae", "HF_HUB_OFFLINE is set")


def test_a_hub_that_is_down(hub, tmp_path, caplog):
    commit = hub.publish("org/sae", build_sae(tmp_path / "s"))
    online = resolve_location("hf://org/sae")
    hub.broken = True
    assert resolve_location("hf://org/sae") == online
    assert f"using the copy of commit {commit} in the cache" in caplog.text
    refused("hf://org/other", "does not give it", "503", "the cache")


def test_nothing_listens(hub, tmp_path, monkeypatch):
    hub.publish("org/sae", build_sae(tmp_path / "s"))
    online = resolve_location("hf://org/sae")
    with served(hub) as address:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert resolve_location("hf://org/sae") == online
    refused("hf://org/other", f"the hub ({address}) does not give it", "Connection refused")


def test_what_is_not_there(hub, tmp_path):
    build_sae(tmp_path / "repo" / "l1")
    hub.publish("org/sae", tmp_path / "repo")
    hub.publish("org/terms", tmp_path / "repo")
    hub.gated.add("org/terms")
    refused("hf://org/none", "there is no org/none, or it is private", "HF_TOKEN")
    refused("hf://org/terms", "org/terms is gated: accept its terms")
    refused("hf://org/sae/l2", "org/sae has neither a folder nor a file 'l2'")
    refused("hf://org/sae", "there are no weights", "no files")
    hub.publish("org/many", {f"layer_{i}.safetensors": b"" for i in range(12)})
    refused("hf://org/many", "12 files of weights; name one of them: layer_0.safetensors", "and 4 more")


@pytest.mark.parametrize(
    "location",
    [
        "hf://", "hf://org", "hf:///org/sae", "hf://org/sae/../../etc", "hf://org/sae/a/../b", "hf://org/sae/.git/config",
        "hf://org/sae//a", "hf://org/sae/a b", "hf://org/sae/a%2e%2e", "hf://org/sae@", "hf://org/sae@../main",
        "hf://org/sae@-main", "hf://org/sae@a@b", "hf://../sae", "hf://org/sae/a\n", "hf://org/sae/\\a",
        "hf://org/sae/" + "a/" * 600,
    ],
)  # fmt: skip
def test_names_that_are_none(hub, location):
    refused(location, "is not a place on the hub")
    assert hub.requests == []


@pytest.mark.parametrize("location", ["hf://or--g/sae", "hf://org/sae.git"])
def test_names_that_the_client_refuses(hub, location):
    refused(location, "repo_id" if "--" in location else "")
    assert hub.downloads() == []


def test_pickles_are_not_downloaded(hub):
    case = FIXTURES / "dictionary_learning" / "topk"
    commit = hub.publish("org/sae", case)
    folder = "resid_post_layer_3/trainer_0"
    for path in (folder, f"{folder}/ae.pt"):
        refused(f"hf://org/sae/{path}", "is a pickle", f"steer-server sae convert 'hf://org/sae/{path}@main' OUT")
    assert hub.downloads() == []
    assert resolve_location(f"hf://org/sae/{folder}", pickles=True) == str(snapshot(commit) / folder)
    assert hub.downloads() == [f"{folder}/config.json", f"{folder}/ae.pt"]


def test_links_out_of_the_cache_are_refused(hub, offline, tmp_path):
    commit = hub.publish("org/sae", build_sae(tmp_path / "s"))
    resolve_location("hf://org/sae")
    (tmp_path / "secret").write_text("{}")
    link = snapshot(commit) / "cfg.json"
    link.unlink()
    link.symlink_to(tmp_path / "secret")
    offline()
    refused("hf://org/sae", "cfg.json is a link that leads out of the hub's cache")


def test_as_an_operator_sets_it(hub, tmp_path):
    """Through the environment, and a command line that ends with a message."""
    hub.publish("org/sae", build_sae(tmp_path / "s"))
    environment = os.environ | {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HUB_CACHE": str(tmp_path / "other"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }

    def run(*command, **more):
        return subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            env=environment | more,
            check=False,
            cwd=tmp_path,
        )

    code = "import sys; from steer_server.catalog import find_sae; print(find_sae(sys.argv[1]).sha256)"
    expected = load(tmp_path / "s").sha256
    assert run("-c", code, "hf://org/sae").stdout.strip() == expected
    assert run("-c", code, "hf://org/sae", HF_HUB_OFFLINE="1").stdout.strip() == expected
    shown = run("-m", "steer_server.cli", "sae", "search", "hf://org/none", "sea", HF_HUB_OFFLINE="1")
    assert shown.returncode == 1
    assert "HF_HUB_OFFLINE is set" in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.stderr
