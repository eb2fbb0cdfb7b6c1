"""Files that a stranger made wrong: refused in one line, nothing run, nothing written outside."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from robustify import models
from robustify.cli import robustify
from robustify.errors import ModelError


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["ROBUSTIFY_TEST_TRACE"],)


def rewritten(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= changes.pop("pretrained_cfg", {})
    (folder / "config.json").write_text(json.dumps(config | changes))


def tensors(folder, change):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def a_pickle(folder):
    with open(folder / "model.safetensors", "wb") as file:
        pickle.dump(Payload(), file)


def a_torch_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save(Payload(), folder / "pytorch_model.bin")


def a_wrong_header_length(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def a_tensor_missing(folder):
    tensors(folder, lambda weights: weights.pop("conv1.weight"))


def an_extra_tensor(folder):
    tensors(folder, lambda weights: weights.update(stranger=torch.ones(1)))


def an_unknown_architecture(folder):
    rewritten(folder, architecture="os.system")


def weights_outside_the_folder(folder):
    rewritten(folder, pretrained_cfg={"file": "../outside/model.safetensors"})


def arguments_that_load_elsewhere(folder):
    rewritten(folder, model_args={"checkpoint_path": "../outside/model.bin"})


def an_index_that_leaves_the_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside" / "model.safetensors")
    index = {"weight_map": {"conv1.weight": "../outside/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_transformers_network_with_code_of_its_own(folder):
    code = {"AutoModelForImageClassification": "evil.Net"}
    config = {"model_type": "vit", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("import os; os.mkdir(os.environ['ROBUSTIFY_TEST_TRACE'])")
    tensors(folder, lambda weights: None)


WRONG = {
    a_pickle: "got a pickle",
    a_torch_pickle: "got a pickle",
    a_wrong_header_length: "damaged or cut short",
    a_tensor_missing: "missing 'conv1.weight'",
    an_extra_tensor: "extra 'stranger'",
    an_unknown_architecture: "to name an architecture",
    weights_outside_the_folder: "weights inside the folder",
    arguments_that_load_elsewhere: "may not set checkpoint_path",
    an_index_that_leaves_the_folder: "weights inside the folder",
    a_transformers_network_with_code_of_its_own: "never run",
}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("command", ["evaluate", "push"])
def test_it_is_refused(wrong, command, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTIFY_TEST_TRACE", str(tmp_path / "executed"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").mkdir()
    torch.manual_seed(0)
    made = models.create("resnet20_cifar", num_classes=10, in_chans=1, image_size=8)
    models.save(made, tmp_path / "model", {"data": "digits"})
    wrong(tmp_path / "model")
    before = contents(tmp_path)
    rest = ["ann/x"] if command == "push" else ["--data", "digits", "--limit", "4"]
    refused = CliRunner().invoke(robustify, [command, "model", *rest])
    assert isinstance(refused.exception, ModelError)
    assert refused.exception.exit_code == 1
    assert WRONG[wrong] in str(refused.exception)
    assert "\n" not in str(refused.exception)
    assert refused.stdout == ""
    assert contents(tmp_path) == before


def test_labels_that_do_not_fit_are_refused_with_both_lists(tmp_path):
    """Matched by name where names allow, shown where they do not."""
    names = [f"kind {i}" for i in range(10)]
    made = models.create("resnet20_cifar", num_classes=10, in_chans=1, image_size=8,
                         class_names=names)  # fmt: skip
    models.save(made, tmp_path / "other", {"data": "digits"})
    command = ["evaluate", str(tmp_path / "other"), "--suite", "fgsm", "--limit", "60", "--json"]
    refused = CliRunner().invoke(robustify, command)
    assert isinstance(refused.exception, ModelError)
    assert "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in str(refused.exception)
    assert "[kind 0, kind 1," in str(refused.exception)

    order = tuple("9876543210")
    made.class_names = tuple("0123456789")
    models.save(made, tmp_path / "same", {"data": "digits"})
    made.keep_classes([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    made.class_names = order
    models.save(made, tmp_path / "turned", {"data": "digits"})
    found = []
    for name in ("same", "turned"):
        done = CliRunner().invoke(robustify, ["evaluate", str(tmp_path / name), *command[2:]],
                                  catch_exceptions=False)  # fmt: skip
        found.append(json.loads(done.stdout))
    assert found[0]["clean_accuracy"] == found[1]["clean_accuracy"]
    assert found[0]["robust_accuracy"] == found[1]["robust_accuracy"]
    assert found[0]["model"]["weights_hash"] == found[1]["model"]["weights_hash"]
