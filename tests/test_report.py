"""Reports: what is valid, that every number arrives, that no string does harm, and how it looks."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from robustify import charts, report
from robustify.comparison import compare_html, compare_markdown
from robustify.errors import RobustifyError, RunFolderError, UsageError
from robustify.gallery import gallery
from robustify.schema import validate

VOID = {"meta", "img", "br", "link", "hr", "input"}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RIGHT = [85, 90, 74, 66, 78, 73, 88, 87, 86, 85]  # of 100 per class
LEFT = [58, 70, 33, 22, 28, 40, 50, 62, 68, 66]  # after every attack
EVIL = '<script>alert("1")</script>'


def around(right, n):
    """A plausible interval; the exact one is not the report's business."""
    share = right / n
    spread = 1.96 * (share * (1 - share) / n) ** 0.5 + 2 / n
    return [max(0.0, share - spread), min(1.0, share + spread)]


def attack(name, before, after, n, **more):
    return {"name": name, "robust_accuracy": after / n, "interval": around(after, n),
            "newly_broken": before - after, "settings": {"steps": 100, "restarts": 1, "rho": 0.75},
            "passes": {"forward": 101.5, "backward": 100.25}, **more}  # fmt: skip


def minimal(n=1000, clean=800, robust=400):
    """The required keys and no other."""
    return {
        "schema": 1,
        "threat_model": {"norm": "Linf", "eps": 8 / 255, "eps_text": "8/255"},
        "suite": "pgd", "seed": 3, "n": n,
        "clean_accuracy": clean / n, "clean_interval": around(clean, n),
        "robust_accuracy": robust / n, "interval": around(robust, n),
        "verdict": {"status": "reliable", "reasons": []},
        "attacks": [{"name": "pgd", "robust_accuracy": robust / n, "interval": around(robust, n),
                     "settings": {"steps": 40}}],
        "model": {"architecture": "resnet18"},
        "data": {"name": "cifar10", "split": "test", "fingerprint": "c0ffee12" * 8,
                 "class_names": CLASSES},
        "training": None,
    }  # fmt: skip


def pictures(n=12, channels=3, side=32):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)
    signs = torch.rand(images.shape, generator=generator).round() * 2 - 1
    return images, (images + signs * 8 / 255).clamp(0, 1)


def full(status="reliable"):
    """Everything a report may hold, with numbers that fit together."""
    n, steps = 1000, [("apgd-ce", 523, 0.55), ("apgd-t", 498, 0.51), ("fab-t", 498, None),
                      ("square", 497, None)]  # fmt: skip
    content = minimal(n, 812, 497)
    rows, before = [], 812
    for name, after, alone in steps:
        queries = {"queries": 5000} if name == "square" else {}
        rows.append(attack(name, before, after, n, alone=alone, **queries))
        before = after
    images, images_adv = pictures()
    labels = torch.arange(12) % 10
    fallen = torch.where(torch.arange(12) < 10, (labels + 1) % 10, labels)
    classes = [
        {"name": name, "n": 100, "clean_accuracy": right / 100, "robust_accuracy": left / 100}
        for name, right, left in zip(CLASSES, RIGHT, LEFT, strict=True)
    ]
    reasons = {"suspect": ["F5: Square lowers the worst case of APGD-CE and APGD-T by 2.1 points; "
                           "0.2 would do", "F1: the gradient of 31.4 % of images is exactly 0"],
               "not applicable": ["F11: two identical runs differ"]}  # fmt: skip
    row = {"robust_accuracy": 0.497, "interval": around(497, n), "headline": True}
    content |= {
        "suite": "standard", "attacks": rows, "classes": classes,
        "verdict": {"status": status, "reasons": reasons.get(status, [])},
        "model": {"architecture": "resnet18", "parameters": 11173962, "weights_hash": "ab" * 32,
                  "image_size": 32, "mean": [0.4914, 0.4822, 0.4465]},
        "training": {"recipe": "peeraid", "student": "resnet18", "method": {"beta": 6.5},
                     "training": {"epochs": 200, "lr": 0.05}, "seed": 3},
        "defenses": ["defensive distillation", "purifier"],
        "side_by_side": [
            {**row, "tier": "naive", "name": "PGD-40 on CE", "robust_accuracy": 0.791,
             "interval": around(791, n), "headline": False, "description": "CE at T = 1"},
            {**row, "tier": "adaptive", "name": "AutoAttack", "description": "margins and ranks"}],
        "tiers": [
            {**row, "tier": "G1", "name": "grey-box", "robust_accuracy": 0.702, "headline": False,
             "interval": around(702, n), "description": "the classifier alone was attacked"},
            {**row, "tier": "W", "name": "white-box", "description": "exact gradients end to end"}],
        "flags": [
            {"name": "F1", "title": "zero gradient", "raised": status == "suspect", "value": 0.314,
             "threshold": 0.01, "sentence": "the gradient of 31.4 % of images is exactly 0"},
            {"name": "F5", "title": "black-box beats white-box", "raised": False, "value": 0.001,
             "threshold": 0.002, "sentence": "Square broke 1 image more"},
            {"name": "F9", "title": "random search", "raised": None, "value": None,
             "threshold": None, "sentence": "not run with suite fast"}],
        "curve": [{"eps": k / 255, "eps_text": f"{k}/255", "robust_accuracy": right / n,
                   "interval": around(right, n), "attack": "apgd-ce"}
                  for k, right in [(2, 741), (4, 668), (8, 523), (16, 201), (32, 4)]],
        "gallery": gallery(images, images_adv, labels, labels, fallen, CLASSES, attacks="apgd-ce"),
        "before": {"name": "the undefended resnet18", "clean_accuracy": 0.951},
        "distances": {"attack": "fab-t", "norm": "Linf", "mean": 0.0337, "median": 0.0301,
                      "success_rate": 0.998},
        "reference": {"name": "Addepalli2022 RN-18", "clean_accuracy": 85.71,
                      "robust_accuracy": 52.48, "source": "RobustBench"},
        "passes": {"forward": 1834.5, "backward": 911.25}, "seconds": 412.75,
        "selection": {"network": "ema", "epoch": 187, "by": "validation PGD-10"},
        "notices": ["Secrecy of the purifier is not assumed."],
        "cost": {"training_passes": 110000000, "training_hours": 5.25},
        "versions": {"robustify": "0.1.0", "torch": "2.9.0"},
        "command": "robustify evaluate runs/peeraid-resnet18-cifar10 --suite standard --limit 1000",
    }  # fmt: skip
    return content


class Page(HTMLParser):
    """Whether tags balance, what is on the page, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.attributes, self.within = [], [], "", [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


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
        "Checks for gradient masking", "To repeat this",
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


def test_comparable_runs_are_ranked_only_where_intervals_allow_it():
    better, worse = full(), minimal(1000, 812, 300)
    worse |= {"suite": "standard"}
    assert "A has the highest robust accuracy, 49.7 %, and no other" in compare_markdown(
        [better, worse]
    )
    near = minimal(1000, 812, 480) | {"suite": "standard"}
    assert "overlaps that of B" in compare_markdown([better, near])
    assert "verdict of A is not reliable" in compare_html([full("suspect"), near])


def test_what_cannot_be_compared_is_marked():
    other = minimal(500, 400, 200)
    other["threat_model"] = {"norm": "L2", "eps": 0.5, "eps_text": "0.5"}
    other["data"]["fingerprint"] = "00" * 32
    text = compare_markdown([full(), other], ["runs/a", "runs/b"])
    for aspect in ("threat model", "data", "n", "suite"):
        assert f"{aspect} differs" in text
        assert f"▲ {aspect} differs" in text
    assert "highest robust accuracy" not in text
    assert "runs/b" in text
    page = compare_html([full(), other])
    assert "not comparable" in re.search("<title>(.*?)</title>", page)[1]
    assert "differs" not in Page(compare_html([full(), full()])).text
    assert Page(compare_html([full(), full()])).tags.count("polyline") == 2


def test_many_runs_are_compared():
    runs = [full() for _ in range(30)]
    page = Page(compare_html(runs))
    assert page.tags.count("polyline") == 30
    with pytest.raises(UsageError, match="at least two"):
        compare_markdown(runs[:1])


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 224)])
def test_the_gallery_shows_broken_images_of_many_classes_first(channels, side):
    images, images_adv = pictures(20, channels, side)
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 5)
    predictions = labels.clone()
    predictions[0] = 1  # wrong before any attack
    fallen = torch.where(torch.arange(20) < 18, (labels + 1) % 3, labels)
    entries = gallery(images, images_adv, labels, predictions, fallen, CLASSES, attacks="pgd",
                      indices=torch.arange(20) + 100)  # fmt: skip
    assert len(entries) == 12
    assert [entry["label"] for entry in entries[:3]] == CLASSES[:3]
    assert 100 not in [entry["index"] for entry in entries]
    assert {entry["factor"] for entry in entries} == {15}
    assert (
        sum(len(entry[key]) for entry in entries for key in ("image", "image_adv", "delta")) < 6e5
    )
    validate(minimal() | {"gallery": entries})


def test_an_empty_or_unmoved_gallery_is_no_error():
    images, _ = pictures(2)
    labels = torch.tensor([0, 1])
    unmoved = gallery(images, images, labels, labels, labels, CLASSES, attacks=["a", "b"])
    assert [entry["factor"] for entry in unmoved] == [1, 1]
    assert gallery(images, images, labels, 1 - labels, labels, CLASSES, attacks="a") == []


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


def test_every_refusal_is_one_of_ours():
    assert issubclass(RunFolderError, RobustifyError)
