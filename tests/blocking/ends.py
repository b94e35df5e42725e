"""A program that ends without closing its publisher.

Arguments: the URL, and how it ends: "plain", "thread" (a daemon thread still publishes), "late" (a
publish in an exit handler that runs after the publisher's own).
"""

import atexit
import sys
import threading

from eventbus import BusClosed, Event, EventBusError


class Note(Event, channel="note:{to}"):
    to: str
    n: int


def late() -> None:
    """Registered first, so it runs last."""
    try:
        publisher.publish_raw("raw:late", b"1")
    except BusClosed as error:
        print(error)


if sys.argv[2] == "late":
    atexit.register(late)

from eventbus.blocking import Publisher  # noqa: E402

publisher = Publisher(sys.argv[1], connect_timeout=20.0, publish_timeout=20.0)
for number in range(10):
    publisher.publish_nowait(Note(to="end", n=number))


def forever() -> None:
    """Publish until it is refused."""
    try:
        while True:
            publisher.publish_raw("raw:thread", b"1")
    except EventBusError:
        return


if sys.argv[2] == "thread":
    threading.Thread(target=forever, daemon=True).start()
