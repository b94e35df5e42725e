import os

from flask import Flask

from eventbus import BusUnavailable, Event, PublishUncertain
from eventbus.blocking import Publisher


class OrderPlaced(Event, channel="order:{number}"):
    number: int


app = Flask(__name__)
publisher = Publisher(os.environ.get("EVENTBUS_URL"), name="shop")  # connects in each worker


@app.post("/orders/<int:number>")
def order(number: int) -> tuple[dict[str, object], int]:
    """Take an order, and tell."""
    try:
        receipt = publisher.publish(OrderPlaced(number=number))
    except BusUnavailable:
        return {"told": False}, 202  # certainly not sent
    except PublishUncertain:
        return {"told": None}, 202
    return {"told": True, "id": receipt.id}, 201
