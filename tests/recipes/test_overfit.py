"""Every method brings a tiny network to robust training accuracy that ordinary training lacks."""

import copy

import pytest
import toys

from robustify.threat import ThreatModel

THREAT = ThreatModel("Linf", 0.25)  # leaves ordinary training nothing

METHODS = {
    "pgd_at": {},
    "trades": {},
    "mart": {},
    "ard": {},
    "iad": {},
    "iad II": {"variant": "II"},
    "rslad": {},
    "adaad": {"adv_weight": 1.0},
    "adaiad": {"adv_weight": 900.0, "self_weight": 1.0, "temperature": 30.0},
    "mtard": {},
}
RECIPES = {"iad II": "iad", "adaiad": "adaad"}
# The published weights are a tenth of the others' losses; so many epochs need a rate to match.
RATES = {"rslad": 0.5, "mtard": 0.5}


@pytest.fixture(scope="module")
def standard():
    return toys.overfit("standard", toys.toy(make=toys.Wide), epochs=20, lr=0.05, threat=THREAT)


@pytest.fixture(scope="module")
def robust():
    return toys.overfit("pgd_at", toys.toy(make=toys.Wide), epochs=20, lr=0.05, threat=THREAT)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_toy_overfit(method, standard, robust):
    control, images, labels, _ = standard
    recipe = RECIPES.get(method, method)
    roles = toys.ROLES["robust and standard"] if method == "iad II" else toys.roles(recipe)
    trained = {"robust teacher": robust[0].student, "standard teacher": control.student}
    teachers = [copy.deepcopy(trained[role]) for role in roles]
    settings = {"lr": RATES.get(method, 0.05), "threat": THREAT, **METHODS[method]}
    student = toys.toy(seed=1, make=toys.Wide)
    objective, *_ = toys.overfit(recipe, student, teachers, epochs=20, **settings)
    assert toys.robust_accuracy(control.student, images, labels, THREAT) < 0.05
    least = 0.2 if method == "ard" else 0.35  # ARD learns from clean images: slower here
    assert toys.robust_accuracy(objective.student, images, labels, THREAT) > least
