"""Small networks, and instruments that see what an Objective does with them."""

from dataclasses import dataclass, field

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from robustify import config, data
from robustify.attacks.pgd import pgd, survives_pgd
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Frozen
from robustify.settings import Training
from robustify.threat import ThreatModel

LN9 = 2.1972245773362196
THREAT = ThreatModel("Linf", 0.1)
ROLES = {
    "none": [],
    "robust": ["robust teacher"],
    "standard": ["standard teacher"],
    "robust and standard": ["robust teacher", "standard teacher"],
}


class ToyNet(nn.Module):
    """BatchNorm on the images themselves, then two convolutions with BatchNorm, and a head."""

    def __init__(self, num_classes=10, in_chans=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, 12
        self.norm = norm(in_chans)
        self.conv1, self.norm1 = nn.Conv2d(in_chans, 8, 3, padding=1, bias=False), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), norm(12)
        self.head = nn.Linear(12, num_classes)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.head.weight, std=3.0)  # logits far enough apart to tell losses apart

    def reset_classifier(self, num_classes, global_pool=None):
        self.num_classes, self.head = num_classes, nn.Linear(self.num_features, num_classes)

    def get_classifier(self):
        return self.head

    def forward_features(self, images):
        maps = self.norm1(self.conv1(self.norm(images))).relu()
        return self.norm2(self.conv2(maps)).relu()

    def forward_head(self, maps):
        return self.head(maps.mean((2, 3)))

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


class Wide(nn.Sequential):
    """Enough of a network to learn 256 digits robustly."""

    def __init__(self, num_classes=10, in_chans=1):
        layers = []
        for width_in, width, stride in ((in_chans, 16, 1), (16, 32, 2), (32, 32, 1)):
            conv = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(512, num_classes))
        self.num_classes, self.in_chans = num_classes, in_chans


class Linear(nn.Module):
    """z = W x, for closed forms."""

    def __init__(self, num_classes=10, in_chans=1):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.weight = nn.Parameter(torch.randn(num_classes, in_chans * 64))

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


class Scripted(nn.Module):
    """Gives the next logits of a script at each forward in train mode, the first ones otherwise."""

    def __init__(self, *script):
        super().__init__()
        self.num_classes, self.in_chans = len(script[0]), 1
        logits = (torch.as_tensor(z, dtype=torch.float64) for z in script)
        self.script = nn.ParameterList(map(nn.Parameter, logits))
        self.turn = 0

    def forward(self, images):
        logits = self.script[self.turn if self.training else 0]
        self.turn += self.training
        return logits + 0 * images.flatten(1).sum(1, keepdim=True)


default_cfgs = generate_default_cfgs(
    {"toy_net": {"input_size": (1, 8, 8), "num_classes": 10, "mean": (0.0,), "std": (1.0,)}}
)


@register_model
def toy_net(pretrained=False, *, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
    size = pretrained_cfg["input_size"]
    net = ToyNet(pretrained_cfg["num_classes"], size[0])
    net.pretrained_cfg = net.default_cfg = dict(pretrained_cfg)
    return net


def wrap(module, **kwargs):
    """`module` as a Classifier that leaves pixels as they are."""
    plain = {"architecture": "toy_net", "image_size": 8, "mean": (0.0,), "std": (1.0,)}
    plain["about"] = {"base": "toy"}  # weights of its own: it can teach
    return Classifier(module, **{**plain, **kwargs})


def toy(seed=0, classes=10, dtype=torch.float32, make=ToyNet, **kwargs):
    """A toy classifier whose weights and BatchNorm statistics are no defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = wrap(make(classes), **kwargs).to(dtype)
        if make is ToyNet:
            with torch.no_grad():
                network.train()(torch.rand(32, 1, 8, 8, dtype=dtype))
    return network


def scripted(*script):
    return wrap(Scripted(*script))


def batch(count=6, classes=10, seed=1, dtype=torch.float32):
    """Images, labels and noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return images, (3 * torch.arange(count) + 1) % classes, Noise.for_batch(seed, images)


def about(recipe):
    """What a recipe's YAML says about it; one without a YAML fails elsewhere."""
    known = (config.folders()[1] / f"{recipe}.yaml").is_file()
    return config.find(recipe).about if known else {"teachers": "?"}


def roles(recipe):
    """Which teachers a recipe takes or trains, by its YAML; a remark may follow in brackets."""
    return ROLES.get(about(recipe)["teachers"].partition(" (")[0])


def settings(recipe, preset=None):
    """The loop's settings and the attack's, as a preset has them at eps 8/255."""
    found = config.find(recipe)
    schemas = {
        "method": config.schema(found.load().stages, without=("threat", "attack")),
        "attack": config.schema(pgd, without=("noise",)),
        "training": config.schema(Training),
    }
    resolved = config.resolve(found, schemas, eps=8 / 255, preset=preset)
    return Training(**resolved["training"]), resolved["attack"]


def all_stages(
    recipe, student=None, teachers=None, *, threat=THREAT, steps=2, start=None, **settings
):
    """A recipe's Objectives one by one, with toy networks and a short attack; what a stage draws at
    random comes from its own seed, as in the harness."""
    found = config.find(recipe)
    stages = found.load().stages
    if student is None:
        student = toy()
    if teachers is None:
        teachers = [toy(seed=10 + i) for i in range(len(roles(recipe)))]
    if "attack" in config.schema(stages):
        start = start or found.sections["attack"]["start"]
        attack = {"steps": steps, "step_size": threat.eps / 2, "start": start}
        settings = {"threat": threat, "attack": attack} | settings
    generator = stages(student, teachers, **settings)
    for number in range(100):
        with torch.random.fork_rng():
            torch.manual_seed(100 + number)
            objective = next(generator, None)
        if objective is None:
            return
        yield objective


def build(recipe, student=None, teachers=None, **settings):
    """The last stage of a recipe, in train mode, as the loop has it."""
    *_, objective = all_stages(recipe, student, teachers, **settings)
    return objective.train()


@dataclass
class Pass:
    """One forward of one network."""

    network: str
    training: bool
    attack: bool  # its images are being searched
    images: torch.Tensor
    logits: torch.Tensor


class Recorder:
    """Every forward of an Objective's networks in order; logits of the loss keep their gradient."""

    def __init__(self, objective):
        self.passes = []
        for name, child in objective.named_children():
            if isinstance(child, Classifier | Frozen):
                child.register_forward_hook(self._hook(name))

    def _hook(self, name):
        def note(module, args, logits):
            (images,) = args
            attack = images.requires_grad
            if logits.requires_grad and not attack:
                logits.retain_grad()
            self.passes.append(Pass(name, module.training, attack, images.detach(), logits))

        return note

    def outer(self, network="student", training=True):
        """Forwards outside of the attack."""
        return [
            p for p in self.passes
            if p.network == network and p.training == training and not p.attack
        ]  # fmt: skip

    def attacks(self, network="student"):
        return [p for p in self.passes if p.network == network and p.attack]

    def of(self, images, network="student", training=True):
        """The logits of the one forward of these images."""
        same = [p.logits for p in self.outer(network, training) if torch.equal(p.images, images)]
        assert same, f"{network} never read these images"
        return same[0]

    def images_adv(self, images):
        """The adversarial images: what the student read in the loss beside `images`."""
        others = [p.images for p in self.outer() if not torch.equal(p.images, images)]
        assert others, "the student never read adversarial images"
        return others[0]


@dataclass(frozen=True)
class SpyThreat(ThreatModel):
    """A threat model that keeps the gradients of each attack step."""

    gradients: list = field(default_factory=list, compare=False)

    def ascend(self, images_adv, gradient, step_size):
        self.gradients.append(gradient.clone())
        return super().ascend(images_adv, gradient, step_size)


def parameters(module):
    return [p for p in module.parameters() if p.requires_grad]


def snapshot(module):
    """Parameters and buffers, copied."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def frozen(objective):
    return [m for m in objective.modules() if isinstance(m, Frozen)]


def train(objective, batches, *, epochs=1, lr=0.05):
    """A few steps of plain SGD with momentum; the losses."""
    optimizer = torch.optim.SGD(parameters(objective), lr=lr, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for images, labels, noise in batches:
            terms = objective(images, labels, noise)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            losses.append(terms["loss"].item())
    return losses


def running_mean(objective_or_network):
    """The running mean of the BatchNorm that reads the student's images: a scalar."""
    student = getattr(objective_or_network, "student", objective_or_network)
    return student.module.norm.running_mean.item()


def reference_kl(p, q, temperature=1.0, *, class_mean=False):
    """KL(softmax(p / T), softmax(q / T)), mean over images; `class_mean` divides by K as well, as
    PyTorch's KLDivLoss does by default, which many published programs took."""
    p, q = ((z / temperature).exp() for z in (p, q))
    p, q = (z / z.sum(1, keepdim=True) for z in (p, q))
    divergence = (p * (p / q).log()).sum() / len(p)
    return divergence / p.shape[1] if class_mean else divergence


def step(objective, batch):
    """One recorded forward and backward: the recorder, the terms, and the adversarial images."""
    images, labels, noise = batch
    recorder = Recorder(objective)
    terms = objective(images, labels, noise)
    terms["loss"].backward()
    images_adv = recorder.images_adv(images) if hasattr(objective, "attack") else None
    return recorder, terms, images_adv


def digits(count=256):
    """The first digits of the bundled training set as one batch."""
    images, labels, keys = data.load("digits").train.__getitems__(range(count))
    return data.to_float(images), labels, Noise(0, keys)


def overfit(recipe, student, teachers=None, *, peer=None, epochs, lr, batch_size=64, **settings):
    """A recipe's last stage, trained on 256 digits with PGD-10; and these digits."""
    objective = build(recipe, student, teachers, steps=10, **settings)
    if peer is not None:
        objective.peer = peer.train()
    images, labels, noise = digits()
    optimizer = torch.optim.SGD(parameters(objective), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    objective.epochs = epochs
    for epoch in range(epochs):
        objective.epoch = epoch
        order = torch.randperm(256, generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(batch_size):
            terms = objective(images[chosen], labels[chosen], noise.fork(epoch)[chosen])
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
        schedule.step()
    return objective.eval(), images, labels, noise


def evaluated(objective, images, labels, noise):
    """The terms of an objective with its networks in eval mode."""
    return {name: term.item() for name, term in objective.eval()(images, labels, noise).items()}


def accuracy(network, images, labels):
    with torch.no_grad():
        return (network.eval()(images).argmax(1) == labels).float().mean().item()


def robust_accuracy(network, images, labels, threat=THREAT):
    """Under PGD-10 on cross-entropy."""
    noise = Noise.for_batch(7, images)
    survives = survives_pgd(network.eval(), images, labels, threat, steps=10, noise=noise)
    return survives.float().mean().item()
