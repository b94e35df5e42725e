"""The chat of `make chat` in a real browser: what its users see, also while something is broken.

`EVENTBUS_SCREENSHOTS=docs/img pytest -m cluster tests/cluster/test_chat.py` makes the pictures of
docs/chat.md again.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eventbus.server import Server
from tests.cluster.chat_nodes import chat

if TYPE_CHECKING:
    from playwright.async_api import Browser, Locator, Page

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

DESKTOP, PHONE = (1000, 620), (390, 700)
LIMIT = 30_000
"""Milliseconds that the browser waits for what must become true."""
PICTURES = os.environ.get("EVENTBUS_SCREENSHOTS")

Open = Callable[..., Awaitable["Page"]]


@pytest.fixture
async def open_page(browser: Browser) -> AsyncIterator[Open]:
    """Open a page for a user, on a node; a script that fails in any of them fails the test."""
    contexts, errors = [], list[str]()

    async def open_page(url: str, user: str, size: tuple[int, int] = DESKTOP, **more: Any) -> Page:
        viewport = {"width": size[0], "height": size[1]}
        context = await browser.new_context(viewport=viewport, locale="en-GB", **more)
        contexts.append(context)
        context.set_default_timeout(LIMIT)
        page = await context.new_page()
        page.on("pageerror", lambda error: errors.append(f"{user}: {error}"))
        page.on("dialog", lambda dialog: errors.append(f"{user}: a dialog"))
        await page.goto(url)
        await page.fill("#user", user)
        await page.click("#welcome button")
        await there(page.locator("#state.good"))
        return page

    yield open_page
    for context in contexts:
        await context.close()
    assert errors == []


async def there(locator: Locator, number: int = 1) -> None:
    """The page shows it, this many times."""
    from playwright.async_api import expect

    await expect(locator).to_have_count(number)
    if number == 1:
        await expect(locator).to_be_visible()


async def say(page: Page, text: str) -> None:
    """Write a message, and see that it is sent."""
    await page.fill("#text", text)
    await page.press("#text", "Enter")
    await there(page.locator(".row.mine.sent .text").get_by_text(text, exact=True))


def said(page: Page, text: str) -> Locator:
    """A message of somebody else."""
    return page.locator(".row:not(.mine) .text").get_by_text(text, exact=True)


async def online(page: Page, *users: str) -> None:
    """The page lists these users, and no others; on a phone the list is out of sight."""
    from playwright.async_api import expect

    await expect(page.locator("#people .name")).to_have_text(sorted(users))


async def fits(page: Page) -> None:
    """Nothing is wider than the screen."""
    wide = """() => [document.documentElement, ...document.querySelectorAll("body *")]
      .filter((one) => !one.closest("#side") && one.getBoundingClientRect().right > innerWidth + 1)
      .map((one) => one.outerHTML.slice(0, 99))"""
    assert await page.evaluate(wide) == []
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def shoot(page: Page, name: str) -> None:
    """Keep a picture, when somebody wants one."""
    if PICTURES:
        await page.screenshot(path=Path(PICTURES) / f"chat-{name}.png", animations="disabled")


async def test_three_nodes_one_chat(open_page: Open, valkey: Server) -> None:
    """Users on three nodes see each other, each message once with its node, and who is typing."""
    async with chat(valkey.url) as nodes:
        ana = await open_page(nodes[1], "ana")
        ben = await open_page(nodes[2], "ben")
        for page in (ana, ben):
            await online(page, "ana", "ben")
        await say(ana, "Good morning! Who has the results of the load test?")
        await there(said(ben, "Good morning! Who has the results of the load test?"))
        await say(ben, "I have. Nothing came twice.")
        await say(ben, "The outage in the middle shows as a gap, as it should.")
        await there(said(ana, "The outage in the middle shows as a gap, as it should."))

        eve = await open_page(nodes[3], "eve", PHONE)
        for page in (ana, ben, eve):
            await online(page, "ana", "ben", "eve")
        await there(eve.locator(".row"), 0)  # there is no history
        await say(eve, "Hello from the third node")
        for page in (ana, ben):
            row = page.locator(".row", has_text="Hello from the third node")
            await there(row.locator(".node").get_by_text("node-3", exact=True))

        await ben.locator("#text").press_sequentially("Have a look at ")
        await there(ana.locator("#typing").get_by_text("ben is typing"))
        await there(eve.locator("#typing").get_by_text("ben is typing"))
        await fits(eve)
        await shoot(ana, "talk")
        await there(ana.locator(".row .text"), 4)
        await ben.context.close()
        await online(ana, "ana", "eve")


async def test_text_is_text(open_page: Open, valkey: Server) -> None:
    """HTML in messages and in names is shown as it was written, and does nothing."""
    evil = """<img src=x onerror="alert(1)"><script>alert(2)</script><b>bold</b>&amp;"""
    async with chat(valkey.url, 2) as nodes:
        ana, ben = await open_page(nodes[1], "ana"), await open_page(nodes[2], "ben", PHONE)
        await online(ana, "ana", "ben")
        await say(ana, evil)
        await there(said(ben, evil))
        await there(ben.locator("#lines img, #lines script, #lines b:not(.head b)"), 0)
        await say(ana, "w" * 1000)
        await there(said(ben, "w" * 1000))
        await fits(ben)
        # A name that is none is refused with a sentence, and nobody comes.
        await ben.goto(f"{nodes[2]}/?user=%3Cb%3Ex%3C%2Fb%3E")
        await there(ben.locator("#refused").get_by_text("a name is 1 to 32 letters"))
        await online(ana, "ana")


async def enter(page: Page, room: str) -> None:
    """Go into a room that has no tab yet."""
    if await page.locator("#menu").is_visible():
        await page.click("#menu")
    await page.fill("#room", room)
    await page.press("#room", "Enter")


async def test_rooms(open_page: Open, valkey: Server) -> None:
    """A message is seen in its room only, and counted where nobody looks; anybody makes a room."""
    async with chat(valkey.url, 2) as nodes:
        ana, ben = await open_page(nodes[1], "ana"), await open_page(nodes[2], "ben", PHONE)
        await ana.locator("#rooms").get_by_text("# tea").click()
        await say(ana, "green or black?")
        await there(ben.locator("#menu.news"))
        await there(said(ben, "green or black?"), 0)
        await ben.click("#menu")
        await there(ben.locator(".room", has_text="tea").get_by_text("1", exact=True))
        await ben.locator("#rooms").get_by_text("# tea").click()
        await there(said(ben, "green or black?"))
        for page in (ana, ben):
            await enter(page, "attic: no")
            await there(page.locator(".line.bad", has_text="the name of a room is"))
            await enter(page, "attic")
            await there(page.locator("#title").get_by_text("# attic"))
        await say(ben, "it is dark in here")
        await there(said(ana, "it is dark in here"))


async def test_a_node_dies(open_page: Open, valkey: Server) -> None:
    """When a node is killed, its users are offline on the others; its pages say that it is gone."""
    async with chat(valkey.url) as nodes:
        ana = await open_page(nodes[1], "ana", PHONE)
        ben, eve = await open_page(nodes[2], "ben"), await open_page(nodes[3], "eve")
        await online(ana, "ana", "ben", "eve")
        await nodes.kill(2)
        await there(ben.locator("#state.bad").get_by_text("reconnecting"))
        for page in (ana, eve):
            await online(page, "ana", "eve")
        await nodes.start("node-2")
        await there(ben.locator("#state.good"))
        await there(ben.locator(".line.gap", has_text="Messages may have been missed"))
        await online(ana, "ana", "ben", "eve")


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_a_page_moves(open_page: Open, valkey: Server, how: str) -> None:
    """A page whose node is gone, or mute, goes on at another, and says what that means."""
    async with chat(valkey.url, 2, roam=True) as nodes:
        ana, ben = (
            await open_page(nodes[1], "ana"),
            await open_page(nodes[2], "ben", PHONE, color_scheme="dark"),
        )
        await online(ana, "ana", "ben")
        await say(ana, "I shall kill your node now.")
        await there(said(ben, "I shall kill your node now."))
        await say(ben, "Which of them am I on?")
        await nodes.kill(2) if how == "killed" else nodes.freeze(2)
        await there(ben.locator("#state.good").get_by_text("node-1"))
        await there(ben.locator(".line.gap", has_text="You are on node-1 now"))
        await say(ben, "Here I am again")
        row = ana.locator(".row", has_text="Here I am again")
        await there(row.locator(".node").get_by_text("node-1"))
        await fits(ben)
        if how == "killed":
            await shoot(ben, "moved")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_redis_is_away(open_page: Open, size: tuple[int, int]) -> None:
    """While Redis is frozen the pages say so, and what is said then is marked; afterwards they say
    that messages may have been missed, and all goes on."""
    with Server() as server:
        async with chat(server.url, 2) as nodes:
            ana = await open_page(nodes[1], "ana", size, color_scheme="dark")
            ben = await open_page(nodes[2], "ben", size, color_scheme="dark")
            await online(ana, "ana", "ben")
            await say(ana, "Shall we ship it?")
            await there(said(ben, "Shall we ship it?"))
            await say(ben, "The tests are green. Yes!")
            await there(said(ana, "The tests are green. Yes!"))
            server.freeze()
            try:
                for page in (ana, ben):
                    await there(page.locator("#state.away").get_by_text("Redis is away"))
                    await there(page.locator("#banner").get_by_text("has lost Redis"))
                await ana.fill("#text", "Wait, one thing")
                await ana.press("#text", "Enter")
                await there(ana.locator(".row.not-sent .outcome, .row.maybe .outcome"))
                await fits(ana)
                if size == DESKTOP:
                    await shoot(ana, "away")
            finally:
                server.thaw()
            for page in (ana, ben):
                await there(page.locator("#state.good"))
                await there(page.locator(".line.gap", has_text="Messages may have been missed"))
            await say(ben, "Did you say something?")
            await there(said(ana, "Did you say something?"))
            await online(ana, "ana", "ben")
            await fits(ben)
            if size == PHONE:
                await shoot(ben, "gap")
