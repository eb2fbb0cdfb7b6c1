"""Placeholder while folding is written."""
from contextlib import contextmanager


@contextmanager
def constant(model, images=None):
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield model
    finally:
        for m, t in modes:
            m.training = t
        for p, f in flags:
            p.requires_grad_(f)


def prefers_channels_last(model, size):
    return size >= 16
