"""A warm process that runs what it is told, with the Hub's client as its environment sets it up.

Each line on stdin is JSON, {"environment": …} and either {"command": […]}, run as `robustify` does,
or {"python": "…"}; each line on stdout is {"code": …, "out": …, "err": …}.
"""

import contextlib
import io
import json
import logging
import os
import sys
import traceback


def run(command):
    from robustify.__main__ import main

    sys.argv = ["robustify", *command]
    # `main` makes logging write to the stderr of this command, and not of the first one
    for handler in list(logging.getLogger().handlers):
        logging.getLogger().removeHandler(handler)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.setStream(sys.stderr)
    try:
        main()
    except SystemExit as done:
        return done.code
    return 0


def python(code):
    try:
        exec(compile(code, "<test>", "exec"), {})
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def answer(line, stdout):
    asked, out, err = json.loads(line), io.StringIO(), io.StringIO()
    for name, value in asked["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(asked["command"]) if "command" in asked else python(asked["python"])
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), file=stdout)
    stdout.flush()


for line in sys.stdin:
    answer(line, sys.stdout)
