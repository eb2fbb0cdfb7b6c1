"""Settings: what YAML and --set may say, and what happens to everything else."""

from typing import Any

import pytest
import yaml

from robustify import config, harden
from robustify.errors import UsageError
from robustify.threat import Norm

EPS = 0.1


def schemas(recipe):
    return harden.schemas_of(config.find(recipe))


def resolve(recipe="trades", **kwargs):
    return config.resolve(config.find(recipe), schemas(recipe), eps=EPS, **kwargs)


@pytest.mark.parametrize("name", config.names())
def test_every_recipe_and_preset_fits_its_signature(name):
    recipe = config.find(name)
    assert harden.check_recipe(recipe) == list(recipe.presets)


@pytest.mark.parametrize("name", config.names())
def test_every_recipe_says_what_it_is(name):
    recipe = config.find(name)
    assert set(recipe.about) >= {"idea", "paper", "cost", "teachers"}
    assert f"--recipe {name}" in recipe.path.read_text()


def test_numbers_are_read_as_people_write_them():
    settings = {"training.lr": "1e-3", "step_size": "2/255", "beta": 3}
    resolved = resolve(settings=settings)
    assert resolved["training"]["lr"] == 1e-3
    assert resolved["attack"]["step_size"] == 2 / 255
    assert resolved["method"]["beta"] == 3.0
    assert isinstance(resolved["method"]["beta"], float)


def test_eps_in_a_setting_is_the_threat_models():
    assert resolve()["attack"]["step_size"] == pytest.approx(EPS / 4)
    assert resolve(settings={"step_size": "eps*2"})["attack"]["step_size"] == 2 * EPS


def test_a_preset_named_like_the_data_applies_by_itself():
    assert resolve(data_name="digits")["training"]["epochs"] == 12
    assert resolve(data_name="digits", preset="paper")["training"]["epochs"] == 76


@pytest.mark.parametrize(
    ("key", "near"),
    [("bta", "beta"), ("training.epocs", "training.epochs"), ("attack.step", "attack.steps")],
)
def test_a_misspelt_setting_is_refused_with_the_nearest(key, near):
    with pytest.raises(UsageError, match=f"did you mean '{near}'"):
        resolve(settings={key: 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", "much"), ("training.epochs", 1.5), ("detach_clean", 1), ("start", "anywhere")],
)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    with pytest.raises(UsageError, match=f"expected {key} to be"):
        resolve(settings={key: value})


def test_set_reads_plain_values():
    pairs = ["a=1", "b=x", "c=[1, 2]", "d=", "e=1e-3"]
    assert config.overrides(pairs) == {"a": 1, "b": "x", "c": [1, 2], "d": None, "e": "1e-3"}
    with pytest.raises(UsageError, match="expected --set key=value"):
        config.overrides(["beta"])


def test_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'peeraid'"):
        config.find("peerade")


def test_a_copied_yaml_runs_by_path(tmp_path):
    copied = tmp_path / "mine.yaml"
    copied.write_text("recipe: trades\nmethod: {beta: 2}\n")
    recipe = config.find(str(copied))
    assert recipe.name == "trades"
    assert config.resolve(recipe, schemas("trades"), eps=EPS)["method"] == {"beta": 2.0}


def test_a_recipe_of_ones_own_runs_by_path(tmp_path):
    source = config.folders()[0] / "trades.py"
    (tmp_path / "mine.py").write_text(source.read_text())
    (tmp_path / "mine.yaml").write_text("method: {beta: 2}\n")
    recipe = config.find(str(tmp_path / "mine.py"))
    assert recipe.sections["method"] == {"beta": 2}
    assert recipe.load().Trades.__name__ == "Trades"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "expected .* to hold a mapping"),
        ("recipe: trades\nmethods: {}\n", "did you mean 'method'"),
        ("recipe: nothing\n", "to say `recipe: NAME`"),
        ("a: [", "to be readable YAML"),
        ("!!python/object/apply:os.system ['true']", "to be readable YAML"),
        ("recipe: trades\ntraining: 5\n", "expected training to be a mapping, got 5"),
        ("recipe: trades\nattack: [1, 2]\n", "expected attack to be a mapping"),
        ("recipe: trades\nabout: x\n", "expected about to be a mapping"),
        ("recipe: trades\npresets: 3\n", "expected presets to be a mapping"),
        ("recipe: trades\npresets: {a: 3}\n", "expected presets.a to be a mapping, got 3"),
        ("recipe: trades\npresets: {a: {method: 3}}\n", "expected presets.a.method to be a map"),
        ("recipe: trades\npresets: {a: {methods: {}}}\n", "did you mean 'method'"),
    ],
)
def test_a_wrong_yaml_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        config.find(str(path))
    assert "\n" not in str(caught.value)


def test_yaml_files_hold_plain_values():
    for name in config.names():
        content = yaml.safe_load(config.find(name).path.read_text())
        assert isinstance(content, dict)


def test_a_parameter_without_annotation_takes_any_plain_value():
    def stages(student, teachers, *, weight=0.5, name: str = "a"):
        yield

    assert config.schema(stages) == {"weight": Any, "name": str}


@pytest.mark.parametrize(("key", "value"), [("training.lr", "1/0"), ("step_size", "eps/0")])
def test_a_division_by_zero_is_no_number(key, value):
    with pytest.raises(UsageError, match=f"expected {key} to be a number, got '{value}'"):
        resolve(settings={key: value})


@pytest.mark.parametrize(
    ("code", "says"), [("def stages(:\n", "SyntaxError"), ("import nonesuch\n", "nonesuch")]
)
def test_a_recipe_that_cannot_be_imported_is_refused_in_one_line(tmp_path, code, says):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UsageError, match=f"can be imported, but .*{says}") as caught:
        config.find(str(tmp_path / "broken.py")).load()
    assert "\n" not in str(caught.value)


def test_every_recipe_has_the_common_presets_and_may_add_to_them():
    for name in config.names():
        found = config.find(name)
        assert config.data_of(found, "imagenet") == {
            "image_size": 224, "norm": "Linf", "eps": pytest.approx(4 / 255)
        }  # fmt: skip
        resolved = config.resolve(found, harden.schemas_of(found), eps=4 / 255, preset="imagenet")
        assert resolved["training"]["optimizer"] == "adamw"
        if harden.schemas_of(found)["attack"]:
            assert resolved["attack"]["step_size"] == pytest.approx(2 / 3 * 4 / 255)
        else:
            assert resolved["attack"] == {}
    tiny = config.find("peeraid").presets["paper-tinyimagenet"]["method"]
    assert config.find("peeraid").presets["imagenet"]["method"] == tiny


def test_a_preset_that_says_something_else_about_the_data_is_refused(tmp_path):
    for said, message in (
        ("image_sise: 224", "did you mean 'data.image_size'"),
        ("norm: Linff", "expected data.norm to be one of Linf, L2, L1"),
        ("eps: [1]", "expected data.eps to be float"),
    ):
        mine = tmp_path / "mine.yaml"
        mine.write_text(f"recipe: trades\npresets: {{a: {{data: {{{said}}}}}}}\n")
        with pytest.raises(UsageError, match=message):
            harden.check_recipe(config.find(str(mine)))


def test_a_preset_decides_size_and_threat_model_unless_they_are_given():
    job = harden.plan("trades", "resnet18", preset="imagenet", dataset="digits", train_limit=20)
    assert job.dataset.image_size == 224
    assert str(job.threat) == "Linf 4/255"
    job = harden.plan("trades", "resnet18", preset="imagenet", image_size=32, eps=0.1)
    assert job.dataset.image_size == 32
    assert job.threat.eps == 0.1


def test_norms_are_those_of_threat_models():
    assert Norm == config.NORM
