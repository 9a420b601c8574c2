"""Locations of every kind: paths, options, and names of SAELens' releases."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from sae_models import load
from steer_server.catalog import CatalogError, find_sae, resolve_location, saelens_releases
from steer_server.catalog.hub import SCHEME, HubLocation
from tests.catalog.test_hub import FIXTURES, refused, snapshot
from tests.sae_models.build import build_sae
from tests.sae_models.conformance import assert_conforms, read

TABLE = {
    "gemma-scope-2b-pt-res-canonical": {
        "conversion_func": "gemma_2",
        "model": "gemma-2-2b",
        "repo_id": "google/gemma-scope-2b-pt-res",
        "saes": [
            {"id": "layer_20/width_16k/canonical", "path": "layer_20/width_16k/average_l0_71"},
            {"id": "layer_21/width_16k/canonical", "path": "layer_21/width_16k/average_l0_70"},
            {"id": "layer_3/width_16k/canonical", "path": "layer_3/width_16k/average_l0_71"},
        ],
    },
    "scaled": {
        "conversion_func": None,
        "model": "gpt2-small",
        "repo_id": "org/scaled",
        "saes": [{"id": "blocks.3.hook_resid_post", "path": "blocks.3.hook_resid_post", "norm_scaling_factor": 0.5}],
    },
    "clt": {
        "conversion_func": "mntss_clt_layer_transcoder",
        "model": "gemma-2-2b",
        "repo_id": "mntss/clt",
        "saes": [{"id": "layer_1", "path": 1}],
    },
    "odd": {"repo_id": "org/odd", "saes": [{"id": "a", "path": "../../secret"}]},
}


def install(monkeypatch, site: Path, table: str):
    """A package `sae_lens` with this table, which cannot be imported."""
    (site / "sae_lens").mkdir(parents=True)
    (site / "sae_lens" / "__init__.py").write_text("raise AssertionError('sae_lens was imported')")
    (site / "sae_lens" / "pretrained_saes.yaml").write_text(table)
    monkeypatch.syspath_prepend(str(site))
    saelens_releases._table.cache_clear()


@pytest.fixture
def releases(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", yaml.safe_dump(TABLE))
    yield
    saelens_releases._table.cache_clear()


def test_paths(tmp_path, monkeypatch):
    folder = build_sae(tmp_path / "a:b")
    link = tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_location("a:b") == str(folder)
    assert resolve_location("~/a:b") == str(folder)
    assert resolve_location("link") == str(link), "links lead to files without a name in a hub's cache"
    assert resolve_location("nowhere") == str(tmp_path / "nowhere")
    located = resolve_location("a:b?hook=blocks.1.hook_resid_post,model.layers.2&model=org/M")
    assert located == f"{folder}?hook=blocks.1.hook_resid_post,model.layers.2&model=org/M"
    assert [point.layer for point in load(located).hook_points] == [1, 2]
    assert load(resolve_location("a:b?model=with space%26%3F")).model_name == "with space&?"


def test_options_that_are_none():
    refused("a?k=0", "a: SAE option k='0' must be a whole number")
    refused("hf://org/sae?norn=3", "hf://org/sae: SAE option 'norn' is not known")


def test_a_release_is_found_on_the_hub(hub, releases):
    path = "layer_20/width_16k/average_l0_71"
    commit = hub.publish(
        "google/gemma-scope-2b-pt-res", {f"{path}/params.npz": b"20", f"{path[:-2]}9/params.npz": b"21"}
    )
    expected = str(snapshot(commit, "google/gemma-scope-2b-pt-res") / path)
    name = "gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical"
    assert resolve_location(name) == expected
    assert resolve_location(f"{name}@{commit}?k=3") == f"{expected}?k=3"
    assert hub.downloads() == [f"{path}/params.npz"]
    refused(f"{name}@v9", "google/gemma-scope-2b-pt-res has no revision 'v9'")


def test_what_the_names_of_a_repository_say_is_still_known_in_the_cache(hub, releases):
    """Gemma Scope keeps its model and hook point nowhere else."""
    expected = read(FIXTURES / "gemma_scope" / "res")
    hub.publish("google/gemma-scope-2b-pt-res", FIXTURES / "gemma_scope" / "res" / "gemma-scope-2b-pt-res")
    sae = load(resolve_location("gemma-scope-2b-pt-res-canonical:layer_3/width_16k/canonical"))
    assert (str(sae.hook_point), sae.model_name) == ("blocks.3.hook_resid_post", "google/gemma-2-2b")
    assert_conforms(sae, expected)


def test_a_scaling_factor_of_the_table_becomes_a_norm(hub, releases):
    expected = read(FIXTURES / "sae_lens" / "average")
    assert expected.metadata["norm_scaling_factor"] == "0.5"
    commit = hub.publish("org/scaled", FIXTURES / "sae_lens" / "average")
    located = resolve_location("scaled:blocks.3.hook_resid_post")
    assert located == f"{snapshot(commit, 'org/scaled')}/blocks.3.hook_resid_post?norm=8.0"
    assert_conforms(load(located), expected)
    assert resolve_location("scaled:blocks.3.hook_resid_post?norm=2").endswith("?norm=2.0"), "the operator's word wins"


def test_a_checkpoint_that_holds_its_factor_gets_none(hub, releases):
    hub.publish("org/scaled", FIXTURES / "sae_lens" / "average_folded")
    located = resolve_location("scaled:blocks.3.hook_resid_post")
    assert "?" not in located
    load(located)


def test_layers_of_cross_layer_transcoders(hub, releases):
    commit = hub.publish("mntss/clt", {"W_enc_1.safetensors": b"e", "W_dec_1.safetensors": b"d", "config.yaml": b"c"})
    assert resolve_location("clt:layer_1") == str(snapshot(commit, "mntss/clt") / "W_enc_1.safetensors")


def test_names_that_are_not_in_the_table(hub, releases):
    refused(
        "gemma-scope-2b-pt-res-canonicle:x", "no release 'gemma-scope-2b-pt-res-canonicle'; similar: gemma-scope-2b"
    )
    refused(
        "gemma-scope-2b-pt-res-canonical:layer_22/width_16k/canonical",
        "has no SAE 'layer_22/width_16k/canonical'; similar: layer_2",
    )
    refused("odd:a", "is not a place on the hub")
    assert hub.requests == []


def test_a_table_that_cannot_be_read(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "a: [")
    refused("scaled:x", "sae-lens has no readable pretrained_saes.yaml")


def test_without_the_package(monkeypatch):
    saelens_releases._table.cache_clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sae_lens" else found(name))
    refused("gemma-scope-2b-pt-res-canonical:x", "pip install --no-deps sae-lens")


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="the extra `saelens` is not installed")
def test_every_name_of_the_installed_table():
    saelens_releases._table.cache_clear()
    table = saelens_releases._table()
    assert len(table) > 150
    for release, entry in table.items():
        for sae in entry["saes"]:
            found = saelens_releases.released_sae(release, str(sae["id"]))
            assert HubLocation.parse(f"{SCHEME}{found.repo}/{found.path}").repo == entry["repo_id"]
    assert "sae_lens" not in sys.modules
    canonical = saelens_releases.released_sae("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    assert (canonical.repo, canonical.path) == ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")


def test_find_sae(hub, tmp_path):
    hub.publish("org/sae", build_sae(tmp_path / "s"))
    assert find_sae("hf://org/sae").sha256 == load(tmp_path / "s").sha256
    assert find_sae("smollm2-135m/l15").d_in == 576
    for name, says in (("hf://org/none", "there is no org/none"), ("nowhere", "no such file or folder")):
        with pytest.raises(CatalogError, match=says) as caught:
            find_sae(name)
        assert "is not one that ships (smollm2-135m/l12, smollm2-135m/l15)" in str(caught.value)


def test_a_configuration_that_is_not_sound_is_left_to_the_loader(hub, releases):
    for config in (b"[", json.dumps([1]).encode(), b'{"normalize_activations": true}'):
        hub.publish(
            "org/scaled", {"blocks.3.hook_resid_post/cfg.json": config, "blocks.3.hook_resid_post/w.npz": config}
        )
        assert "?" not in resolve_location("scaled:blocks.3.hook_resid_post")
