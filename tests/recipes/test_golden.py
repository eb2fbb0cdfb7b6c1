"""Three steps of every published method, pinned: what no formula says, such as the order of random
draws or the BatchNorm statistics that an attack finds, must not change unseen.

After an intended change `python tests/recipes/test_golden.py` prints the new curves; the commit
that pins them says why they moved.
"""

import pytest
import torch
import toys

METHODS = {
    "standard": ("standard", {}),
    "pgd_at": ("pgd_at", {}),
    "trades": ("trades", {}),
    "mart": ("mart", {}),
    "peeraid": ("peeraid", {}),
    "ard": ("ard", {}),
    "iad": ("iad", {}),
    "iad II": ("iad", {"variant": "II"}),
    "rslad": ("rslad", {}),
    "adaad": ("adaad", {}),
    "adaiad": ("adaad", {"adv_weight": 900.0, "self_weight": 1.0, "temperature": 30.0}),
    "mtard": ("mtard", {}),
}
CURVES = {
    "standard": [4.184371, 4.185352, 3.314806],
    "pgd_at": [5.319607, 5.369188, 4.29762],
    "trades": [7.304664, 8.666903, 5.838499],
    "mart": [7.792871, 9.30994, 6.621475],
    "peeraid": [6.901722, 6.435654, 4.199853],
    "ard": [0.489423, 0.4575094, 0.4012334],
    "iad": [2.892953, 2.127715, 1.541631],
    "iad II": [3.034215, 2.550358, 1.948892],
    "rslad": [0.294261, 0.2608685, 0.2501076],
    "adaad": [0.3096883, 0.2798396, 0.2516774],
    "adaiad": [5.278738, 2.918766, 2.579205],
    "mtard": [0.2595101, 0.2413226, 0.2243467],
}


def curve(method):
    recipe, settings = METHODS[method]
    roles = 2 if method in ("iad II", "mtard") else len(toys.roles(recipe))
    teachers = [toys.toy(seed=10 + i) for i in range(roles)]
    objective = toys.build(recipe, teachers=teachers, **settings)
    return toys.train(objective, [toys.batch(seed=seed) for seed in range(3)])


@pytest.mark.parametrize("method", METHODS)
def test_three_steps(method):
    assert torch.get_num_threads() == 1
    assert curve(method) == pytest.approx(CURVES[method], rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in METHODS:
        print(f'    "{method}": {[float(f"{loss:.7g}") for loss in curve(method)]},')
