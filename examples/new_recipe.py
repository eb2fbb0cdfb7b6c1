"""A recipe of one's own, run by its path: adversarial logit pairing (arXiv 1803.06373).

python examples/new_recipe.py --student resnet18
"""

import sys
from pathlib import Path

from robustify.__main__ import main

CODE = """from dataclasses import dataclass
from robustify.attacks.pgd import pgd
from robustify.fold import constant
from robustify.losses import cross_entropy
from robustify.objective import Objective

def stages(student, teachers, *, threat, attack, pair_weight: float = 0.5):
    yield Pairing(student=student, threat=threat, attack=attack, pair_weight=pair_weight)

@dataclass(eq=False, kw_only=True)
class Pairing(Objective):
    threat: object
    attack: dict
    pair_weight: float

    def forward(self, images, labels, noise):
        with constant(self.student, images) as f:
            images_adv = pgd(lambda x: cross_entropy(f(x), labels),
                             images, self.threat, noise=noise, **self.attack)
        logits, logits_adv = self.student(images), self.student(images_adv)
        paired = (logits - logits_adv).square().mean()
        return {"loss": cross_entropy(logits_adv, labels).mean() + self.pair_weight * paired}
"""
SETTINGS = """attack: {steps: 10, step_size: eps/4}
training: {epochs: 12, optimizer: adamw, lr: 1e-3}"""
Path("pairing.py").write_text(CODE)
Path("pairing.yaml").write_text(SETTINGS)
sys.argv[1:1] = ["distill", "--recipe", "pairing.py"]
main()
