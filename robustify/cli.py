"""The command line: parse, call, print. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustify import __version__, config
from robustify.errors import UsageError

if TYPE_CHECKING:
    from robustify.harden import Job
    from robustify.threat import Norm

    FloatType = click.ParamType[float]
    FloatsType = click.ParamType[tuple[float, ...]]
    IntOrTextType = click.ParamType[int | str]
else:  # before click 8.4 the class takes no parameters
    FloatType = FloatsType = IntOrTextType = click.ParamType


COLUMN = 30  # characters a column of text


class Eps(FloatType):
    """A number such as 8/255 or 0.03."""

    name = "eps"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """A float; raises `UsageError` through `parse_eps`."""
        from robustify.threat import parse_eps

        return parse_eps(value)


class EpsList(FloatsType):
    """Several of them, separated by commas."""

    name = "eps[,eps…]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Floats, in the order given."""
        return tuple(Eps().convert(part, param, ctx) for part in value.split(","))


class BatchSize(IntOrTextType):
    """A number of images, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """The number, or "auto"; raises `UsageError` for anything else."""
        text = str(value)
        if text == "auto":
            return text
        if text.isdecimal() and int(text) > 0:
            return int(text)
        raise UsageError(f"expected a batch size of at least 1, or auto, got {value!r}")


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
norm_option = click.option(
    "--norm", type=click.Choice(["Linf", "L2", "L1"]), help="Default: the data set's."
)
eps_option = click.option("--eps", type=Eps(), help="8/255 or 0.03. Default: the data set's.")
data_option = click.option(
    "--data",
    help="A name (digits, cifar10), a folder, shards ('{train,test}-*.tar'), a Hub dataset, or a "
    "stream of one (hfids:user/name, wds:URL). Default: digits.",
)
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), help="Evaluate on the first N test images."
)
suite_option = click.option(
    "--suite", default="fast", show_default=True,
    help="fast, standard, plus, rand, pgd, or attacks by name: apgd-ce,square.",
)  # fmt: skip
seed_option = click.option("--seed", type=int, default=0, show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="robustify")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def robustify(debug: bool) -> None:
    """Robust image classifiers: distil, evaluate, report.

    \b
    robustify distill --recipe peeraid --student resnet18
    robustify evaluate runs/peeraid-resnet18-digits/model.safetensors
    """


@robustify.command()
@click.option("--recipe", required=True, help="A name (see `robustify recipes list`) or a file.")
@click.option("--student", required=True, help="A timm name, hf-hub:…, folder or file.")
@click.option("--teacher", "teachers", multiple=True, help="As --student; may be repeated.")
@data_option
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/RECIPE-STUDENT-DATA.")
@click.option("--preset", help="A named schedule of the recipe; see `robustify recipes show`.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
@click.option(
    "--sweep", "sweeps", multiple=True, metavar="KEY=A,B,…",
    help="A run for every value of a setting; given again, for every combination.",
)  # fmt: skip
@click.option("--epochs", type=int)
@click.option("--batch-size", type=BatchSize(), help="Per process; auto finds one by trial.")
@click.option("--lr", type=float)
@seed_option
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16.")
@norm_option
@eps_option
@click.option("--train-limit", type=click.IntRange(min=1), help="Use N training images.")
@click.option("--image-size", type=click.IntRange(min=1), help="Resize images to this side.")
@suite_option
@limit_option
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after N steps of each stage.")
@click.option("--sync-bn", is_flag=True, help="BatchNorm statistics over all processes (GPUs).")
@click.option(
    "--compile/--no-compile", "compiled", default=False,
    help="torch.compile the attacked network; CUDA graphs on a GPU.",
)  # fmt: skip
@click.option(
    "--profile", "profiled", is_flag=True, help="Leave where a step's time goes, of every stage."
)
@click.option("--resume/--no-resume", default=True, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print what would happen, and how long it takes.")
@as_json
def distill(
    recipe: str,
    student: str,
    teachers: tuple[str, ...],
    data: str | None,
    out: Path | None,
    pairs: tuple[str, ...],
    sweeps: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a robust student by a recipe, evaluate it, leave a run folder.

    \b
    robustify distill --recipe peeraid --student resnet18
    robustify distill --recipe trades --student resnet18 --data ./photos --eps 4/255 --set beta=3
    robustify distill --recipe teacher_assistant --student resnet18 --sweep temperature=1,5,20,100
    """
    settings = config.overrides(pairs)
    for name in ("epochs", "batch_size", "lr"):
        if (value := options.pop(name)) is not None:
            settings[f"training.{name}"] = value
    from robustify import effort, harden, report

    if data is None:
        click.echo("no --data: using the bundled digits (1,797 real 8×8 images)", err=True)
    planned = partial(
        harden.plan, recipe, student, teachers=teachers, dataset=data or "digits", **options
    )
    if sweeps:
        _sweep(sweeps, settings, planned, out, resume=resume, dry_run=dry_run, as_json=as_json)
        return
    job = planned(settings=settings)
    if dry_run:
        click.echo(json.dumps(effort.dry_run(job), indent=2))
        return
    folder = harden.run(job, out, resume=resume)
    if not harden.is_first_process():
        return
    content = report.read(folder)
    click.echo(json.dumps(content, indent=2) if as_json else report.markdown(content))
    if not as_json:
        click.echo(f"{folder}: model.safetensors, report.html, report.md, report.json")


def _sweep(
    sweeps: tuple[str, ...],
    settings: dict[str, Any],
    planned: Callable[..., Job],
    out: Path | None,
    *,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """`distill --sweep`: what would be done, or do it and print the comparison."""
    from robustify import comparison, effort, harden, report, sweep

    jobs = sweep.plan(sweeps, settings, planned)
    if dry_run:
        found = [{"run": name, **effort.dry_run(job)} for name, job in jobs.items()]
        click.echo(json.dumps(found, indent=2))
        return
    folders = sweep.run(jobs, out, resume=resume)
    if not harden.is_first_process():
        return
    contents = {name: report.read(folder) for name, folder in folders.items()}
    if as_json:
        click.echo(json.dumps([{"run": n, **content} for n, content in contents.items()], indent=2))
        return
    click.echo(comparison.compare_markdown([*contents.values()], names=[*contents]))
    click.echo(f"{next(iter(folders.values())).parent}: comparison.html, comparison.md, the runs")


@robustify.command()
@click.argument("model")
@data_option
@suite_option
@norm_option
@click.option("--eps", type=EpsList(), help="8/255; several, 2/255,8/255, give a curve.")
@limit_option
@seed_option
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Default: what the device's memory allows."
)
@click.option(
    "--transfer-from", multiple=True, metavar="MODEL",
    help="Also try what PGD finds on this model; may be repeated.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Leave the report there; an interrupted evaluation continues from what is there.",
)  # fmt: skip
@click.option(
    "--fail-under", type=float, metavar="FRACTION",
    help="Exit with 3 if the robust accuracy is below this, or the verdict is not `reliable`.",
)  # fmt: skip
@as_json
@click.pass_context
def evaluate(
    context: click.Context,
    model: str,
    data: str | None,
    suite: str,
    norm: Norm | None,
    eps: tuple[float, ...] | None,
    limit: int | None,
    seed: int,
    batch_size: int | None,
    transfer_from: tuple[str, ...],
    out: Path | None,
    fail_under: float | None,
    as_json: bool,
) -> None:
    """Clean and robust accuracy of any classifier.

    \b
    robustify evaluate runs/peeraid-resnet18-digits/model.safetensors
    robustify evaluate hf-hub:user/repo --data ./photos --eps 4/255 --limit 500
    """
    from robustify import report
    from robustify.examine import examine

    content = examine(
        model, dataset=data, suite=suite, norm=norm, eps=eps or (), limit=limit, seed=seed,
        batch_size=batch_size, transfer_from=transfer_from, out=out,
    )  # fmt: skip
    if content is None:  # another process of this evaluation prints it
        return
    click.echo(json.dumps(content, indent=2) if as_json else report.markdown(content))
    believed = content["verdict"]["status"] == "reliable"
    if fail_under is not None and (content["robust_accuracy"] < fail_under or not believed):
        context.exit(3)


@robustify.command()
@click.argument("purifier")
@click.argument("classifier")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@data_option
@suite_option
@norm_option
@eps_option
@limit_option
@seed_option
@as_json
def attach(purifier: str, classifier: str, out: Path, as_json: bool, **options: Any) -> None:
    """Put a distilled purifier before any classifier; evaluate the pair end to end.

    \b
    robustify attach runs/purifier-model-digits another/model.safetensors --out purified
    robustify attach purifier.safetensors hf-hub:user/repo --data ./photos --out purified
    """
    from robustify import report
    from robustify.attachment import attach as join
    from robustify.harden import is_first_process

    folder = join(purifier, classifier, out, dataset=options.pop("data"), **options)
    if not is_first_process():
        return
    content = report.read(folder)
    click.echo(json.dumps(content, indent=2) if as_json else report.markdown(content))
    if not as_json:
        click.echo(f"{folder}: purifier.safetensors, classifier/, report.md, report.json")


@robustify.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write a comparison here, as HTML.")
@click.option(
    "--robustbench", type=click.Path(path_type=Path), metavar="FILE",
    help="Write the run's entry for RobustBench here; refused unless everything is as theirs.",
)  # fmt: skip
@click.option("--additional-data", is_flag=True, help="The entry: more than the training images.")
@click.option(
    "--paper", "paper", multiple=True, metavar="KEY=VALUE",
    help="The entry: name, authors, link, venue or footnote.",
)  # fmt: skip
@as_json
def rebuild_report(
    folders: tuple[Path, ...],
    out: Path | None,
    robustbench: Path | None,
    additional_data: bool,
    paper: tuple[str, ...],
    as_json: bool,
) -> None:
    """Rebuild the pages of one run from its report.json, or compare several runs.

    \b
    robustify report runs/peeraid-resnet18-digits
    robustify report runs/* --out comparison.html
    robustify report runs/mine --robustbench Mine2026.json --paper authors="A, B"
    """
    from robustify import comparison, report
    from robustify.files import atomic_write

    contents = [report.read(folder) for folder in folders]
    if robustbench is not None:
        from robustify.robustbench import export

        if len(contents) > 1:
            raise UsageError(f"expected one folder with --robustbench, got {len(contents)}")
        entry = export(contents[0], paper, additional_data=additional_data)
        atomic_write(robustbench, json.dumps(entry, indent=2) + "\n")
        click.echo(json.dumps(entry, indent=2) if as_json else robustbench)
        return
    if as_json:
        click.echo(json.dumps(contents if len(contents) > 1 else contents[0], indent=2))
        return
    if len(contents) == 1:
        report.rebuild(folders[0])
        click.echo(report.markdown(contents[0]))
        return
    names = [folder.name for folder in folders]
    if out is not None:
        atomic_write(out, comparison.compare_html(contents, names=names))
    click.echo(comparison.compare_markdown(contents, names=names))


@robustify.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="USER/REPO")
@click.option("--public", is_flag=True, help="Let everybody read it. Default: private.")
@click.option("--revision", help="A branch, created if there is none. Default: main.")
@click.option("--dry-run", is_flag=True, help="Show files and model card; send nothing.")
@as_json
def push(
    folder: Path, repository: str, public: bool, revision: str | None, dry_run: bool, as_json: bool
) -> None:
    """Upload a run folder with its model card to the Hub, in one commit; print the address.

    \b
    robustify push runs/peeraid-resnet18-digits user/repo --dry-run
    robustify push runs/peeraid-resnet18-digits user/repo
    """
    from robustify import hub

    upload = hub.prepare(folder, repository)
    click.echo(_listed(upload.files, upload.left, upload.own_card), err=as_json or not dry_run)
    if dry_run:
        click.echo(json.dumps(hub.described(upload), indent=2) if as_json else f"\n{upload.card}")
        return
    pushed = hub.send(upload, public=public, revision=revision)
    if not pushed.changed:
        click.echo("nothing to change: the Hub has these files already", err=True)
    if pushed.private and public:
        click.echo(f"{repository} was there before and stays private", err=True)
    click.echo(json.dumps(hub.described(upload, pushed), indent=2) if as_json else pushed.address)


def _listed(files: dict[str, int], left: tuple[str, ...], own_card: bool) -> str:
    """What is sent, with its sizes, and what is not."""
    from tabulate import tabulate

    card = "as it is in the folder" if own_card else "the model card, from report.json"
    rows = [
        (name, f"{size:,} bytes", card if name == "README.md" else "")
        for name, size in files.items()
    ]
    rows.append((f"{len(files)} files", f"{sum(files.values()):,} bytes", ""))
    stays = f"\nnot sent: {', '.join(left)}" if left else ""
    return tabulate(rows, tablefmt="plain", colalign=("left", "right", "left")) + stays


@robustify.command()
@as_json
def doctor(as_json: bool) -> None:
    """What this machine can do: devices, versions, caches, whether a token is there.

    \b
    robustify doctor
    """
    from tabulate import tabulate

    from robustify.examine import diagnose_machine

    found = diagnose_machine()
    click.echo(json.dumps(found, indent=2) if as_json else tabulate(found.items()))


@robustify.group()
def recipes() -> None:
    """The recipes: list, show, copy, check."""


@recipes.command("list")
@as_json
def list_recipes(as_json: bool) -> None:
    """Every recipe: idea, paper, cost per step, the teachers it needs, measured numbers.

    \b
    robustify recipes list
    """
    from tabulate import tabulate

    cards = [config.find(name).card for name in config.names()]
    if as_json:
        click.echo(json.dumps(cards, indent=2))
        return
    widths = [None, *[COLUMN] * len(config.ABOUT)]
    click.echo(tabulate(cards, headers="keys", tablefmt="simple_grid", maxcolwidths=widths))


@recipes.command("show")
@click.argument("name")
@as_json
def show_recipe(name: str, as_json: bool) -> None:
    """What a recipe is and needs, its presets, and its YAML file with every setting.

    \b
    robustify recipes show peeraid
    """
    from tabulate import tabulate

    found = config.find(name)
    card = {**found.card, "presets": ", ".join(found.presets) or "none"}
    if as_json:
        sections = {**found.sections, "presets": dict(found.presets)}
        click.echo(json.dumps({**found.card, **sections}, indent=2))
        return
    widths = [None, 2 * COLUMN + 16]
    click.echo(tabulate(card.items(), tablefmt="plain", maxcolwidths=widths))
    click.echo()
    if found.path is None:
        click.echo("no YAML file: its settings are the keyword arguments of its `stages`")
    else:
        click.echo(found.path.read_text(encoding="utf-8"), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("path", required=False, type=click.Path(path_type=Path))
def copy_recipe(name: str, path: Path | None) -> None:
    """Copy a recipe's YAML file, to be changed and run by path.

    \b
    robustify recipes copy peeraid mine.yaml
    robustify distill --recipe mine.yaml --student resnet18
    """
    from robustify.files import atomic_write

    found = config.find(name)
    target = path or Path(f"{found.name}.yaml")
    if target.exists():
        raise UsageError(f"expected a new file, but {target} exists; name another")
    text = found.path.read_text(encoding="utf-8") if found.path else ""
    atomic_write(target, f"recipe: {found.name}\n{text}")
    click.echo(target)


@recipes.command("check")
@click.argument("file")
def check_recipe(file: str) -> None:
    """Check a recipe file: every section and preset against what its method takes.

    \b
    robustify recipes check mine.yaml
    """
    from robustify.harden import check_recipe as check

    found = config.find(file)
    presets = check(found)
    click.echo(f"{file}: {found.name}, presets {', '.join(presets) or 'none'}: all settings fit")
