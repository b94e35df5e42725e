"""Publishing without an event loop: threads of a web server, a script, a task queue.

The same events, channels, receipts and errors, from any thread. The listener here runs in a thread
of its own, as it would in another process.

It prints:

    job 1 is done by worker-1
    job 2 is done by worker-2
    job 3 is done by worker-3
    refused: InvalidChannel
"""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from eventbus import Event, EventBus, InvalidChannel
from eventbus.blocking import Publisher


class JobDone(Event, channel="job:{number}"):
    number: int
    by: str


URL = os.environ.get("EVENTBUS_URL", "memory://jobs")

publisher = Publisher(URL, name="workers")  # at module level: it connects at the first publish


def work(number: int) -> None:
    receipt = publisher.publish(JobDone(number=number, by=f"worker-{number}"))
    assert receipt.receivers == 1


listening = threading.Event()


async def listen() -> None:
    async with EventBus(URL) as bus, bus.subscribe(JobDone) as done:
        listening.set()
        for _ in range(3):
            message = await anext(done)
            print(f"job {message.event.number} is done by {message.event.by}")


listener = threading.Thread(target=lambda: asyncio.run(listen()))
listener.start()
listening.wait()
with ThreadPoolExecutor(3) as pool:
    list(pool.map(work, (1, 2, 3)))
listener.join()

try:
    publisher.publish("job:\n", JobDone(number=4, by="nobody"))
except InvalidChannel as error:
    print("refused:", type(error).__name__)
