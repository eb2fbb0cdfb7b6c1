"""Contents of report.json for the tests, and what to ask of a page made from them."""

from html.parser import HTMLParser

import torch

from robustify.gallery import gallery

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


def course():
    """Two stages: three epochs, then one of a term of its own."""
    rows = [{"stage": "standard teacher", "epoch": i, "lr": 0.1, "loss": 2 / (i + 1)}
            for i in range(3)]  # fmt: skip
    return [*rows, {"stage": "student", "epoch": 0, "lr": 0.1, "rectified, clean": 0.012345678}]


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
        "course": course(),
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
