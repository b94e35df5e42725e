"""An application for the command line to look at: its bus goes where EVENTBUS_URL says."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, Field

from eventbus import Event, EventBus, Message, Router


class Payment(Event, channel="pay:{shop}"):
    """Somebody paid."""

    shop: str
    cents: int


class Size(StrEnum):
    SMALL = "s"
    LARGE = "l"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"


class Moved(Event, type="stock.moved", channel="stock:{{x}}:{size}:{path:path}"):
    """Something has another place. It has every kind of field that JSON Schema spells twice."""

    size: Size
    path: str
    place: tuple[int, str] = (1, "x")
    places: tuple[int, ...] = ()
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] = Cat()
    discriminator: dict[str, list[Size]] | None = None
    key: UUID | None = None


class Closed(Event, channel="closed:{shop}"):
    shop: str


bus = EventBus()
router = Router(prefix="more:")


@bus.on("pay:*")
async def book(event: Payment) -> None:
    """Write it down."""


@bus.on("pay:{shop}", "refund:[ab]?:{{x}}\\*")
async def anything(event: dict, shop: str = "") -> None:
    """Write all of it down."""


@bus.on(Moved)
async def moved(message: Message[Moved]) -> None:
    """Carry it."""


@bus.on("bare:{any1}:*", wire="bare")
async def bare(event: Payment) -> None:
    """For programs without an envelope."""


@router.on("{deep:path}")
async def union(event: Payment | Moved) -> None:
    """Either."""


bus.include_router(router)
