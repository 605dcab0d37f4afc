"""Runs inside the sandbox, where there is no network: starts the program and leads its calls out through a socket.

`python3 -I -S launcher.py SPECIFICATION.json`, standard library only. Listens on a port of the sandbox's own loopback
and passes every connection on to the Unix socket that the parent has put in. Exits as the program does; after the time
limit it kills the program's group and exits with 124.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Any

TIMED_OUT = 124


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until there are no more."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


async def forward(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection. When the program hangs up, so does this, and the gateway stops its request."""
    try:
        out_reader, out_writer = await asyncio.open_unix_connection(path)
    except OSError:
        writer.close()
        return
    sending = asyncio.ensure_future(pump(reader, out_writer))
    receiving = asyncio.ensure_future(pump(out_reader, writer))
    await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
    for task in (sending, receiving):
        task.cancel()
    for each in (out_writer, writer):
        each.close()  # after what was written to it


async def run(specification: "dict[str, Any]") -> int:
    """The program's exit code."""
    variables = {**os.environ, **specification["variables"]}
    server = None
    if specification["socket"]:
        server = await asyncio.start_server(
            lambda reader, writer: forward(specification["socket"], reader, writer), "127.0.0.1", 0
        )
        variables["OPENAI_BASE_URL"] = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    stdin = open(specification["stdin"] or os.devnull, "rb")  # noqa: ASYNC230, PTH123, SIM115  the child's, local
    try:
        process = await asyncio.create_subprocess_exec(
            *specification["arguments"], stdin=stdin, env=variables, start_new_session=True
        )
    except OSError as error:
        sys.stderr.write(f"{specification['arguments'][0]} cannot be started: {error.strerror}\n")
        return 127
    code = TIMED_OUT
    with contextlib.suppress(asyncio.TimeoutError):
        code = await asyncio.wait_for(process.wait(), specification["limit_s"])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123  a module less to import
        wanted = json.load(file)
    result = asyncio.run(run(wanted))
    sys.stdout.flush()
    os._exit(result)
