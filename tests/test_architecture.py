"""The order of the modules, and that every recipe has both of its files."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "robustify"
LEVELS = [
    {"errors", "memory"},
    {"processes"},
    {
        "noise",
        "losses",
        "files",
        "frozen",
        "balance",
        "images",
        "charts",
        "gallery",
        "verdict",
        "identity",
    },
    {"compilation"},
    {"remote", "transformers_config", "tables", "splits"},
    {"threat", "fusion", "sensitivity", "journal", "rendering", "schema", "architectures", "stems"},
    {"shards", "streams"},
    {"settings", "networks", "fold", "checkpoint", "sources", "readers", "plausible"},
    {"robustbench"},
    {"attacks", "data", "weights", "run_folder"},
    {"classifier", "probe", "course"},
    {"crafting", "capacity", "purifier", "transformers_networks", "features", "checks"},
    {"models", "diagnosis"},
    {"objective"},
    {"links"},
    {"chain"},
    {"recipes"},
    {"config", "selection", "averaging", "schedule", "weight_perturbation", "evaluation"},
    {"loader"},
    {"train"},
    {"fit"},
    {"report", "tiers", "batch_size", "profiling"},
    {"comparison", "examine", "card"},
    {"harden", "attachment", "hub"},
    {"effort", "sweep"},
    {"cli"},
    {"__main__"},
]


def level(module):
    noun = module.split(".")[1] if "." in module else "__init__"
    return next((i for i, nouns in enumerate(LEVELS) if noun in nouns), None)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robustify"):
            if node.module == "robustify":
                yield from (f"robustify.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("robustify."))


def test_imports_go_down_only():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module == "robustify.__init__":
            continue
        own = level(module)
        assert own is not None, f"{module} has no level"
        for name in imports(path):
            below = level(name)
            within = module.split(".")[1] == name.split(".")[1]
            if below is not None and not within and below >= own:
                upward.append(f"{module} -> {name}")
    assert upward == []


def test_every_recipe_is_one_python_file_and_one_yaml():
    code = {path.stem for path in (PACKAGE / "recipes").glob("*.py")} - {"__init__"}
    settings = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert code == settings
    assert len(code) >= 4
