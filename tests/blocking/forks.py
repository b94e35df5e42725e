"""A process that publishes, forks in two ways while another thread goes on publishing, and ends.

Arguments: the URL, the number of children. Every process publishes ten notes on channels of its
own, numbered from 1; it prints a line with its source and its part for each process.
"""

import multiprocessing
import os
import sys
import threading
import warnings

from eventbus import Event
from eventbus.blocking import Publisher

# From Python 3.12 on a fork beside a thread warns; that is what is tried here.
warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)

COUNT = 10


class Note(Event, channel="note:{part}"):
    part: str
    n: int


publisher = Publisher(sys.argv[1], name="forks", connect_timeout=20.0, publish_timeout=20.0)


def publish(part: str) -> None:
    """Ten notes of this part, and the line."""
    for n in range(1, COUNT + 1):
        publisher.publish(Note(part=part, n=n))
    os.write(1, f"{publisher.bus.source} {part}\n".encode())


def main() -> None:
    """Fork while a thread publishes without a pause."""
    children = int(sys.argv[2])
    publisher.publish(Note(part="before", n=1))
    over = threading.Event()
    busy = threading.Event()

    def go_on() -> None:
        n = 0
        while not over.is_set():
            n += 1
            publisher.publish(Note(part="thread", n=n))
            busy.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    busy.wait(20)
    forked = []
    for k in range(children):
        pid = os.fork()
        if not pid:
            publish(f"forked-{k}")
            os._exit(0)
        forked.append(pid)
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=publish, args=(f"started-{k}",)) for k in range(children)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in forked]
    over.set()
    thread.join()
    publish("parent")
    sys.exit(any(codes) or any(process.exitcode for process in started))


if __name__ == "__main__":
    main()
