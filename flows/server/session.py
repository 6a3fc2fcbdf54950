"""One preparation of Prefect for everything that runs a flow in this process: the command and the Python API."""

import copy
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from functa.flows.server.api import (
    OperateError,
    check_api,
    check_home,
    configured_api,
    note_on_profile,
    prepare_environment,
)
from functa.flows.server.console import print_line
from functa.storage.errors import printable

VIEW = "View at http"  # of an embedded server, which ends with the command: an address that soon answers nobody

INTERRUPTED = "Crash detected! Execution was aborted by an interrupt signal"

# Every flow around a failed task logs its error once more, twice; the task's line and the command's last have it.
REPEATED = "Encountered exception during execution: "
FLOW_FAILED = re.compile(r"(Finished in state \w+\()'Flow run encountered an exception: .*'\)", re.DOTALL)


@contextmanager
def prefect_session(*, exit_with_server: bool = True) -> Iterator[None]:
    """Let flows run on the configured server, or on Prefect's embedded one, with the project's settings.

    exit_with_server: whether the process ends where its embedded server was ended; a command does, and a caller's own
    process (a notebook) does not. Raises OperateError where the configured server does not answer, or the embedded one
    does not start.
    """
    prepare_prefect()
    if configured_api():
        check_api()
    else:
        check_home()
        if note := note_on_profile():
            print_line(f"functa: {note}", error=True)
    from functa.flows.server.embedded import embedded_server

    quiet_console()
    with embedded_server(exit_with_server):
        yield


def prepare_prefect() -> None:
    """Apply the project's settings of Prefect, also where the caller imported Prefect before."""
    prepare_environment()
    from functa.flows.server.embedded import for_all_threads

    if "prefect" in sys.modules and not for_all_threads.is_set():  # it has read its settings
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def check_workers() -> None:
    """Raise OperateError where this command runs on an embedded server: no worker polls it, so groups would wait.

    Raises DispatchError where another server has no deployment for them.
    """
    from functa.flows.server.embedded import for_all_threads
    from functa.tasks.dispatch.work_pool import check_pool

    if for_all_threads.is_set():
        raise OperateError(
            "dispatch.runner=prefect: this command has a server of its own, which no worker polls: start `functa up` "
            "and set PREFECT_API_URL to its address, or choose dispatch.runner=threads"
        )
    check_pool()


def quiet_console() -> None:
    """Leave out of Prefect's console log what does not help: tracebacks, repeated errors, an embedded server's address.

    Its handlers that send records to a server are left alone; FUNCTA_DEBUG shows everything.
    """
    import prefect.main  # noqa: F401  sets up Prefect's logging

    if os.environ.get("FUNCTA_DEBUG"):
        return
    loggers = [
        logging.getLogger(name)
        for name in ("", *logging.root.manager.loggerDict)
        if not name or name.startswith("prefect")
    ]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if "Console" in type(handler).__name__ and not any(isinstance(each, Unhelpful) for each in handler.filters):
            handler.addFilter(Unhelpful())
            if handler.formatter is not None:
                # Of this one formatter, not of its class.
                vars(handler.formatter)["format"] = shortened(handler.formatter.format)


class Unhelpful(logging.Filter):
    """Drops Prefect's lines about its embedded server, those that report Ctrl-C as a crash, and repeated errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is shown."""
        message = record.getMessage()
        if record.name == "prefect.flow_runs" and message.startswith(REPEATED):
            return False
        return not (message.startswith(INTERRUPTED) or (message.startswith(VIEW) and not configured_api()))


def shortened(render: Callable[[logging.LogRecord], str]) -> Callable[[logging.LogRecord], str]:
    """Render a copy without traceback and repeated error, which the handler that sends records to the server needs.

    What a terminal would obey, such as an escape sequence in a file's name, is spelt out.
    """

    def rendered(record: logging.LogRecord) -> str:
        bare = copy.copy(record)
        bare.exc_info = bare.exc_text = None
        message = record.getMessage()
        if record.name == "prefect.flow_runs":
            message = FLOW_FAILED.sub(r"\1)", message)
        ours = record.name in ("prefect.flow_runs", "prefect.task_runs")  # one line each, whatever its names hold
        lines = [message] if ours else message.splitlines()
        bare.msg, bare.args = "\n".join(printable(line) for line in lines), None
        return render(bare)

    return rendered
