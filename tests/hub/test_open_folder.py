"""Model folders and models in several files: as the libraries write them, and each thing that can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov2.errors import CheckpointError
from dinov2.hub.open_weights import open_weights

STATE = {f"layer.{index}.weight": torch.full((2, 3), float(index)) for index in range(4)}


def sentence(path):
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    return str(caught.value).removeprefix(f"{path}: ")


def same(state, expected):
    return state.keys() == expected.keys() and all(
        torch.equal(stored.read(), expected[name]) for name, stored in state.items()
    )


def write_parts(folder, *, suffix="safetensors", stem="model"):
    """Spread STATE over two files with an index, as Hugging Face does; returns the index."""
    names = sorted(STATE)
    parts = {f"{stem}-{number}-of-2.{suffix}": names[2 * number - 2 : 2 * number] for number in (1, 2)}
    for part, held in parts.items():
        tensors = {name: STATE[name] for name in held}
        save_file(tensors, folder / part) if suffix == "safetensors" else torch.save(tensors, folder / part)
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    path = folder / f"{stem}.{suffix}.index.json"
    path.write_text(json.dumps(index))
    return path


def change_index(path, **weight_map):
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("suffix", "stem", "kind"),
    [
        ("safetensors", "model", "safetensors file in 2 parts"),
        ("bin", "pytorch_model", "PyTorch file in 2 parts"),
    ],
)
def test_a_model_in_parts_opens_whole(tmp_path, suffix, stem, kind):
    index = write_parts(tmp_path, suffix=suffix, stem=stem)
    weights = open_weights(index)
    assert (weights.path, weights.kind, list(weights.states)) == (str(index), kind, [""])
    assert same(weights.states[""], STATE)
    folder = open_weights(tmp_path)
    assert (folder.path, folder.kind, folder.config) == (str(tmp_path), "model folder", None)
    assert same(folder.states[""], STATE)


def test_a_folder_gives_its_config_and_prefers_safetensors(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "patch_size": 14}')
    weights = open_weights(tmp_path)
    assert (weights.kind, weights.config) == ("Hugging Face folder", {"model_type": "dinov2", "patch_size": 14})
    assert same(weights.states[""], {"x": torch.zeros(1)})
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert same(open_weights(tmp_path).states[""], {"x": torch.ones(1)})
    (tmp_path / "config.json").write_text('{"architecture": "vit_small_patch14_dinov2"}')
    assert open_weights(tmp_path).kind == "timm folder"


def test_a_folder_that_transformers_has_saved_in_parts_opens_whole(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    parts = [load_file(part) for part in tmp_path.glob("*.safetensors")]
    assert len(parts) > 1
    weights = open_weights(f"hf:{tmp_path}")
    assert (weights.kind, weights.config["model_type"]) == ("Hugging Face folder", "dinov2")
    assert same(weights.states[""], {name: tensor for part in parts for name, tensor in part.items()})
    assert sum(stored.numel() for stored in weights.states[""].values()) == model.num_parameters()


def test_a_part_that_is_missing_is_named(tmp_path):
    index = write_parts(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    assert sentence(index) == (
        "1 of the 2 files that it lists are not in its folder (missing: model-2-of-2.safetensors); download them too"
    )


def test_a_damaged_part_is_named(tmp_path):
    index = write_parts(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").write_bytes(b"")
    assert sentence(index) == f"{tmp_path}/model-2-of-2.safetensors: is empty (0 bytes); download or save it again"


def test_a_tensor_that_its_part_lacks_is_named(tmp_path):
    index = write_parts(tmp_path)
    change_index(index, **{"layer.9.weight": "model-1-of-2.safetensors"})
    assert sentence(index) == (
        f"{tmp_path}/model-1-of-2.safetensors: lacks 1 tensors that model.safetensors.index.json expects in it "
        "(first: layer.9.weight); the two are not of one model, download both again"
    )


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", ""])
def test_parts_outside_the_folder_are_not_opened(tmp_path, place):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    index = write_parts(folder)
    change_index(index, x=place)
    assert sentence(index) == f"names the file '{place}', which is not in its own folder; it is not opened"


def test_a_part_that_holds_something_else_is_refused(tmp_path):
    index = write_parts(tmp_path, suffix="bin", stem="pytorch_model")
    part = tmp_path / "pytorch_model-2-of-2.bin"
    torch.save({"model": STATE}, part)
    assert sentence(index) == f"{part}: is not a part of a model: it holds model instead of tensors"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
         "download or save it again"),
        ("[]", "holds a list, not a JSON object; download or save it again"),
        ("{}", "is not an index of weights; it needs a 'weight_map' of tensor names to files"),
        ('{"weight_map": {"x": 1}}', "is not an index of weights; it needs a 'weight_map' of tensor names to files"),
    ],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path, text, expected):
    path = tmp_path / "model.safetensors.index.json"
    assert sentence(path) == "no such file of weights"
    path.write_text(text)
    assert sentence(path) == expected


def test_folders_without_weights(tmp_path):
    none = "is a folder without weights; a model folder holds config.json and model.safetensors (or pytorch_model.bin)"
    assert sentence(tmp_path) == none
    (tmp_path / "config.json").write_text("{}")
    assert sentence(tmp_path) == none
    torch.save(STATE, tmp_path / "teacher_checkpoint.pth")
    assert sentence(tmp_path) == "is a folder; give the file of weights in it: teacher_checkpoint.pth"


def test_the_folder_of_a_run_points_to_its_newest_checkpoint(tmp_path):
    for name in ("model_0000003.manifest.json", "model_0000011.manifest.json", "model_0000019.rank_0.pth"):
        (tmp_path / name).touch()
    assert sentence(tmp_path) == (
        f"is the folder of a training run; give one of its checkpoints, the newest is {tmp_path}/model_0000011"
    )
