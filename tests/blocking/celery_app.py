import os

from celery import Celery

from eventbus import Event
from eventbus.blocking import Publisher


class ReportReady(Event, channel="report:{number}"):
    number: int


app = Celery("reports", broker=os.environ.get("BROKER_URL"))
publisher = Publisher(os.environ.get("EVENTBUS_URL"), name="reports")  # in each pool process


@app.task
def make_report(number: int) -> str | None:
    """Make it, and tell."""
    return publisher.publish(ReportReady(number=number)).id
