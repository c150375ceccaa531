"""Published models by name: checked against timm's own list, downloaded as files only, each failure with a sentence."""

import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from dinov2.errors import CheckpointError
from dinov2.hub.open_weights import open_weights

STATE = {"cls_token": torch.ones(1, 1, 4)}


def sentence(name):
    with pytest.raises(CheckpointError) as caught:
        open_weights(name)
    return str(caught.value).removeprefix(f"{name}: ")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands for the network: gives the folder `tmp_path / <repo>` with the files that were asked for."""

    class Hub:
        requests = []
        failure = None

        def snapshot_download(self, repo, *, allow_patterns):
            if self.failure:
                raise self.failure
            self.requests.append(repo)
            return str(tmp_path / repo / ("bin" if "pytorch_model.bin" in allow_patterns else "safetensors"))

        def publish(self, repo, kind, name, state, config=None):
            folder = tmp_path / repo / kind
            folder.mkdir(parents=True, exist_ok=True)
            (tmp_path / repo / "safetensors").mkdir(exist_ok=True)
            save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)
            (folder / "config.json").write_text(config or '{"model_type": "dinov2"}')

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_model_of_the_hub_is_its_weights_and_config(hub):
    hub.publish("facebook/dinov2-small", "safetensors", "model.safetensors", STATE)
    weights = open_weights("hf:facebook/dinov2-small")
    assert (weights.path, weights.kind) == ("hf:facebook/dinov2-small", "Hugging Face model")
    assert weights.config == {"model_type": "dinov2"}
    assert torch.equal(weights.states[""]["cls_token"].read(), STATE["cls_token"])
    assert hub.requests == ["facebook/dinov2-small"]


def test_without_safetensors_the_file_of_torch_is_taken(hub):
    hub.publish("me/old", "bin", "pytorch_model.bin", STATE)
    assert list(open_weights("hf:me/old").states[""]) == ["cls_token"]
    hub.publish("me/none", "bin", "flax_model.msgpack", STATE)
    assert sentence("hf:me/none") == "'me/none' holds neither model.safetensors nor pytorch_model.bin"


def test_a_folder_may_stand_for_a_name(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    weights = open_weights(f"hf:{tmp_path}")
    assert (weights.path, weights.kind) == (f"hf:{tmp_path}", "model folder")


def test_a_model_of_timm_comes_from_where_timm_has_it(hub):
    hub.publish("timm/vit_small_patch14_dinov2.lvd142m", "safetensors", "model.safetensors", STATE, config="{}")
    for name in ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2.lvd142m"):
        weights = open_weights(f"timm:{name}")
        assert (weights.path, weights.kind, weights.config) == (f"timm:{name}", "timm model", None)
        assert torch.equal(weights.states[""]["cls_token"].read(), STATE["cls_token"])
    hub.publish("timm/vit_small_patch16_224.dino", "safetensors", "model.safetensors", STATE)
    open_weights("timm:vit_small_patch16_224_dino")  # its name in old versions
    assert hub.requests[-1] == "timm/vit_small_patch16_224.dino"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vit_smal_patch14_dinov2", "; nearest: vit_small_patch14_dinov2.lvd142m"),
        ("vit_large_patch16_dinov3.lvd1689", "; nearest: vit_large_patch16_dinov3.lvd1689m"),
        ("vit_small_patch14_dinov2.x", "; nearest: vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vits14_reg4.lvd142m", ""),
    ],
)
def test_a_wrong_name_of_timm_offers_the_nearest(hub, name, nearest):
    assert sentence(f"timm:{name}") == f"timm has no model '{name}'{nearest}"
    assert hub.requests == []


def test_models_of_timm_without_weights_on_the_hub():
    assert sentence("timm:vit_base_patch16_18x2_224") == "timm has this model but no weights for it"
    assert sentence("timm:vit_huge_patch14_gap_224.in1k_ijepa") == (
        "timm takes these weights from https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar; "
        "download that file, give its path"
    )


def test_names_that_cannot_be_are_refused_before_any_download(hub):
    for name in ("dinov2-small", "a/b/c", "/none", "~/none", "./none"):
        assert sentence(f"hf:{name}") == "is neither a folder nor a name as in hf:facebook/dinov2-small"
    assert hub.requests == []


def test_a_name_that_the_hub_cannot_have():
    assert sentence("hf:me/a--b") == ("is not a possible name of a model (Cannot have -- or .. in repo_id: 'me/a--b'.)")


def hub_error(kind):
    error = kind.__new__(kind)  # made by the library from a response of the server
    error.args = ("404 Client Error.\nmore",)
    return error


def test_failures_of_the_download(hub):
    hub.failure = hub_error(errors.RepositoryNotFoundError)
    assert sentence("hf:facebook/dinov2-smal") == (
        "Hugging Face has no model 'facebook/dinov2-smal'; nearest: facebook/dinov2-small; "
        "if it is a private one, log in with: hf auth login"
    )
    hub.failure = hub_error(errors.GatedRepoError)
    assert sentence("hf:facebook/dinov3-vits16-pretrain-lvd1689m") == (
        "is given out to those who accept its licence; do so at "
        "https://huggingface.co/facebook/dinov3-vits16-pretrain-lvd1689m, then log in with: hf auth login"
    )
    hub.failure = errors.LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nmore")
    assert sentence("timm:vit_small_patch14_dinov2") == (
        "cannot be downloaded (Got: ConnectError: Name or service not known); check the network, "
        "or copy the model folder here from elsewhere and give its path"
    )


@pytest.mark.parametrize(
    ("name", "package"), [("timm:vit_small_patch14_dinov2", "timm"), ("hf:me/mine", "huggingface_hub")]
)
def test_an_absent_package_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert sentence(name) == f"needs the package {package}, which is not installed; run: pip install {package}"
