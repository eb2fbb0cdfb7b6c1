"""What holds for every recipe, found by the folder listing: nothing here names one."""

import ast
import inspect
import re

import pytest
import torch
import toys
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from robustify import config
from robustify.data import Split
from robustify.errors import UsageError
from robustify.objective import Frozen, Objective
from robustify.recipes.pgd_at import PgdAt
from robustify.recipes.standard import Standard
from robustify.settings import Training
from robustify.train import Stage

NAMES = config.names()
# Whose YAML says which teachers it takes or trains, and nothing more about them.
PLAIN = [name for name in NAMES if toys.about(name)["teachers"] in toys.ROLES]
WITH_TEACHERS = [name for name in PLAIN if toys.roles(name)]
SOURCE = re.compile(r"(et al\.|[A-Z]\w+ and [A-Z]\w+),.{3,120}?\b(19|20)\d\d\b", re.DOTALL)
LONGEST = 140  # lines of code in a recipe: a screen for the method, one for its settings

every_recipe = pytest.mark.parametrize("name", NAMES)


def objectives(name, **kwargs):
    """A recipe's stages one after the other, in train mode."""
    for objective in toys.all_stages(name, **kwargs):
        yield objective.train()


def code_lines(path):
    """Lines that are neither blank, docstring nor import."""
    tree, skipped = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = path.read_text().splitlines()
    return sum(1 for i, line in enumerate(lines, 1) if line.strip() and i not in skipped)


@every_recipe
def test_a_recipe_is_one_screen_with_its_source(name):
    code, _ = config.folders()
    recipe = config.find(name)
    text = inspect.getdoc(recipe.load())
    assert recipe.about["paper"].startswith("none") or SOURCE.search(text), "no citation"
    assert re.search(r"^ +L\S* += ", text, re.MULTILINE), "no formula"
    assert code_lines(code / f"{name}.py") <= LONGEST
    assert toys.roles(name) is not None, f"expected teachers: one of {list(toys.ROLES)}"


@every_recipe
def test_no_function_is_longer_than_a_screen(name):
    code, _ = config.folders()
    for node in ast.walk(ast.parse((code / f"{name}.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@every_recipe
def test_file_and_signature_have_the_same_defaults(name):
    recipe = config.find(name)
    signature = inspect.signature(recipe.load().stages).parameters
    allowed = config.schema(recipe.load().stages)
    schemas = {"method": allowed, "attack": {}, "training": {}}
    only_method = config.Recipe(
        name, None, recipe.module, sections={"method": recipe.sections["method"]}
    )
    written = config.resolve(only_method, schemas, eps=0.1)["method"]
    assert written == {key: signature[key].default for key in written}


@every_recipe
def test_two_steps_train_the_student_and_nothing_frozen(name):
    images, labels, noise = toys.batch()
    for objective in objectives(name):
        objective.zero_grad()  # of an earlier stage
        frozen = toys.frozen(objective)
        before = [toys.snapshot(teacher) for teacher in frozen]
        student = toys.snapshot(objective.student)
        losses = toys.train(objective, [(images, labels, noise)] * 2)
        assert all(torch.tensor(losses).isfinite())
        for parameter in toys.parameters(objective.student):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
        assert sum(p.grad.abs().sum() for p in toys.parameters(objective.student)) > 0
        assert not toys.same(student, toys.snapshot(objective.student))
        for teacher, state in zip(frozen, before, strict=True):
            assert toys.same(state, toys.snapshot(teacher))
            assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
            assert not any(module.training for module in teacher.modules())


@every_recipe
def test_the_attack_leaves_no_trace(name):
    """Modes, gradients and flags as they were; BatchNorm moved by the loss's own forwards alone."""
    images, labels, noise = toys.batch()
    for objective in objectives(name, steps=9):
        modes = [m.training for m in objective.modules()]
        flags = [p.requires_grad for p in objective.parameters()]
        buffers = {k: v.clone() for k, v in objective.student.named_buffers()}
        generator = torch.get_rng_state()
        recorder = toys.Recorder(objective)
        terms = objective(images, labels, noise)
        assert all(p.grad is None for p in objective.parameters())
        assert [m.training for m in objective.modules()] == modes
        assert [p.requires_grad for p in objective.parameters()] == flags
        assert torch.equal(torch.get_rng_state(), generator)
        assert terms["loss"].requires_grad
        for key, value in objective.student.named_buffers():
            if key.endswith("num_batches_tracked"):
                assert value - buffers[key] <= 3
        assert all(not p.training for p in recorder.attacks())


@every_recipe
def test_adversarial_images_stay_inside(name):
    images, labels, noise = toys.batch()
    for objective in objectives(name, steps=4):
        recorder = toys.Recorder(objective)
        objective(images, labels, noise)
        assert len(recorder.attacks()) == (4 if hasattr(objective, "attack") else 0)
        for seen in recorder.outer():
            assert (seen.images - images).abs().max() <= toys.THREAT.eps + 1e-6
            assert seen.images.min() >= 0
            assert seen.images.max() <= 1
            assert not seen.images.requires_grad


@every_recipe
def test_an_image_twice_changes_no_loss(name):
    images, labels, noise = toys.batch(dtype=torch.float64)
    twice = torch.arange(6).repeat(2)
    pairs = zip(objectives(name), objectives(name), strict=True)
    for number, (one, two) in enumerate(pairs):
        single = one.double()(images, labels, noise)["loss"]
        double = two.double()(images[twice], labels[twice], noise[twice])["loss"]
        # A later stage reads running variances, which are unbiased and so know the batch size.
        assert torch.isclose(single, double, rtol=1e-3 if number else 1e-9)


@every_recipe
def test_the_same_noise_gives_the_same_bits_and_another_seed_another_attack(name):
    images, labels, noise = toys.batch()
    once, again, other = (toys.build(name) for _ in range(3))
    loss = once(images, labels, noise)["loss"]
    assert torch.equal(loss, again(images, labels, noise)["loss"])
    if hasattr(once, "attack"):
        assert not torch.equal(loss, other(images, labels, noise.fork(1))["loss"])


@every_recipe
@pytest.mark.parametrize("awp_gamma", [0.0, 0.01])
def test_the_loop_trains_it_and_takes_up_a_checkpoint(name, awp_gamma):
    """Two steps through the loop's own Stage equal one step, a checkpoint, and one more."""
    whole, first, rest = (stage(name, awp_gamma) for _ in range(3))
    fetched = list(whole.loader)
    for part in fetched:
        whole.step(part)
    first.step(fetched[0])
    rest.restore(*first.state())
    rest.step(fetched[1])
    assert toys.same(whole.objective.learned_state(), rest.objective.learned_state())
    optimized = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    held = {id(p) for teacher in toys.frozen(whole.objective) for p in teacher.parameters()}
    assert optimized
    assert not optimized & held
    saved = whole.objective.learned_state()
    for key, module in whole.objective.named_modules():
        if isinstance(module, Frozen):
            assert not any(k.startswith(f"{key}.") for k in saved)


def stage(name, awp_gamma):
    images, labels, _ = toys.batch(16)
    split = Split((images * 255).to(torch.uint8), labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = toys.build(name)
    return Stage(
        objective,
        split,
        split,
        number=0,
        settings=Training(epochs=2, batch_size=8, lr=0.05, awp_gamma=awp_gamma),
        threat=toys.THREAT,
        accelerator=Accelerator(
            cpu=True,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
        ),
        seed=0,
        policy="none",
    )


@pytest.mark.parametrize("name", PLAIN)
def test_missing_teachers_are_trained_first_and_then_frozen(name):
    kinds = {"robust teacher": PgdAt, "standard teacher": Standard}
    roles, trained = toys.roles(name), []
    for objective in toys.all_stages(name, teachers=[]):
        assert isinstance(objective, Objective)
        if objective.name in kinds:
            assert type(objective) is kinds[objective.name]
            trained.append(objective.student)
            with torch.no_grad():  # as training would
                objective.student.module.head.bias.fill_(len(trained))
        last = objective
    assert [kind for kind in kinds if kind in roles] == roles
    assert len(trained) == len(roles)
    held = [teacher.network for teacher in toys.frozen(last)]
    assert held == trained
    assert [t.module.head.bias[0].item() for t in held] == list(range(1, len(roles) + 1))
    assert last.student not in trained


@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_given_teachers_are_used_and_not_trained(name):
    teachers = [toys.toy(seed=10 + i) for i in range(len(toys.roles(name)))]
    (objective,) = toys.all_stages(name, teachers=teachers)
    assert [teacher.network for teacher in toys.frozen(objective)] == teachers


@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_a_teacher_named_by_its_architecture_alone_is_trained(name):
    unknown = toys.toy(about={"data": "digits"})
    first, *_ = toys.all_stages(name, teachers=[unknown])
    assert first.name == toys.roles(name)[0]
    assert first.student is unknown


@pytest.mark.parametrize("name", WITH_TEACHERS)
@pytest.mark.parametrize(
    ("unfit", "words"),
    [
        ({"classes": 7}, "10 classes, got toy_net for 7"),
        ({"class_names": list("bacdefghij")}, "class 0 is 'a', and 'b' for toy_net"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(name, unfit, words):
    student = toys.toy(class_names=list("abcdefghij"))
    teachers = [toys.toy(**unfit) for _ in toys.roles(name)]
    with pytest.raises(UsageError, match=words):
        toys.build(name, student, teachers)


@pytest.mark.parametrize("name", WITH_TEACHERS)
def test_more_teachers_than_the_recipe_has_use_for_are_refused(name):
    teachers = [toys.toy() for _ in range(len(toys.roles(name)) + 1)]
    with pytest.raises(UsageError, match="at most"):
        toys.build(name, teachers=teachers)
