"""What a blocking publish costs beside redis-py's own: `python -m benchmarks.blocking`.

One fresh server; the contestants in turn, five rounds, medians. redis-py sends bytes that were made
before the clock starts; the publisher validates and encodes an event for each.
"""

import platform
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median

import redis

from eventbus import Event
from eventbus.blocking import Publisher
from eventbus.server import Server

ROUNDS = 5
COUNT = 2_000
THREADS = 8


class ChatMessage(Event, channel="chat:{room}"):
    room: str
    user: str
    text: str


EVENT = ChatMessage(room="room-1", user="alice", text="x" * 40)


def seconds(work: Callable[[], object], threads: int) -> float:
    """Wall time of COUNT calls, shared by so many threads."""

    def some() -> None:
        for _ in range(COUNT // threads):
            work()

    workers = [threading.Thread(target=some) for _ in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begin


def main() -> None:
    with Server() as server, Publisher(server.url) as publisher:
        client = redis.Redis(unix_socket_path=server.socket_path)
        payload = b"x" * 230  # what the event has in its envelope
        contestants: dict[str, Callable[[], object]] = {
            "redis-py publish": lambda: client.publish("chat:room-1", payload),
            "Publisher.publish": lambda: publisher.publish(EVENT),
            "Publisher.publish_nowait": lambda: publisher.publish_nowait(EVENT),
        }
        for work in contestants.values():
            work()
        print(f"Python {platform.python_version()}, redis-py {version('redis')}, unix socket")
        for threads in (1, THREADS):
            rows: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(ROUNDS):
                for name, work in contestants.items():
                    rows[name].append(seconds(work, threads))
            floor = median(rows["redis-py publish"])
            for name, found in rows.items():
                each = median(found) / COUNT * 1e6
                ratio = median(found) / floor
                print(f"{threads} thread(s)  {name:25} {each:7.0f} µs a call  {ratio:.2f} ×")
        client.close()


if __name__ == "__main__":
    sys.exit(main())
