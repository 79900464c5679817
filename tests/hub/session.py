"""A Python of its own that talks to a loopback Hub: the address of the Hub is fixed when its libraries are imported.

python session.py    reads one JSON object a line: {"args": [...]} for a command line of mm-prm, or {"code": "..."}
whose variable `result` is answered, each with an optional "env"; answers one JSON object a line.
"""

import contextlib
import io
import json
import os
import sys
import traceback


def answer(request):
    os.environ.update(request.get("env", {}))
    out, err = io.StringIO(), io.StringIO()
    status, result = None, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "args" in request:
                from mm_prm.cli import main

                status = main(request["args"])
            else:
                variables = {}
                exec(request["code"], variables)
                result = variables["result"]
        except SystemExit as end:
            status = end.code
        except BaseException:
            err.write(traceback.format_exc())
    return {"status": status, "result": result, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    stdout = sys.stdout
    for line in sys.stdin:
        stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        stdout.flush()
