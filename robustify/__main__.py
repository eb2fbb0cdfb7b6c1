"""`robustify`, and `python -m robustify`: exit codes and one-line errors."""

from __future__ import annotations

import logging
import os
import sys

import click

from robustify.errors import RobustifyError

_CONTINUES = "the same command continues"
_NOTHING_KEPT = "nothing was kept (evaluate --out FOLDER keeps every verdict)"


def main() -> None:
    """Run the command line and exit with its code: 0 done, 1 failed, 2 wrong usage,
    3 `--fail-under` not met, 130 interrupted."""
    debug = "--debug" in sys.argv[1:]
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("robustify").setLevel(logging.INFO)
    # timm warns that a cosine of one epoch does not fall: it is not meant to.
    logging.getLogger("timm.scheduler").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    try:
        from robustify.cli import robustify

        code = robustify.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        kept = sys.argv[1:2] in (["distill"], ["attach"]) or "--out" in sys.argv
        click.echo(f"interrupted; {_CONTINUES if kept else _NOTHING_KEPT}", err=True)
        sys.exit(130)
    except RobustifyError as error:
        if debug:
            raise
        click.echo(f"robustify: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
