"""Push and pull: the unmodified client of the Hub, in both of its generations, over HTTP against a
server on loopback, and what a person sees when that goes wrong.

The installed huggingface_hub always runs. The other generation runs where ROBUSTIFY_OTHER_HUB names
a folder that has it: pip install --target DIR "huggingface_hub>=1,<2".
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Hub, serving
from huggingface_hub import ModelCard

from robustify import evaluate, hub, models
from robustify.data import load as load_data
from robustify.data import to_float
from robustify.errors import ModelError, RunFolderError, UsageError
from robustify.purifier import Purified, Purifier
from robustify.report import read, write_report

TOKENS = {"hf_ann": "ann", "hf_bob": "bob"}
GENERATIONS = ["installed", "other"]


class Client:
    """A process with one generation of huggingface_hub, which runs commands against `hub`."""

    def __init__(self, hub, home, path):
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_XET": "1",  # its own protocol, to a store that only the real Hub has
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "5",
            "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        environment.pop("HF_HUB_OFFLINE", None)
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("hub_client.py")], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.hub = hub

    def ask(self, token="hf_ann", **what):
        """Exit code, stdout, stderr."""
        asked = {"environment": {"HF_TOKEN": token}, **what}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the client died"
        answer = json.loads(line)
        return answer["code"], answer["out"], answer["err"]

    def run(self, *command, token="hf_ann"):
        return self.ask(token, command=[str(word) for word in command])

    def python(self, code, token="hf_ann"):
        code, out, err = self.ask(token, python=code)
        assert code == 0, err
        return out

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def server():
    with serving(Hub(TOKENS)) as running:
        yield running


@pytest.fixture(scope="module", params=GENERATIONS)
def client(request, server, tmp_path_factory):
    path = os.environ.get("ROBUSTIFY_OTHER_HUB") if request.param == "other" else None
    if request.param == "other" and not path:
        pytest.skip("needs ROBUSTIFY_OTHER_HUB, a folder with another huggingface_hub")
    running = Client(server, tmp_path_factory.mktemp("home"), path)
    yield running
    running.close()


@pytest.fixture
def failing(server):
    """The server, whose failures end with the test."""
    server.requests.clear()
    yield server
    server.failures.clear()


@pytest.fixture
def repository(request):
    """A name of its own for every test and generation."""
    return f"ann/{zlib.crc32(request.node.nodeid.encode()):08x}"


def run_folder(path, classifier, about=None):
    """What `distill` leaves of a classifier, evaluated on 24 digits."""
    digits = load_data("digits", image_size=classifier.image_size)
    images, labels, _ = digits.test.take(24).__getitems__(range(24))
    models.save(classifier, path, {"recipe": "pgd_at", "data": "digits", **(about or {})})
    report = evaluate(classifier, to_float(images), labels, suite="fgsm", eps=0.05)
    described = {
        **models.describe(classifier), "weights_hash": models.weights_hash(classifier)
    }  # fmt: skip
    write_report(path, report, model=described, data=digits)
    (path / "robustify.json").write_text("{}\n")
    for secret in ("metrics.jsonl", "weights.pt", ".lock", "notes.txt"):
        (path / secret).write_text("not for others")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "last.safetensors").write_bytes(b"0" * 100)
    return path


def small(architecture="resnet20_cifar", **changes):
    torch.manual_seed(3)
    fitted = {"num_classes": 10, "in_chans": 1, "image_size": 8, "class_names": tuple("0123456789")}
    return models.create(architecture, **{**fitted, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("pushed") / "run", small())


SENT = ["README.md", "config.json", "model.safetensors", "report.html", "report.json", "report.md",
        "robustify.json"]  # fmt: skip


def one_line(err):
    lines = [line for line in err.splitlines() if line.startswith("robustify: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_the_two_generations_are_two(client, request):
    major = client.python("import huggingface_hub as h; print(h.__version__.split('.')[0])")
    installed = huggingface_hub.__version__.split(".")[0]
    assert (major.strip() == installed) == (request.node.callspec.params["client"] == "installed")


def test_everything_a_push_sends_comes_back(client, server, folder, repository):
    code, out, err = client.run("push", folder, repository)
    assert code == 0, err
    assert out == f"{server.url}/{repository}\n"
    there = server.contents(repository)
    assert sorted(there) == SENT
    assert server.repositories[repository].private
    assert "not sent: checkpoints/, metrics.jsonl, notes.txt, samples.jsonl, weights.pt" in err
    for name in SENT[1:]:
        assert there[name] == (folder / name).read_bytes()
        assert name in err
    fetched = client.python(
        "import huggingface_hub, pathlib, hashlib\n"
        f"for name in {SENT}:\n"
        f"    path = huggingface_hub.hf_hub_download({repository!r}, name)\n"
        "    print(name, hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest())"
    )
    assert fetched.split() == [w for n in SENT for w in (n, hashlib.sha256(there[n]).hexdigest())]


def test_evaluated_from_the_hub_it_has_the_numbers_of_its_report(client, folder, repository):
    assert client.run("push", folder, repository)[0] == 0
    code, out, err = client.run(
        "evaluate", f"hf-hub:{repository}", "--limit", 24, "--suite", "fgsm", "--eps", 0.05,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    got, expected = json.loads(out), read(folder)
    for key in ("clean_accuracy", "robust_accuracy", "interval", "n"):
        assert got[key] == expected[key]
    assert got["model"]["weights_hash"] == expected["model"]["weights_hash"]


@pytest.mark.parametrize(
    ("architecture", "size"), [("resnet20_cifar", 8), ("mobilenetv3_small_050", 72)]
)
def test_every_way_to_load_on_the_card_works(client, tmp_path, repository, architecture, size):
    """The card's own code, run as it stands there, gives the logits of the network."""
    classifier = small(architecture, image_size=size, mean=(0.3,), std=(0.25,))
    folder = run_folder(tmp_path / "run", classifier)
    assert client.run("push", folder, repository)[0] == 0
    blocks = re.findall(r"```python\n(.*?)```", hub.prepare(folder, repository).card, re.DOTALL)
    assert len(blocks) == (2 if architecture == "resnet20_cifar" else 3)
    pixels = torch.arange(size * size).view(1, 1, size, size) % 256
    with torch.no_grad():
        expected = classifier(pixels / 255)
    blocks[-1] += "logits = classifier(pixels / 255)\n"
    for block in blocks:
        out = client.python(
            "import torch\nfrom PIL import Image\n"
            f"pixels = torch.arange({size * size}).view(1, 1, {size}, {size}) % 256\n"
            "image = Image.fromarray(pixels[0, 0].byte().numpy())\n"
            f"{block}\nprint(logits.flatten().tolist())"
        )
        found = torch.tensor(json.loads(out.splitlines()[-1])).view(1, 10)
        assert torch.allclose(found, expected, atol=1e-5), block


def test_a_second_push_changes_nothing(client, server, folder, repository):
    first = json.loads(client.run("push", folder, repository, "--json")[1])
    commits, stored = dict(server.repositories[repository].commits), len(server.large)
    code, out, err = client.run("push", folder, repository, "--json")
    second = json.loads(out)
    assert code == 0
    assert first["changed"]
    assert not second["changed"]
    assert second["commit"] == first["commit"]
    assert "nothing to change" in err
    assert server.repositories[repository].commits == commits
    assert len(server.large) == stored


def test_a_push_is_one_commit(client, server, folder, repository):
    client.run("push", folder, repository)
    assert len(server.repositories[repository].commits) == 2  # the first one made the repository


def test_public_only_when_said(client, server, folder, repository):
    assert client.run("push", folder, repository, "--public")[0] == 0
    assert not server.repositories[repository].private
    (folder / "extra.json").write_text("{}")
    refused = [client.run("push", folder, repository, *more) for more in ((), ("--revision", "v2"))]
    (folder / "extra.json").unlink()
    for code, out, err in refused:
        assert code == 2
        assert "everybody can read" in one_line(err)
        assert out == ""
    assert "extra.json" not in server.contents(repository)
    assert set(server.repositories[repository].branches) == {"main"}


def test_a_branch_is_made_and_loads_by_its_name(client, server, folder, repository):
    code, out, _ = client.run("push", folder, repository, "--revision", "v2")
    assert (code, out) == (0, f"{server.url}/{repository}/tree/v2\n")
    assert sorted(server.contents(repository, "v2")) == SENT
    assert server.contents(repository, "main") == {}
    assert client.run("push", folder, repository, "--revision", "v2")[0] == 0
    found = client.python(
        f"import robustify; print(robustify.load('hf-hub:{repository}@v2').architecture)"
    )
    assert found == "resnet20_cifar\n"
    code, _, err = client.run("evaluate", f"hf-hub:{repository}@v3", "--data", "digits")
    assert code == 1
    assert "no such revision" in one_line(err)


def test_a_dry_run_asks_nobody(client, failing, folder, repository):
    code, out, err = client.run("push", folder, repository, "--dry-run", token=None)
    assert code == 0, err
    assert failing.requests == []
    for name in SENT:
        assert name in out
    assert f"{sum(hub.prepare(folder, repository).files.values()):,} bytes" in out
    assert "library_name: timm" in out  # the card, to be looked at
    assert not (folder / "README.md").exists()


def test_a_card_in_the_folder_is_sent_as_it_is(client, server, folder, repository, tmp_path):
    own = hub.prepare(folder, repository).card + "\nLook at the *digits*.\n"
    (folder / "README.md").write_text(own)
    code, _, err = client.run("push", folder, repository)
    (folder / "README.md").unlink()
    assert code == 0
    assert "as it is in the folder" in err
    assert server.contents(repository)["README.md"] == own.encode()


# What goes wrong, and what the person sees


def sees(client, *command, code=1, token="hf_ann"):
    found, out, err = client.run(*command, token=token)
    assert found == code, err
    assert out == ""
    return one_line(err)


def test_no_token_a_wrong_token_and_a_foreign_namespace(client, server, folder, repository):
    assert "no token was found" in sees(client, "push", folder, repository, token=None)
    assert "token is not valid" in sees(client, "push", folder, repository, token="hf_wrong")
    said = sees(client, "push", folder, repository, token="hf_bob")
    assert "could not push" in said
    assert "permission to write" in said
    assert repository not in server.repositories


def test_private_gated_and_missing_repositories(client, server, folder, repository):
    assert client.run("push", folder, repository)[0] == 0
    for token in (None, "hf_bob"):
        said = sees(client, "evaluate", f"hf-hub:{repository}", "--data", "digits", token=token)
        assert "no such repository, or it is private" in said
        assert "HF_TOKEN" in said
    missing = f"hf-hub:{repository}-missing"
    assert "no such repository" in sees(client, "evaluate", missing, "--data", "digits")
    said = sees(client, "evaluate", f"hf-hub:{repository}", "--data", "digits", token="hf_no")
    assert "token is not valid" in said
    server.repositories[repository].private = False
    server.repositories[repository].gated = True
    said = sees(client, "evaluate", f"hf-hub:{repository}", "--data", "digits", token="hf_bob")
    assert "access to it must be asked for" in said


def test_a_name_that_is_none(client):
    for name in ("hf-hub:a/b/c", "hf-hub:../..", "hf-hub:a b/c"):
        said = sees(client, "evaluate", name, "--data", "digits")
        assert "write it as user/repo" in said


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        ("POST /api/repos/create", 429, "too many requests: wait"),
        ("POST /api/repos/create", 500, "the Hub failed with status 500"),
        ("POST .*/commit/", 409, "being changed there at the same time"),
        ("POST .*/commit/", 404, "no such repository|status 404"),
        ("POST .*/commit/", 429, "too many requests: wait"),
        ("POST .*/commit/", 503, "the Hub failed with status 503"),
        ("POST .*/validate-yaml", 500, "the Hub failed with status 500"),
        ("POST .*/preupload/", 403, "permission to write"),
        ("POST .*/batch", 404, "no such repository|status 404"),
        ("PUT /lfs/", 403, "permission to write"),
    ],
)
def test_a_push_that_is_refused_says_so_and_can_be_repeated(
    client, failing, tmp_path, repository, request_, status, says
):
    folder = run_folder(tmp_path / "run", small(), {"case": repository})  # weights nobody has yet
    failing.fail(request_, status)
    said = sees(client, "push", folder, repository)
    assert any(word in said for word in says.split("|")), said
    assert f"could not push to {repository}" in said
    assert repository not in failing.repositories or failing.contents(repository) == {}
    assert client.run("push", folder, repository)[0] == 0
    assert sorted(failing.contents(repository)) == SENT


def test_a_connection_that_always_breaks(client, failing, tmp_path, repository):
    folder = run_folder(tmp_path / "run", small(), {"case": repository})
    failing.fail("POST .*/commit/", None, times=10)
    said = sees(client, "push", folder, repository)
    assert "the connection to" in said
    assert "run the same command again" in said
    assert failing.contents(repository) == {}


def test_a_connection_cut_in_the_middle_of_an_upload_is_taken_up_again(
    client, failing, tmp_path, repository
):
    folder = run_folder(tmp_path / "run", small(), {"case": repository})
    failing.fail("PUT /lfs/", None)
    code, _, err = client.run("push", folder, repository)
    assert code == 0, err
    assert "Retrying" in err
    assert [method for method, path in failing.requests if path.startswith("/lfs/")] == ["PUT"] * 2
    sent = failing.contents(repository)["model.safetensors"]
    assert sent == (folder / "model.safetensors").read_bytes()


def test_somebody_else_commits_meanwhile(client, failing, folder, repository):
    assert client.run("push", folder, repository)[0] == 0
    (folder / "extra.json").write_text("{}")
    there = failing.repositories[repository]

    def commit():
        there.commit("main", dict(there.commits[there.branches["main"]]))

    failing.fail("POST .*/preupload/", 200, before=commit)
    failing.failures[0][1] = 429  # once refused, asked again: by then the branch has moved
    said = sees(client, "push", folder, repository)
    (folder / "extra.json").unlink()
    assert "somebody else committed" in said


def test_what_was_fetched_once_is_there_without_the_hub(client, server, folder, repository):
    assert client.run("push", folder, repository)[0] == 0
    evaluate_it = ("evaluate", f"hf-hub:{repository}", "--limit", 8, "--suite", "fgsm")
    assert client.run(*evaluate_it)[0] == 0
    server.fail("api/models|resolve", 503, times=100)
    try:
        assert client.run(*evaluate_it)[0] == 0
        other = f"hf-hub:{repository}-never-fetched"
        assert "not in the cache, and the Hub failed" in sees(client, "evaluate", other)
    finally:
        server.failures.clear()


def test_without_a_network_the_answer_comes_at_once(folder, tmp_path):
    """A port where nobody listens stands for a machine without a network."""
    nobody = Hub({})
    with serving(nobody):
        pass
    client = Client(nobody, tmp_path, None)
    try:
        client.python("import robustify.models, robustify.examine, datasets")
        for command, says in (
            (("push", folder, "ann/new"), "the connection to http://127.0.0.1"),
            (("evaluate", "hf-hub:ann/new", "--data", "digits"), "not in the cache, and the"),
            (("evaluate", "resnet18.a1_in1k", "--data", "digits"), "not in the cache, and the"),
            (("evaluate", folder, "--data", "ann/pictures"), "or in its cache"),
        ):
            start = time.monotonic()
            said = sees(client, *command)
            assert says in said, said
            assert time.monotonic() - start < 8
    finally:
        client.close()


# The folder, before anything is sent


def test_a_folder_that_is_not_ready_is_refused(tmp_path):
    folder = run_folder(tmp_path / "run", small())
    for name in ("ann", "ann/a/b", "../x", "ann/..", "ann/a b"):
        with pytest.raises(UsageError, match="expected a repository"):
            hub.prepare(folder, name)
    with pytest.raises(RunFolderError, match="a folder that distill or attach left"):
        hub.prepare(tmp_path / "nowhere", "ann/x")
    other = small(num_classes=10, class_names=None)
    with torch.no_grad():
        other.module.conv1.weight.add_(1)
    models.save(other, folder)
    with pytest.raises(ModelError, match="to be about the weights beside it"):
        hub.prepare(folder, "ann/x")
    (folder / "report.json").unlink()
    with pytest.raises(RunFolderError, match="run robustify evaluate"):
        hub.prepare(folder, "ann/x")
    (folder / "model.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickle"):
        hub.prepare(folder, "ann/x")


def test_no_link_leads_out_of_the_folder(tmp_path):
    folder = run_folder(tmp_path / "run", small())
    (tmp_path / "secret.json").write_text("{}")
    (folder / "linked.json").symlink_to(tmp_path / "secret.json")
    upload = hub.prepare(folder, "ann/x")
    assert "linked.json" in upload.left
    assert "linked.json" not in upload.files


def test_paths_of_this_machine_are_mentioned_before_they_leave(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    hub.prepare(run_folder(tmp_path / "clean", small()), "ann/x")
    assert caplog.text == ""
    hub.prepare(run_folder(tmp_path / "run", small(), {"data": f"{tmp_path}/photos"}), "ann/x")
    assert f"model.safetensors: paths under {tmp_path} are in it" in caplog.text


def test_python_pushes_as_the_command_does(client, server, folder, repository):
    out = client.python(
        f"import robustify; print(robustify.push({str(folder)!r}, {repository!r}).address)"
    )
    assert out == f"{server.url}/{repository}\n"


def test_a_purified_model_goes_there_and_back(client, server, tmp_path, repository):
    torch.manual_seed(4)
    pair = Purified(Purifier(1, (8, 1)), small(), about={"recipe": "purifier", "data": "digits"})
    folder = tmp_path / "pair"
    models.save(pair, folder)
    digits = load_data("digits")
    images, labels, _ = digits.test.take(8).__getitems__(range(8))
    report = evaluate(pair, to_float(images), labels, suite="fgsm", eps=0.05)
    write_report(folder, report, model=models.describe(pair), data=digits)
    code, _, err = client.run("push", folder, repository)
    assert code == 0, err
    there = server.contents(repository)
    assert sorted(there) == ["README.md", "classifier/config.json", "classifier/model.safetensors",
                             "purifier.safetensors", "report.html", "report.json",
                             "report.md"]  # fmt: skip
    assert ModelCard(there["README.md"].decode()).data.library_name == "robustify"
    out = client.python(
        "import robustify, torch\n"
        f"pair = robustify.load('hf-hub:{repository}')\n"
        "images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "print(pair(images).flatten().tolist())"
    )
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.tensor(json.loads(out)).view(2, 10), pair.eval()(images))


def test_a_transformers_model_goes_there_and_back(client, tmp_path, repository):
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1],
                                         num_channels=1, num_labels=10)  # fmt: skip
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path / "theirs")
    processor = {"image_mean": [0.3], "image_std": [0.2], "size": {"shortest_edge": 32}}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    student = models.adapt(tmp_path / "theirs", num_classes=10, in_chans=1, image_size=32,
                           class_names=tuple("0123456789"))  # fmt: skip
    folder = run_folder(tmp_path / "run", student)
    code, _, err = client.run("push", folder, repository)
    assert code == 0, err
    assert "preprocessor_config.json" in err
    out = client.python(
        "import robustify, torch\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification as Auto\n"
        "images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))\n"
        f"ours = robustify.load('hf-hub:{repository}')\n"
        f"theirs = Auto.from_pretrained({repository!r}).eval()\n"
        "print(theirs(ours.normalize(images)).logits.equal(ours(images)))\n"
        "print(theirs.config.id2label[3])\n"
        f"print(*AutoImageProcessor.from_pretrained({repository!r}).image_mean)"
    )
    assert out.split() == ["True", "3", "0.3"]
