"""Reports: what is valid, that every number arrives, that no string does harm, and how it looks."""

import copy
import json
import re
import shutil
import subprocess
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from reports import CLASSES, EVIL, Page, around, full, minimal

from robustify import charts, report
from robustify.comparison import compare_html, compare_markdown
from robustify.errors import RunFolderError
from robustify.schema import validate


def numbers(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def coordinates(page):
    kept = {"x", "y", "x1", "x2", "y1", "y2", "width", "height", "points", "d"}
    return " ".join(value for name, value in page.attributes if name in kept and value)


@pytest.mark.parametrize("make", [report.markdown, lambda c: Page(report.html(c)).text])
def test_every_number_of_the_json_is_in_the_report(make):
    content = json.loads(json.dumps(full()))
    text = make(content)
    shown = {
        key: content[key] for key in content if key not in ("schema", "gallery", "threat_model")
    }
    missing = []
    for value in numbers(shown):
        forms = {report.percent(value), f"{100 * value:.1f} to", f"to {100 * value:.1f} %",
                 f"{value:g}", f"{value:.6g}", f"{value:,}", f"{value:,.1f}",
                     f"{value:,.0f}"}  # fmt: skip
        if not any(form in text for form in forms):
            missing.append(value)
    assert missing == []
    assert "8/255" in text


def test_only_required_keys_are_enough():
    content = minimal()
    validate(content)
    page = Page(report.html(content))
    assert "40.0 %" in page.text
    assert "an empirical upper bound, not a certificate" in page.text.lower()
    assert "Gallery" not in page.text
    assert "| pgd" in report.markdown(content)
    assert "queries" not in report.markdown(content)


def test_the_headings_stand_in_this_order():
    found = re.findall(r"<h([123])>(.*?)</h\1>", report.html(full()))
    assert [text for level, text in found if level == "2"] == [
        "Naive against adaptive attack", "What the attacker knows", "Attack after attack",
        "Accuracy against eps", "Class by class", "What the attacks did",
        "Checks for gradient masking", "Training, stage standard teacher",
        "Training, stage student", "To repeat this",
    ]  # fmt: skip
    levels = [int(level) for level, _ in found]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


@pytest.mark.parametrize("make", [
    lambda: report.html(full()), lambda: report.html(full("suspect")),
    lambda: compare_html([full(), minimal()]),
])  # fmt: skip
def test_the_page_loads_nothing_and_runs_nothing(make):
    text = make()
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(
        r"(?i)(https?:|//|@import|url\((?!#))", re.sub(r"data:image[^\"]*", "", text)
    )
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert len(text) < 500_000


def test_a_doubtful_verdict_is_in_every_title():
    for status, word in [("suspect", "suspect"), ("not applicable", "not applicable")]:
        text = report.html(full(status))
        for part in ("title", "h1"):
            assert word in re.search(f"<{part}>(.*?)</{part}>", text)[1].lower()
        assert word in report.markdown(full(status)).splitlines()[0]
    assert "suspect" not in report.html(full()).split("<body>")[1].lower()


def test_a_verdict_may_bring_its_own_warning_and_notes():
    content = full()
    content["verdict"] |= {"title": "this model masks gradients", "notes": ["F9 was not run"]}
    content["flags"][0] |= {"raised": True, "counts": False}
    for text in (report.html(content), report.markdown(content)):
        assert "this model masks gradients" in text
        assert "F9 was not run" in text
        assert "raised, not decisive" in text
        assert "▲ raised" not in text


def test_reasons_stand_directly_under_the_verdict():
    content = full("suspect")
    text = report.html(content)
    order = [text.index("49.7 %\n"), text.index("not a certificate"),
             text.index("31.4 % of images"), text.index("Attack after attack")]  # fmt: skip
    assert order == sorted(order)


def test_strings_from_outside_are_escaped():
    content = full("suspect")
    content["model"] |= {"architecture": EVIL, "note|": EVIL}
    content["data"] |= {"name": EVIL, "class_names": [EVIL] * 10}
    content["verdict"]["reasons"] = [EVIL]
    content["notices"] = [EVIL]
    content["command"] = EVIL
    content["attacks"][0] |= {"name": EVIL, "settings": {EVIL: EVIL}}
    for row in content["classes"] + content["tiers"] + content["flags"]:
        row["name"] = EVIL
    for entry in content["gallery"]:
        entry |= {"label": EVIL, "prediction": EVIL, "prediction_adv": EVIL, "attack": EVIL}
    for point in content["curve"]:
        point |= {"eps_text": EVIL, "attack": EVIL}
    content["threat_model"]["eps_text"] = EVIL
    for text in (report.html(content), compare_html([content, content])):
        assert "script" not in Page(text).tags
        assert "<script" not in text
    for text in (report.markdown(content), compare_markdown([content, content])):
        assert "<script" not in re.sub(r"(?s)```.*?```", "", text)


def test_markdown_shows_hostile_text_as_it_is():
    content = minimal()
    content["attacks"][0]["name"] = "a|b *c* `d` [e](f)\n# g"
    content["command"] = "echo ```\nrm"
    text = report.markdown(content)
    row = next(line for line in text.splitlines() if line.startswith(r"| a\|"))
    assert r"a\|b \*c\* \`d\` \[e\](f) # g" in row
    assert "````console\necho ```\nrm\n````" in text


@pytest.mark.parametrize(("n", "clean", "robust"), [(1, 0, 0), (1, 1, 1), (500, 500, 500)])
def test_charts_stay_finite_at_the_edges(n, clean, robust):
    content = minimal(n, clean, robust)
    content["threat_model"] = {"norm": "Linf", "eps": 0, "eps_text": "0"}
    content["classes"] = [{"name": "only", "n": n, "clean_accuracy": clean / n,
                           "robust_accuracy": robust / n}]  # fmt: skip
    content["curve"] = [{"eps": 0, "eps_text": "0", "robust_accuracy": robust / n, "attack": "none",
                         "interval": around(robust, n)}]  # fmt: skip
    validate(content)
    page = Page(report.html(content))
    assert not re.search(r"nan|inf|e[+-]\d", coordinates(page))
    assert all(-10 <= float(x) <= 700 for x in re.findall(r"-?\d+\.?\d*", coordinates(page)))


def test_many_classes_are_folded_to_both_ends():
    content = minimal(4000, 4000, 1998)
    content["classes"] = [{"name": f"class {i:04}", "n": 4, "clean_accuracy": 1.0,
                           "robust_accuracy": (i % 4) / 4 + (0.5 if i < 249 else 0) * (i % 4 == 0)}
                          for i in range(1000)]  # fmt: skip
    right = sum(round(row["robust_accuracy"] * 4) for row in content["classes"])
    content["robust_accuracy"] = content["attacks"][0]["robust_accuracy"] = right / 4000
    content["interval"] = content["attacks"][0]["interval"] = around(right, 4000)
    validate(content)
    text = Page(report.html(content)).text
    assert "984 classes between" in text
    assert len(re.findall(r"class \d{4}: robust", text)) == 16
    assert "984 classes between" in report.markdown(content)


def test_a_wide_curve_is_drawn_on_a_square_root_scale():
    lines = [charts.Series("a", [charts.Point(0.5, "0.5", 0.1, 0, 0.2)])]
    assert "square-root" in charts.curve(lines, title="t", marked=(8 / 255, "8/255"))
    assert "square-root" not in charts.curve(lines, title="t", marked=(0.25, "0.25"))
    assert charts.curve([], title="t") == ""


DAMAGE = {
    "schema": lambda c: c.update(schema=2),
    "suite": lambda c: c.pop("suite"),
    "threat_model.eps_text": lambda c: c["threat_model"].pop("eps_text"),
    "[0, 1]": lambda c: c.update(clean_accuracy=1.2),
    "in [0, 1], got nan": lambda c: c.update(clean_accuracy=float("nan")),
    "robust_accuracy <= clean": lambda c: c.update(robust_accuracy=0.9, interval=[0.8, 1.0]),
    "inside its interval": lambda c: c.update(interval=[0.1, 0.2]),
    "number of 1000 images": lambda c: c.update(clean_accuracy=0.81249),
    "n >= 1": lambda c: c.update(n=0),
    "fall from clean": lambda c: c["attacks"][1].update(
        robust_accuracy=0.6, interval=[0.5, 0.7], alone=None
    ),
    "newly_broken": lambda c: c["attacks"][1].update(newly_broken=1),
    "alone of": lambda c: c["attacks"][0].update(alone=0.1),
    "classes of n": lambda c: c["classes"].pop(),
    "classes to add up": lambda c: c["classes"][0].update(robust_accuracy=0.1),
    "a number for 'loss' in the course": lambda c: c["course"][0].update(loss="low"),
    "PNG data URI": lambda c: c["gallery"][0].update(image="https://example.org/a.png"),
    "a verdict of": lambda c: c["verdict"].update(status="fine"),
    "at least one attack": lambda c: c.update(attacks=[]),
    "an object under curve[0]": lambda c: c.update(curve=[3]),
    "side_by_side (defensive distillation)": lambda c: c.pop("side_by_side"),
    "tier W) for a purifier": lambda c: c.pop("tiers"),
    "beside grey-box rows": lambda c: (c.update(defenses=[]), c["tiers"].pop()),
    "worst case over everything": lambda c: c["tiers"][0].update(
        robust_accuracy=0.1, interval=[0.0, 0.2]
    ),
}


@pytest.mark.parametrize("expected", DAMAGE)
def test_impossible_reports_are_refused_in_one_line(expected):
    content = copy.deepcopy(full())
    validate(content)
    DAMAGE[expected](content)
    with pytest.raises(RunFolderError) as error:
        validate(content)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_rebuilt_from_its_json(tmp_path):
    content = full()
    (tmp_path / "report.json").write_text(json.dumps(content))
    written = report.rebuild(tmp_path)
    assert [path.name for path in written] == ["report.md", "report.html"]
    first = [path.read_text() for path in written]
    assert first == [report.markdown(content), report.html(content)]
    assert [path.read_text() for path in report.rebuild(tmp_path)] == first
    assert report.read(tmp_path) == json.loads(json.dumps(content))


def test_an_evaluation_leaves_its_report_and_every_verdict(tmp_path):
    names = {"architecture": "mlp", "class_names": CLASSES}
    found = SimpleNamespace(
        n=3, to_dict=lambda: minimal(3, 2, 1),
        labels=torch.tensor([4, 5, 6]), predictions=torch.tensor([4, 5, 1]),
        samples={"clean": torch.tensor([1, 1, 0]).bool(), "pgd": torch.tensor([1, 0, 0]).bool()},
    )  # fmt: skip
    data = SimpleNamespace(name="birds", fingerprint="ab", class_names=CLASSES)
    report.write_report(tmp_path, found, model=names, data=data, more={"notices": ["Read me."]})
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json", "report.md", "report.html", "samples.jsonl"
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines[1] == {"image": 1, "label": 5, "prediction": 5,
                        "right_after": {"clean": True, "pgd": False}}  # fmt: skip
    assert "Read me." in (tmp_path / "report.md").read_text()
    with pytest.raises(RunFolderError, match="tier W"):
        report.write_report(
            tmp_path, found, model=names, data=data, more={"defenses": ["purifier"]}
        )
    assert json.loads((tmp_path / "report.json").read_text())["defenses"] == ["purifier"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema": 1}'])
def test_a_damaged_folder_is_named(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(RunFolderError, match=re.escape(str(tmp_path))):
        report.rebuild(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_page(tmp_path):
    from PIL import Image

    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(report.html(full("suspect")), encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         f"--screenshot={shot}", "--window-size=1000,1400", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    picture = Image.open(shot).convert("RGB")
    colours = {colour: times for times, colour in picture.getcolors(1 << 24)}
    blue, paper = (11, 95, 165), (251, 250, 248)
    assert colours[paper] > 100_000
    assert colours[blue] > 5_000
    assert len(colours) > 100


def test_masking_is_called_what_it_is():
    content = full("suspect")
    said = "This model masks gradients (F1): PGD-40 on CE leaves 79.1 % right, AutoAttack 49.7 %."
    assert said in report.markdown(content)
    assert said in Page(report.html(content)).text
    content["side_by_side"][0]["robust_accuracy"] = 0.515  # less than F3 takes for masking
    assert "masks gradients" not in report.markdown(content)
    assert "masks gradients" not in report.markdown(
        full()
    )  # as far apart, but no check saw masking
