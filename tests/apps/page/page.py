"""A guest list: a page whose script asks its own server for the guests and adds one.

Everything says which instance answered, so that a test that ends at a neighbour's server sees it. A server that is BROKEN is
up and shows the page all the same, so that it is the tests that have to find out: with BROKEN=1 it takes no guests, with
BROKEN=silent it lets them wait.
"""

from __future__ import annotations

import os

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

INSTANCE = os.environ.get("INSTANCE", "unnamed")
BROKEN = os.environ.get("BROKEN")

PAGE = """<!doctype html>
<html lang="en">
<title>Guest list</title>
<link rel="icon" href="data:,">
<h1>Guest list of INSTANCE</h1>
<form><label>Name <input name="name" autocomplete="off"></label> <button>Add</button></form>
<p role="status">asking</p>
<ul></ul>
<script>
  const show = ({ instance, guests }) => {
    document.querySelector("ul").replaceChildren(
      ...guests.map((name) => Object.assign(document.createElement("li"), { textContent: name })),
    );
    document.querySelector("[role=status]").textContent = `guests: ${guests.length}, says ${instance}`;
  };
  const ask = async (options) => {
    const answer = await fetch("/guests", options);
    if (answer.ok) show(await answer.json());
    else document.querySelector("[role=status]").textContent = `failed: ${answer.status}`;
  };
  document.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = new FormData(event.target).get("name");
    ask({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ name }) });
  });
  ask();
</script>
</html>
"""


class Guest(BaseModel):
    """Somebody who comes."""

    name: str


app = FastAPI()
guests: list[str] = []


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    """Show the page; the guests come by script."""
    return PAGE.replace("INSTANCE", INSTANCE)


@app.get("/guests")
async def listed() -> dict[str, object]:
    """List the guests of this instance."""
    return {"instance": INSTANCE, "guests": guests}


@app.post("/guests")
async def add(guest: Guest, request: Request) -> dict[str, object]:
    """Add a guest, unless this is a broken one."""
    if BROKEN == "silent":
        print(f"{guest.name} waits at {INSTANCE}", flush=True)
        await request.receive()  # nothing is left to come but that the browser goes away
    if BROKEN:
        raise HTTPException(500, "no guests are taken")
    guests.append(guest.name)
    return await listed()
