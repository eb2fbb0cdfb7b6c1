"""The command line: what a person sees, above all when something is wrong."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from reports import minimal

from robustify import config
from robustify.__main__ import main

TINY = ["--student", "resnet20_cifar", "--max-steps", "2", "--limit", "20", "--suite", "pgd"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command line in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["robustify", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_code:
            main()
        captured = capsys.readouterr()
        return exit_code.value.code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder of two steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    command = [sys.executable, "-m", "robustify", "distill", "--recipe", "peeraid", *TINY]
    subprocess.run([*command, "--out", folder], check=True, env=environment(), timeout=300)
    return folder


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_distill_leaves_what_a_run_leaves(trained):
    left = {path.name for path in trained.iterdir()}
    assert left >= {
        "model.safetensors", "config.json", "robustify.json", "report.json", "report.md",
        "report.html", "samples.jsonl", "metrics.jsonl", "checkpoints",
    }  # fmt: skip
    report = json.loads((trained / "report.json").read_text())
    assert 0 <= report["robust_accuracy"] <= report["clean_accuracy"] <= 1
    assert report["n"] == 20
    record = json.loads((trained / "robustify.json").read_text())
    assert record["status"] == "finished"
    assert record["run"]["method"]["kd_weight"] == 2.5
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 20


def test_evaluate_gives_the_same_robust_accuracy_from_the_one_file(run, trained):
    expected = json.loads((trained / "report.json").read_text())
    code, out, _ = run(
        "evaluate", trained / "model.safetensors", "--limit", 20, "--suite", "pgd", "--json"
    )
    assert code == 0
    got = json.loads(out)
    for key in ("robust_accuracy", "clean_accuracy", "threat_model", "n"):
        assert got[key] == expected[key]


def test_a_finished_run_is_left_as_it_is(run, trained, caplog):
    before = (trained / "model.safetensors").read_bytes()
    code, out, _ = run("distill", "--recipe", "peeraid", *TINY, "--out", trained)
    assert code == 0
    assert "already finished" in caplog.text
    assert "Robust" in out
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_finished_run_is_evaluated_as_asked_and_trained_anew_as_asked(run, tmp_path, caplog):
    command = ("distill", "--recipe", "standard", *TINY, "--out", tmp_path / "run", "--json")
    assert run(*command)[0] == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, out, _ = run(*command, "--suite", "fgsm", "--limit", 12)
    assert code == 0
    assert "already trained" in caplog.text
    assert (json.loads(out)["suite"], json.loads(out)["n"]) == ("fgsm", 12)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert run(*command, "--no-resume", "--seed", 1)[0] == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != weights


def test_a_recipe_that_changed_is_another_run(run, tmp_path):
    from robustify.recipes import standard

    (tmp_path / "mine.py").write_text(Path(standard.__file__).read_text())
    command = ("distill", "--recipe", "mine.py", *TINY, "--out", tmp_path / "run")
    assert run(*command)[0] == 0
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "\nCHANGED = True\n")
    code, _, err = run(*command)
    assert code != 0
    assert "holds another run (contents.mine.py" in err


def test_evaluate_leaves_a_report_and_goes_on_from_it(run, trained, tmp_path):
    command = ("evaluate", trained, "--limit", 10, "--suite", "pgd", "--out", tmp_path / "e")
    first = run(*command, "--json")
    verdicts = list((tmp_path / "e").rglob("journal-0.jsonl"))
    assert len(verdicts) == 1
    lines = verdicts[0].read_text()
    assert run(*command, "--json")[1] == first[1] or first[0] == 0
    assert verdicts[0].read_text() == lines
    assert (tmp_path / "e" / "report.html").is_file()


def test_fail_under_sets_the_exit_code(run, trained):
    code, _, _ = run("evaluate", trained, "--limit", 5, "--suite", "pgd", "--fail-under", 0.0)
    assert code == 3  # plain PGD is never reliable


def test_several_eps_give_a_curve(run, trained):
    code, out, _ = run(
        "evaluate", trained, "--limit", 5, "--suite", "fgsm", "--eps", "0,8/255", "--json"
    )
    assert code == 0
    assert [point["eps_text"] for point in json.loads(out)["curve"]] == ["0", "8/255"]


def test_transfer_from_another_model_is_one_more_attack(run, trained, tmp_path):
    attacked = ("evaluate", trained, "--limit", 5, "--suite", "fgsm", "--json")
    code, out, _ = run(*attacked, "--transfer-from", trained / "model.safetensors")
    assert code == 0
    names = [row["name"] for row in json.loads(out)["attacks"]]
    assert names == ["fgsm", "transfer", "checks"]
    code, out, err = run(*attacked, "--transfer-from", tmp_path / "absent")
    assert code != 0
    assert not out
    assert err.count("\n") == 1
    assert "absent" in err


def test_an_entry_for_robustbench_is_refused_with_the_reason(run, trained, tmp_path):
    code, _, err = run("report", trained, "--robustbench", tmp_path / "entry.json")
    assert code != 0
    assert "expected data and norm of RobustBench" in err
    assert not (tmp_path / "entry.json").exists()


def test_an_entry_for_robustbench_is_written(run, tmp_path):
    content = minimal(10_000, 8500, 5000)
    content["data"]["name"], content["suite"] = "cifar10", "standard"
    content["threat_model"] = {"norm": "Linf", "eps": 8 / 255, "eps_text": "8/255"}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(content))
    code, out, _ = run(
        "report", folder, "--robustbench", "mine.json", "--paper", "authors=A, B", "--json"
    )
    assert code == 0
    entry = json.loads((tmp_path / "mine.json").read_text())
    assert json.loads(out) == entry
    assert (entry["autoattack_acc"], entry["authors"]) == ("50.00", "A, B")


def test_dry_run_says_what_would_happen_and_leaves_nothing(run, tmp_path):
    code, out, err = run("distill", "--recipe", "peeraid", *TINY, "--dry-run")
    assert code == 0
    assert "bundled digits" in err
    stage = json.loads(out)["stages"][0]
    assert stage["steps"] == 2
    # 10 attack steps of 2, two train passes of 3, the peer's 1 and 3: the specification's 30
    assert stage["student_forwards_per_step"] == pytest.approx(30, abs=1.5)
    assert not (tmp_path / "runs").exists()


def image_folder(path, classes=("cat", "dog")):
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for number in range(4):
                colour = (40 + 150 * label, 60, 20 * number)
                size = (20 + number, 24)
                Image.new("RGB", size, colour).save(path / split / name / f"{number}.png")
    return path


def wrong(tmp_path, trained, kind):
    """A wrong command line, and what its one line must say."""
    distill = ["distill", "--recipe", "peeraid", *TINY]
    file = tmp_path / "w.safetensors"
    if kind == "unknown recipe":
        return ["distill", "--recipe", "peerade", *TINY], "did you mean 'peeraid'"
    if kind == "misspelt setting":
        return [*distill, "--set", "temprature=3"], "did you mean 'method.temperature'"
    if kind == "missing file":
        return ["evaluate", file], "does not exist"
    if kind == "truncated":
        file.write_bytes((trained / "model.safetensors").read_bytes()[:1000])
        return ["evaluate", file], "w.safetensors"
    if kind == "pickle":
        (tmp_path / "w.pt").write_bytes(pickle.dumps({"weight": 1}))
        return ["evaluate", tmp_path / "w.pt"], "pickle"
    if kind == "one class":
        return [*distill, "--data", image_folder(tmp_path / "one", ["cat"])], "at least 2 classes"
    if kind == "corrupt image":
        folder = image_folder(tmp_path / "corrupt")
        (folder / "train" / "cat" / "1.png").write_bytes(b"not an image")
        return [*distill, "--data", folder], "1.png"
    if kind == "read-only":
        (tmp_path / "file").write_text("a file where a folder should be")
        return [*distill, "--out", tmp_path / "file" / "run"], "choose another --out"
    if kind == "another run":
        return [*distill, "--seed", "1", "--out", trained], "holds another run"
    if kind == "negative eps":
        return ["evaluate", trained, "--eps", "-1/255"], "expected eps >= 0"
    if kind == "unknown student":
        return ["distill", "--recipe", "peeraid", "--student", "resnet81"], "did you mean"
    if kind == "wrong classes":
        return ["evaluate", trained, "--data", image_folder(tmp_path / "two")], "classes"
    if kind == "unknown suite":
        return ["evaluate", trained, "--suite", "standart"], "did you mean 'standard'"
    if kind == "no number":
        return ["evaluate", trained, "--eps", "eight"], "expected a number such as 8/255"
    if kind == "another norm":
        return ["evaluate", trained, "--norm", "L2"], "expected --eps with --norm L2"
    if kind == "report of others":
        content = json.loads((trained / "report.json").read_text())
        content["model"]["weights_hash"] = "0" * 64
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "report.json").write_text(json.dumps(content))
        return ["evaluate", trained, "--out", tmp_path / "other"], "report of other weights"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["unknown recipe", "misspelt setting", "missing file", "truncated", "pickle", "one class",
     "corrupt image", "read-only", "another run", "negative eps", "unknown student",
     "wrong classes", "unknown suite", "no number", "another norm", "report of others"],
)  # fmt: skip
def test_a_wrong_command_gives_one_helpful_line(run, tmp_path, trained, kind):
    command, message = wrong(tmp_path, trained, kind)
    code, out, err = run(*command)
    lines = [line for line in err.splitlines() if line.startswith("robustify: ")]
    assert code in (1, 2)
    assert len(lines) == 1, err
    assert message in lines[0]
    assert "Traceback" not in err
    assert out == ""


def test_a_foreign_folder_is_not_written_to(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "precious.txt").write_text("mine")
    code, _, err = run("distill", "--recipe", "peeraid", *TINY, "--out", tmp_path / "photos")
    assert code == 1
    assert "precious.txt" in err
    assert (tmp_path / "photos" / "precious.txt").read_text() == "mine"


def test_two_runs_on_one_folder_are_refused(trained):
    import fcntl

    with open(trained / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "robustify", "distill", "--recipe", "peeraid", *TINY]
        second = subprocess.run(
            [*command, "--out", trained], env=environment(), capture_output=True, text=True
        )
    assert second.returncode == 1
    assert "in use by another robustify process" in second.stderr


def test_debug_shows_the_traceback(run):
    monkey = ["--debug", "evaluate", "nowhere.safetensors"]
    sys.argv = ["robustify", *monkey]
    with pytest.raises(Exception, match="does not exist"):
        main()


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["recipes", "list"],
                                     ["recipes", "show", "peeraid"]])  # fmt: skip
def test_nothing_heavy_is_imported_for_what_needs_nothing(command):
    script = (
        "import sys; sys.argv = ['robustify', *sys.argv[1:]]\n"
        "from robustify.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "heavy = {'torch', 'timm', 'accelerate', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, env=environment()
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_every_command_has_an_example_in_its_help(run):
    for command in (["distill"], ["evaluate"], ["recipes", "list"], ["recipes", "show"]):
        code, out, _ = run(*command, "--help")
        assert code == 0
        assert f"robustify {' '.join(command)} " in out.split("Options:")[0] + " "


def test_the_recipes_are_listed_as_people_read_them(run):
    code, out, _ = run("recipes", "list", "--json")
    assert code == 0
    assert {row["name"] for row in json.loads(out)} >= {"peeraid", "pgd_at", "standard", "trades"}


def test_a_recipe_says_what_it_is_and_what_it_needs(run, tmp_path):
    (tmp_path / "own.yaml").write_text("recipe: pgd_at\nabout: {measured: 70 % of 360 digits}\n")
    code, out, _ = run("recipes", "show", "rslad")
    assert code == 0
    first, rest = out.split("\n\n", 1)
    for words in ("rslad", "Zi et al.", "26 student forwards", "robust", "paper", "digits"):
        assert words in first
    assert rest == (config.folders()[1] / "rslad.yaml").read_text()
    card = json.loads(run("recipes", "show", "own.yaml", "--json")[1])
    assert card["measured"] == "70 % of 360 digits"
    assert card["idea"] == "not said"
    assert "70 % of 360 digits" in run("recipes", "show", "own.yaml")[1]
    for row in json.loads(run("recipes", "list", "--json")[1]):
        assert list(row) == ["name", *config.ABOUT]
        assert "not said" not in row.values()
    listed = run("recipes", "list")[1]
    assert all(f" {name} " in listed for name in config.names())


@pytest.mark.parametrize(("about", "said"), [("mesured: 1 %", "did you mean 'measured'"),
                                             ("measured: 3", "expected text")])  # fmt: skip
def test_what_a_recipe_says_of_itself_is_checked(run, tmp_path, about, said):
    (tmp_path / "own.yaml").write_text(f"recipe: pgd_at\nabout: {{{about}}}\n")
    code, _, err = run("recipes", "show", "own.yaml")
    assert code == 2
    assert said in err


def test_a_recipe_without_settings_of_its_own_is_shown(run, tmp_path):
    (tmp_path / "own.py").write_text("def stages(student, teachers):\n    yield\n")
    code, out, _ = run("recipes", "show", "own.py")
    assert code == 0
    assert "not measured" in out
    assert "no YAML file" in out
