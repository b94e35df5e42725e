import os

from django.http import HttpRequest, JsonResponse
from django.urls import path

from eventbus import Event
from eventbus.blocking import Publisher


class OrderPlaced(Event, channel="order:{number}"):
    number: int


publisher = Publisher(os.environ.get("EVENTBUS_URL"), name="shop")


def order(request: HttpRequest, number: int) -> JsonResponse:
    """Take an order, and tell."""
    receipt = publisher.publish(OrderPlaced(number=number))
    return JsonResponse({"id": receipt.id})


urlpatterns = [path("orders/<int:number>", order)]
