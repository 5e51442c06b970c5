"""Runs a notebook, whose cells run in a loop that goes on between them, and prints what the cells have written."""

from __future__ import annotations

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

CELLS = [
    """
    import asyncio, json, os, urllib.request, portexec
    LIGHT = json.loads(os.environ["LIGHT"])
    def ask(server):
        return urllib.request.urlopen(server.url).read().decode() == f"hello from {server.pid}"
    asyncio.get_running_loop()
    with portexec.serve(LIGHT) as server:
        print("plain", ask(server))
    """,
    """
    async with portexec.serve(LIGHT) as server:
        await server.restart()
        print("async", ask(server))
    kept = portexec.serve(LIGHT).__enter__()
    """,
    """
    print("kept", ask(kept))
    async def one():
        async with portexec.serve(LIGHT) as server:
            return ask(server)
    print(*await asyncio.gather(one(), one()))
    """,
]

notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
# By TCP the kernel would bind five numbers that its manager has found free, and may have lost: what portexec is against.
manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip="kernel")
NotebookClient(notebook, km=manager, iopub_timeout=60, raise_on_iopub_timeout=True).execute()
for cell in notebook.cells:
    for output in cell.outputs:
        print(output.get("text", output), end="")
